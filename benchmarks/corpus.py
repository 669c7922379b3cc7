"""Compress every ONNX file of a folder, as a user would, and write down what became of it.

Each model goes through `onnxneutrino compress` with the default trainer in a process of its own: on its own data
where a TOML file beside it or `corpus_loaders.py` gives some (delta 1), on random inputs with the metric agreement
where there is none (delta 5). The written file is checked with onnx.checker and run on random inputs by the onnxruntime
of another environment (`--plain PYTHON`: the newest plain onnxruntime and numpy), and compared with the runtime in use.
Results are kept model by model in `--work`, so that a run can be continued.

    python benchmarks/corpus.py MODELS DATA --work FOLDER --plain PYTHON [--time-limit 2m] [--output docs/corpus.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxneutrino.graph import fixed_shapes, load, real_inputs
from onnxneutrino.runtime import Runner, random_inputs

LOADERS = {
    "det_yolox_nano": ("yolox", "agreement"),
    "imagenet_mobilenetv1_025_224_tf2onnx": ("mobilenet", "top1"),
    "imagenet_squeezenet_fp16_caffe2": ("squeezenet", "top1"),
    "mnist_matlab_point": ("mnist_turned", "top1"),
    "vww_mobilenetv1_025_96_tf2onnx": ("visual_wake_words", "top1"),
}
# Sizes for inputs that the files leave free, by file name and input.
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "ocr_ppocrv2_det_paddle": {"x": (1, 3, 64, 64)},
    "vad_silero_op18": {"input": (1, 288), "state": (2, 1, 128)},
    "vad_silero_spox": {"input": (1, 288), "state": (2, 1, 128)},
}
LISTED_OPERATORS = 6
DELTA, AGREEMENT_DELTA = "1", "5"
PLAIN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
with numpy.load(sys.argv[2]) as stored:
    outputs = session.run(None, {key: stored[key] for key in stored.files})
numpy.savez(sys.argv[3], *outputs)
print(onnxruntime.__version__)
"""


def arguments_of(model: Path) -> tuple[list[str], str]:
    """The options of a model, and what its data are called."""
    options = [
        f"--input-shape={name}={'x'.join(map(str, shape))}" for name, shape in SHAPES.get(model.stem, {}).items()
    ]
    if model.stem in LOADERS:
        function, metric = LOADERS[model.stem]
        delta = DELTA if metric == "top1" else AGREEMENT_DELTA
        loader = Path(__file__).resolve().with_name("corpus_loaders.py")
        return [*options, "--data", f"{loader}:{function}", "--metric", metric, "--delta", delta], "own"
    if model.with_suffix(".toml").is_file():
        return [*options, "--delta", DELTA], "own"
    return [*options, "--data", "random", "--metric", "agreement", "--delta", AGREEMENT_DELTA], "random"


def compressed(model: Path, data: Path, work: Path, plain: str, limit: str) -> dict[str, Any]:
    """Compress one model and look at what was written."""
    target = work / model.name
    for old in work.glob(f"{model.stem}.*"):
        old.unlink()
    options, source = arguments_of(model)
    command = ["onnxneutrino", "compress", str(model), str(target), "--time-limit", limit, *options]
    command[:1] = [sys.executable, "-m", "onnxneutrino"]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=work, env={**os.environ, "CORPUS_DATA": str(data)}
    )
    row: dict[str, Any] = {
        "model": model.stem,
        "data": source,
        "code": done.returncode,
        "seconds": time.perf_counter() - start,
        **described(model),
    }
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("onnxneutrino:")]
    row["line"] = lines[-1].removeprefix("onnxneutrino: ").replace(str(model), model.name) if lines else ""
    report = target.with_suffix(".report.json")
    if done.returncode == 0 and report.is_file():
        row["report"] = json.loads(report.read_text(encoding="utf-8"))
        row["checked"], row["plain"] = verified(target, work, plain)
    elif done.returncode not in (1, 2):
        row["line"] = f"CRASH, exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    return row


def described(model: Path) -> dict[str, Any]:
    """Producer, opset and operators of a file."""
    loaded = onnx.load(model, load_external_data=False)
    producer = " ".join(part for part in (loaded.producer_name, loaded.producer_version) if part)
    opsets = [entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")]
    kinds = Counter(node.op_type for node in loaded.graph.node)
    return {"producer": producer, "opset": opsets[0] if opsets else None, "operators": dict(kinds.most_common())}


def verified(path: Path, work: Path, plain: str) -> tuple[str, str]:
    """What the checker says, and whether the plain runtime gives the outputs of the one in use."""
    try:
        onnx.checker.check_model(onnx.load(path))
        checked = "yes"
    except Exception as error:
        checked = f"no: {error}"
    model = load(path).model
    names = [value.name for value in real_inputs(model)]
    free = SHAPES.get(path.stem, {})
    inputs = random_inputs(model, fixed_shapes(model, {name: free[name] for name in names if name in free}), 0)
    given, got = work / f"{path.stem}.inputs.npz", work / f"{path.stem}.outputs.npz"
    stored: dict[str, Any] = dict(inputs)
    np.savez(given, **stored)
    done = subprocess.run(
        [plain, "-c", PLAIN, str(path), str(given), str(got)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return checked, f"no: {done.stderr.strip().splitlines()[-1]}"
    wanted = Runner(model)(inputs)
    with np.load(got) as outputs:
        errors = [_error(a, outputs[f"arr_{index}"]) for index, a in enumerate(wanted)]
    return checked, f"{done.stdout.strip()}, {max(errors):.0e}"


def _error(a: Any, b: Any) -> float:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(first - second), initial=0.0) / max(float(np.max(np.abs(first), initial=0.0)), 1e-12))


def trained_how(report: dict[str, Any]) -> str:
    """In a few words: which layers were trained how."""
    if not report["training"]:
        return "not trained"
    whole = [layer for block in report["blocks"] if block["how"] == "end to end" for layer in block["layers"]]
    parts = [block for block in report["blocks"] if block["how"] == "reconstruction"]
    texts = [f"{_count(len(whole), 'layer')} end to end"] if whole else []
    if parts:
        kinds = ", ".join(sorted({kind for block in parts for kind in block["ended_by"]}))
        layers = _count(sum(len(block["layers"]) for block in parts), "layer")
        texts.append(f"{layers} in {_count(len(parts), 'block')} by reconstruction (before {kinds})")
    return ", ".join(texts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table, and the refusals below it."""
    lines = [
        "| model | producer | opset | operators | data | marked | trained | params before | after | metric before | "
        "drop | check | plain onnxruntime, difference | s |",
        "|---|---|---:|---|---|---:|---|---:|---:|---|---:|---|---|---:|",
    ]
    for row in (row for row in rows if "report" in row):
        report = row["report"]
        kinds = list(row["operators"])
        more = len(kinds) - LISTED_OPERATORS
        operators = ", ".join(kinds[:LISTED_OPERATORS]) + (f" and {more} more" if more > 0 else "")
        marked = sum(layer["reason"] is None for layer in report["layers"])
        last = report["stage2"] or report["stage1"]
        cells = (
            row["model"],
            row["producer"] or "-",
            row["opset"],
            operators,
            row["data"],
            f"{marked} of {len(report['layers'])}",
            trained_how(report),
            f"{report['original']['params']:,}".replace(",", " "),
            f"{last['params']:,} ({report['enhancement']['params']:.2f}x)".replace(",", " "),
            f"{report['metric_name']} {report['original']['metric']:.2f}",
            f"{report['drop']:.2f}",
            row["checked"],
            row["plain"],
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    refused = [f"- {row['model']} ({row['producer'] or '-'}): {row['line']}" for row in rows if "report" not in row]
    warned = [
        f"- {row['model']}: {warning}"
        for row in rows
        if "report" in row
        for warning in row["report"]["warnings"]
        if not warning.startswith("random inputs")
    ]
    shares = [
        100 * row["report"]["seconds"].get("check gradients", 0.0) / sum(row["report"]["seconds"].values())
        for row in rows
        if "report" in row
    ]
    if shares:
        told = f"median {np.median(shares):.1f} % of a run, at most {max(shares):.1f} %"
        lines += ["", f"Training copy and gradient self-check: {told}."]
    if refused:
        lines += ["", f"## Refused: {len(refused)}", *refused]
    if warned:
        lines += ["", "## Warnings in the reports", *warned]
    return "\n".join(lines)


HEADING = """# Every model, as it comes

Made by `python benchmarks/corpus.py MODELS DATA --work FOLDER --plain PYTHON --jobs {jobs} --output docs/corpus.md`:
each file through `onnxneutrino compress` with `--time-limit {limit}`, default trainer, seed 0, on two shared cores, so
many at a time as `--jobs` says: a test of breadth, not of how far a model can be compressed. `own` data: delta 1 in
top-1 (5 in agreement); `random`: the metric is agreement with the original on random inputs, delta 5, which says
nothing about real data. The last columns: accepted by onnx.checker; version of the plain onnxruntime that ran the
output, and the largest difference of its outputs from those of the runtime in use, relative to the largest value;
seconds.
"""


def main() -> None:
    """Compress what was not yet compressed, and write the table; exit code 1 where something crashed."""
    parser = argparse.ArgumentParser(description="Compress every ONNX file of a folder.")
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for outputs and results")
    parser.add_argument("--plain", required=True, help="interpreter with the newest plain onnxruntime")
    parser.add_argument("--time-limit", default="2m")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()  # a checkout is no place to run in: its package lacks the passes there

    def row_of(model: Path) -> dict[str, Any]:
        kept = work / f"row_{model.stem}.json"
        if not kept.is_file():
            made = compressed(model.resolve(), options.data.resolve(), work, options.plain, options.time_limit)
            kept.write_text(json.dumps(made), encoding="utf-8")
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        print(f"{model.stem}: {row['code']} {row['seconds']:.0f} s {row['line']}", flush=True)
        return row

    models = [path for path in sorted(options.models.glob("*.onnx")) if not options.only or path.stem in options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(row_of, models))
    text = table(rows)
    if options.output:
        options.output.write_text(
            f"{HEADING.format(limit=options.time_limit, jobs=options.jobs)}\n{text}\n", encoding="utf-8"
        )
    else:
        print(text)
    if any(row["code"] not in (0, 1, 2) or ("report" in row and row["checked"] != "yes") for row in rows):
        sys.exit("something crashed, or the checker refused an output")


if __name__ == "__main__":
    main()
