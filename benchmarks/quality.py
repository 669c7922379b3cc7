"""Ours beside what a user would pick instead: equal wall time, cores, data, delta and search; the table `quality`.

Every method runs on every model in a process of its own, one after another (`quality_run.py`). A cell is one JSON file
in `--work`, named after what was asked for, so that a run continues where it was; the table is made from these files
alone. Without a folder of models the project's own digits are used.

    python benchmarks/quality.py [MODELS DATA] --work FOLDER --output FILE.md [--minutes 8] [--torch-python PYTHON]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_table import METHODS, document

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODELS = (
    "cifar10_vgg",
    "cifar10_resnet20_akamaster_bn",
    "cifar10_marabou_large_tf2onnx",
    "cifar10_biasfield_base",
)
STARTING = 300.0  # seconds that a process may take beyond its limit before it is given up
NEEDED = ("torch", "torch_pruning")


@dataclass(frozen=True)
class Settings:
    """What is the same for all cells."""

    minutes: float
    objective: str
    delta: float
    seed: int
    threads: int

    @property
    def suffix(self) -> str:
        """For file names."""
        parts = f"{self.minutes:g}m", self.objective, f"delta{self.delta:g}", f"seed{self.seed}", f"t{self.threads}"
        return ".".join(parts)


def main() -> None:
    """Run the cells that are missing, and write the table; exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description="Compare with other methods at equal time.")
    parser.add_argument("folder", type=Path, nargs="?", metavar="MODELS", help="folder of the models; none: the digits")
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="folder of the .npz files of their TOMLs")
    parser.add_argument("--work", type=Path, required=True, help="folder for results and compressed models")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--models", nargs="*", help="names of models in the folder")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--objective", choices=("params", "macs"), default="params")
    parser.add_argument("--delta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-python", metavar="PYTHON", help="interpreter with PyTorch and Torch-Pruning")
    options = parser.parse_args()
    if options.folder is not None and options.data is None:
        parser.error("give the folder of the data too")
    settings = Settings(options.minutes, options.objective, options.delta, options.seed, options.threads)
    names = options.models or (["digits"] if options.folder is None else list(MODELS))
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names:
        model = (FIXTURES if options.folder is None else options.folder.resolve()) / f"{name}.onnx"
        for method in options.methods:
            rows.append(cell(method, model, options.data, work, settings, options.torch_python))
            print(f"{name} {method}: {told(rows[-1])}", flush=True)
    text = document(rows, vars(settings))
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    if any("failed" in row for row in rows):
        sys.exit("a cell failed")


def cell(
    method: str, model: Path, data: Path | None, work: Path, settings: Settings, torch_python: str | None
) -> dict[str, Any]:
    """The row of one method and model: as it was kept, else from a run; `skipped` or `failed` says why there is none.

    A row that failed is not kept, so that the next run tries it again.
    """
    kept = work / f"{model.stem}.{method}.{settings.suffix}.json"
    about = {"method": method, "model": model.stem, "settings": vars(settings)}
    python = interpreter(torch_python) if method == "pruning" else sys.executable
    if not kept.is_file() and python is None:
        return {**about, "skipped": f"needs {', '.join(NEEDED)}: give --torch-python"}
    if not kept.is_file():
        assert python is not None
        made = kept.with_suffix(".made")
        start = time.perf_counter()
        trouble = run(command(python, method, placed(model, data, work), kept.with_suffix(".onnx"), made, settings))
        if trouble is not None:
            return {**about, "failed": trouble}
        row = json.loads(made.read_text(encoding="utf-8"))
        row = {**about, **row, "process_seconds": time.perf_counter() - start}
        made.unlink()
        partial = kept.with_suffix(".part")
        partial.write_text(json.dumps(row, indent=1), encoding="utf-8")
        os.replace(partial, kept)
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def interpreter(given: str | None) -> str | None:
    """The interpreter for pruning: the one given, else this one where it has what is needed; None for neither."""
    if given is None:
        return sys.executable if all(importlib.util.find_spec(name) for name in NEEDED) else None
    asked = f"import {', '.join(NEEDED)}, onnxneutrino"
    try:
        done = subprocess.run([given, "-c", asked], capture_output=True, check=False)
    except OSError:
        return None
    return given if done.returncode == 0 else None


def placed(model: Path, data: Path | None, work: Path) -> Path:
    """The model beside its TOML file, with the data of that file where DATA is: links in the folder of the work."""
    if data is None:
        return model
    folder = work / "models"
    folder.mkdir(exist_ok=True)
    for target, link in (
        (model, folder / model.name),
        (model.with_suffix(".toml"), folder / f"{model.stem}.toml"),
        (data.resolve(), work / "data"),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return folder / model.name


def command(python: str, method: str, model: Path, target: Path, result: Path, settings: Settings) -> list[str]:
    """The command line of a cell."""
    script = Path(__file__).resolve().with_name("quality_run.py")
    options = [f"--{name}={value}" for name, value in vars(settings).items()]
    return [python, str(script), method, str(model), str(target), str(result), *options]


def run(arguments: Sequence[str]) -> str | None:
    """Run a cell; None when it went well, else the last line it wrote."""
    limit = next(float(own.partition("=")[2]) for own in arguments if own.startswith("--minutes=")) * 60
    try:
        done = subprocess.run(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=3 * limit + STARTING
        )
    except subprocess.TimeoutExpired:
        return "took three times its limit"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def told(row: dict[str, Any]) -> str:
    """One line for the console."""
    if "result" not in row:
        return str(row.get("skipped") or row.get("failed"))
    gain = row["original"]["params"] / row["result"]["params"]
    return f"params {gain:.2f}x, drop {row['drop']:.2f}, {row['process_seconds']:.0f} s"


if __name__ == "__main__":
    main()
