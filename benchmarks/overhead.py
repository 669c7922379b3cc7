"""Measure what compression costs besides training: seconds and peak memory of each phase.

Load, normalize, calibrate, fit every form on every layer, allocate, make the factors, write: in a process of its
own, so that the peak memory is that of these phases. Inputs are random normal values. Goal for the VGG-19 of
`vgg19.py` on 256 inputs: under 60 s and 1.5 GB.

    python benchmarks/overhead.py vgg19.onnx [--images 256] [--ratio 10] [--json -]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from onnxneutrino import heap, metrics, prepare
from onnxneutrino.allocate import allocate
from onnxneutrino.candidates import Point, candidates, options
from onnxneutrino.conductor import make_task, mark, whole_cost
from onnxneutrino.config import Config, load_config
from onnxneutrino.data import Dataset, deciding
from onnxneutrino.graph import load, save
from onnxneutrino.layer_options import LayerOptions, chains, cost_unit
from onnxneutrino.plan import FORMS
from onnxneutrino.task import Marked, Network, Task, build
from onnxneutrino.workbench import Workbench

SAMPLES = 3
GOAL_SECONDS = 60.0
GOAL_BYTES = 1.5e9


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


def main() -> None:
    """Run the measurement in a child process and print its table, or its JSON."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of compression besides training.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=10.0, help="how many times fewer parameters to allocate for")
    parser.add_argument("--metric", choices=("agreement", "mse"), default="agreement", help="mse: no curvature")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON too; - for standard output")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        heap.return_large_blocks()  # as the command line does
        with threadpool_limits(limits=1, user_api="blas"):  # as `compress` does
            result = measure(arguments.model, arguments.child, arguments.images, arguments.ratio, arguments.metric)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out.onnx"))
        command = [sys.executable, __file__, *sys.argv[1:], "--child", output]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.returncode)
    result = {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": wall}
    if arguments.json == "-":
        print(json.dumps(result, indent=2))
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    peak = result["phases"][-1]["peak_bytes"]
    met = wall < GOAL_SECONDS and peak < GOAL_BYTES
    print(
        f"\n{result['model']}: {result['layers']} layers, {result['params']} to {result['params_allocated']} "
        f"parameters; wall time with imports {wall:.1f} s, peak {peak / 1e6:.0f} MB: goal "
        f"(under {GOAL_SECONDS:.0f} s and {GOAL_BYTES / 1e9:.1f} GB) {'met' if met else 'missed'}"
    )


if __name__ == "__main__":
    main()
