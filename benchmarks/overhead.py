"""Measure what compression costs besides training: seconds and peak memory of each phase.

Load, normalize, calibrate, fit every form on every layer, allocate, make the factors, write: in a process of its
own, so that the peak memory is that of these phases. Inputs are random normal values. Goal for the VGG-19 of
`vgg19.py` on 256 inputs: under 60 s and 1.5 GB. `--work` measures networks of its kind from 0.1 to 100 million
parameters instead, each in a process of its own, and how all of it grows.

    python benchmarks/overhead.py vgg19.onnx [--images 256] [--ratio 10] [--json -]
    python benchmarks/overhead.py --work FOLDER [--sizes 0.1 1 10 20 25 100] --output FILE.md
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import vgg19
from cells import kept_row, machine, versions_line, write_row, written
from threadpoolctl import threadpool_limits

from onnxneutrino import heap, metrics, prepare
from onnxneutrino.allocate import allocate
from onnxneutrino.candidates import Point, candidates, options
from onnxneutrino.conductor import make_task
from onnxneutrino.config import Config, available_cores, load_config
from onnxneutrino.data import Dataset, deciding
from onnxneutrino.figures import whole_cost
from onnxneutrino.graph import load, save
from onnxneutrino.layer_options import LayerOptions, chains, cost_unit
from onnxneutrino.marking import mark
from onnxneutrino.plan import FORMS
from onnxneutrino.summary import versions
from onnxneutrino.task import Marked, Network, Task, build
from onnxneutrino.workbench import Workbench

SAMPLES = 3
SETTINGS = ("images", "ratio", "metric")
GOAL_SECONDS = 60.0
GOAL_BYTES = 1.5e9
# Widths of the blocks by about how many million parameters they come to; 20 is VGG-19 itself.
SIZES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "0.1": ((8,) * 2, (8,) * 2, (16,) * 4, (40,) * 4, (40,) * 4),
    "1": ((16,) * 2, (32,) * 2, (56,) * 4, (112,) * 4, (112,) * 4),
    "10": ((48,) * 2, (96,) * 2, (176,) * 4, (360,) * 4, (360,) * 4),
    "20": vgg19.WIDTHS,
    "25": ((72,) * 2, (144,) * 2, (288,) * 4, (576,) * 4, (576,) * 4),
    "100": ((128,) * 2, (256,) * 2, (512,) * 4, (1024,) * 4, (1024,) * 6),
}


class Phases:
    """Seconds of each phase, and the largest memory of the process until its end; parts of a phase add up."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        wall, processor = time.perf_counter(), time.process_time()
        yield
        row = self._found.setdefault(name, {"phase": name, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0})
        row["seconds"] += time.perf_counter() - wall
        row["cpu_seconds"] += time.process_time() - processor
        row["peak_bytes"] = peak_bytes()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each phase, then one for all together."""
        found = list(self._found.values())
        total = {key: sum(row[key] for row in found) for key in ("seconds", "cpu_seconds")}
        return [*found, {"phase": "all", **total, "peak_bytes": peak_bytes()}]


def peak_bytes() -> int:
    """Largest resident memory of this process so far (`ru_maxrss`: kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(path: Path, output: Path, images: int, ratio: float, metric_name: str) -> dict[str, Any]:
    """Run all phases in this process.

    Args:
        path: the model.
        output: where the factorized one is written.
        images: calibration inputs.
        ratio: how many times fewer parameters to allocate for.
        metric_name: `agreement`; or `mse`, for which the curvature of a classifier's outputs is not measured.
    """
    watch = Phases()
    config = load_config(None, {"data": "random", "metric": metric_name, "validation": 0.0})
    with watch.phase("load"):
        source = load(path)
        opened = prepare.open_model(source.model, path.name, config)
    with watch.phase("normalize and mark"):
        metric = metrics.resolve(config.metric, config.metric_base)
        dataset = prepare.open_dataset(opened, metric, config)
        marked = mark(opened, prepare.first_examples(dataset.test, SAMPLES), config)
    with watch.phase(f"calibrate on {images}"):
        task = _task(marked, config, metric, dataset)
        bench = Workbench(task, config.time_limit, images=images)
        fits: Mapping[str, LayerOptions] = bench._original
    units = {layer.name: cost_unit(layer, config.objective) for layer in marked.layers}
    points: dict[str, list[Point]] = {layer.name: [] for layer in marked.layers}

    def fit(name: str) -> dict[str, float]:
        """All forms of a layer but CP: as `LayerOptions.options`, form by form; processor seconds of each."""
        own, spent = fits[name], dict[str, float]()
        for form in (form for form in FORMS[:-1] if form in own.fits):
            start = time.thread_time()
            points[name].extend(candidates(own.layer, {form: own.fits[form]}))
            spent[form] = time.thread_time() - start
        for each in own.fits.values():
            each.release()
        return spent

    with watch.phase("fit all forms but cp"), ThreadPoolExecutor(config.threads) as pool:
        spent = list(pool.map(fit, fits))
    with watch.phase("allocate"):
        budget = bench.full_cost / ratio - task.rest
        plans = {"all": allocate({name: options(tuple(points[name]), units[name]) for name in points}, budget)}
        for form in FORMS[:-1]:
            # A layer without this form keeps all of its own, so that the budget is still met.
            chosen = {
                name: options(tuple(p for p in found if _of_form(p, form) or not _has_form(found, form)), units[name])
                for name, found in points.items()
            }
            plans[form] = allocate(chosen, budget)
    with watch.phase("cp where considered"):
        best = bench.challenged(plans["all"])
    with watch.phase("factors of every plan"):
        made = {form: len(chains(fits, plan, task.threads)) for form, plan in plans.items()}
        factors = chains(fits, best, task.threads)
    with watch.phase("write"):
        save(build(task, Network(factors)), output, source.external)
    return {
        "model": path.name,
        "images": bench.calibration_images,
        "layers": len(marked.layers),
        "params": int(sum(whole_cost(layer, "params") for layer in marked.layers) + task.rest),
        "params_allocated": int(sum(option.cost for option in best.values()) + task.rest),
        "chains": made,
        "model_bytes": path.stat().st_size,
        "written_bytes": output.stat().st_size,
        "phases": watch.rows,
        "fit_cpu_seconds": {form: sum(own.get(form, 0.0) for own in spent) for form in FORMS[:-1]},
    }


def _of_form(point: Point, form: str) -> bool:
    return point.choice is None or point.choice.form == form


def _has_form(points: list[Point], form: str) -> bool:
    return any(point.choice is not None and point.choice.form == form for point in points)


def _task(marked: Marked, config: Config, metric: metrics.Metric, dataset: Dataset) -> Task:
    """What the workbench needs to calibrate; nothing here decides, so the original's rows are left at zero."""
    batch = prepare.evaluation_batch(marked.opened) if marked.freed else 1
    judges = deciding(dataset, config.seed)
    return make_task(marked, config, metric, dataset, judges, np.zeros((len(dataset.test), 1)), batch)


def table(result: Mapping[str, Any]) -> str:
    """The phases as a Markdown table, the last row all of them."""
    lines = ["| phase | seconds | processor seconds | peak so far, MB |", "|---|---:|---:|---:|"]
    lines.extend(
        f"| {row['phase']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_bytes'] / 1e6:.0f} |"
        for row in result["phases"]
    )
    shares = ", ".join(f"{form} {seconds:.1f}" for form, seconds in result["fit_cpu_seconds"].items())
    return "\n".join([*lines, "", f"Processor seconds of the fits: {shares}."])


def network(size: str) -> onnx.ModelProto:
    """A VGG with the widths of one of `SIZES`."""
    with mock.patch.object(vgg19, "WIDTHS", SIZES[size]):
        return vgg19.vgg19()


def exponent(params: Sequence[float], values: Sequence[float]) -> float:
    """The power of the parameters that a value grows with: the slope of the least-squares line of the logarithms."""
    return float(np.polyfit(np.log(params), np.log(values), 1)[0])


HEADING = """# What compression costs besides training, by size

Made by `python benchmarks/overhead.py --work`; what is done stands in `benchmarks/README.md`. VGG-like networks with
random weights; seconds are processor seconds of all threads, wall time with imports, peak memory of the process. The
exponent is the power of the number of parameters that a row grows with, fitted over all sizes; `last` is that between
the two largest.
"""


def sizes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for every size, a row for every phase; from the JSON of the sizes alone."""
    found = sorted((row for row in rows if "failed" not in row), key=lambda row: row["params"])
    params = [row["params"] for row in found]
    lines = [HEADING]
    lines += [f"{row['size']} million parameters: failed, {row['failed']}\n" for row in rows if "failed" in row]
    if not found:
        return "\n".join(lines)
    lines.append("| million parameters | " + " | ".join(f"{n / 1e6:.2f}" for n in params) + " | exponent | last |")
    lines.append("|---|" + "---:|" * (len(params) + 2))

    def line(name: str, values: Sequence[float], form: str) -> str:
        cells = [format(value, form) for value in values]
        for few in (slice(None), slice(-2, None)):
            usable = len(values[few]) > 1 and min(values[few]) > 0
            cells.append(f"{exponent(params[few], values[few]):.2f}" if usable else "")
        return f"| {name} | {' | '.join(cells)} |"

    for index, phase in enumerate(found[0]["phases"]):
        lines.append(line(f"{phase['phase']}, s", [row["phases"][index]["cpu_seconds"] for row in found], ".2f"))
    lines += [
        line(f"of the fits: {form}, s", [row["fit_cpu_seconds"][form] for row in found], ".2f")
        for form in found[0]["fit_cpu_seconds"]
        if any(row["fit_cpu_seconds"][form] for row in found)
    ]
    lines.append(line("wall time, s", [row["wall_seconds"] for row in found], ".1f"))
    lines.append(line("peak memory, MB", [row["phases"][-1]["peak_bytes"] / 1e6 for row in found], ".0f"))
    lines.append(line("model, MB", [row["model_bytes"] / 1e6 for row in found], ".1f"))
    own = found[0]["machine"]
    where = f"{own['system']} {own['machine']}, {own['threads']} of {own['cores']} cores"
    return "\n".join([*lines, "", f"{where}; {versions_line(found)}."]) + "\n"


def in_child(model: Path, settings: Mapping[str, Any]) -> dict[str, Any] | str:
    """What `measure` finds in a process of its own, and the wall time of that; the last line it wrote if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, __file__, str(model), f"--child={Path(folder, 'out.onnx')}", *asked]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - start
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": wall}


def measure_sizes(options: argparse.Namespace) -> None:
    """Measure the sizes that are missing, and write the table; exit code 1 where one failed."""
    options.work.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in SETTINGS}
    rows = []
    # `ru_maxrss` of a child begins with its parent's memory, which the making of a large network leaves behind.
    for size in sorted(options.sizes, key=float):
        kept = options.work / f"vgg{size}M.{'.'.join(f'{name}{value}' for name, value in settings.items())}.json"

        def made(target: Path, size: str = size) -> str | None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"vgg{size}M.onnx")
                onnx.save(network(size), path)
                result = in_child(path, settings)
            if isinstance(result, str):
                return result
            write_row(target, result)
            return None

        rows.append(kept_row(kept, {"size": size, "settings": settings}, made))
        print(f"{size}: {rows[-1].get('failed', 'done')}", flush=True)
    written(sizes_table(rows), options.output)
    if any("failed" in row for row in rows):
        sys.exit("a size failed")


def main() -> None:
    """Run the measurement in a child process and print its table, or its JSON."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of compression besides training.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=10.0, help="how many times fewer parameters to allocate for")
    parser.add_argument("--metric", choices=("agreement", "mse"), default="agreement", help="mse: no curvature")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON too; - for standard output")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="measure sizes; results are kept here")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES), help="in million parameters")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="the table of the sizes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.work is None):
        parser.error("give a model, or --work")
    if arguments.work is not None:
        measure_sizes(arguments)
        return
    if arguments.child is not None:
        heap.return_large_blocks()  # as the command line does
        with threadpool_limits(limits=1, user_api="blas"):  # as `compress` does
            found = measure(arguments.model, arguments.child, arguments.images, arguments.ratio, arguments.metric)
        print(json.dumps({**found, "versions": versions(), "machine": machine(available_cores())}))
        return
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    result = in_child(arguments.model, settings)
    if isinstance(result, str):
        sys.exit(result)
    if arguments.json == "-":
        print(json.dumps(result, indent=2))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    peak, wall = result["phases"][-1]["peak_bytes"], result["wall_seconds"]
    met = wall < GOAL_SECONDS and peak < GOAL_BYTES
    print(
        f"\n{result['model']}: {result['layers']} layers, {result['params']} to {result['params_allocated']} "
        f"parameters; wall time with imports {wall:.1f} s, peak {peak / 1e6:.0f} MB: goal "
        f"(under {GOAL_SECONDS:.0f} s and {GOAL_BYTES / 1e9:.1f} GB) {'met' if met else 'missed'}"
    )


if __name__ == "__main__":
    main()
