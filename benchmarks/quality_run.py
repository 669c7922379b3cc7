"""One cell of the table `quality`: one method on one network, in a process of its own; see quality.py.

All methods but the reference run through `onnxneutrino.delivery.compress_file`, so that clock, search, acceptance,
verification and report are the same; a baseline stands in the place of the workbench.

    python benchmarks/quality_run.py METHOD MODEL.onnx OUTPUT.onnx RESULT.json --minutes 8 ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from baseline_bench import Baseline, Method, UniformSvd, VbmfTucker
from baseline_greedy import GreedySpatial
from cells import machine, write_row
from threadpoolctl import threadpool_limits

from onnxneutrino import conductor, cost, delivery, metrics, prepare, search
from onnxneutrino.config import Config, load_config
from onnxneutrino.data import deciding
from onnxneutrino.events import Event
from onnxneutrino.graph import load, save
from onnxneutrino.marking import mark
from onnxneutrino.phases import Phases
from onnxneutrino.report import Report
from onnxneutrino.runtime import Runner
from onnxneutrino.summary import interval, measured_latencies, trainings, versions
from onnxneutrino.task import Network, Task, build
from onnxneutrino.tuning import Tuner

PLAIN: dict[str, Callable[[Task], Sequence[Method]]] = {
    "svd": lambda task: [UniformSvd(task)],
    "vbmf": lambda task: [VbmfTucker(task, weakened) for weakened in (False, True)],
    "greedy": lambda task: [GreedySpatial(task)],
}
# Weights truncated or removed without a fit to data and a refit lose far more before training, and get most of it back:
# for the baselines the search looks at all of the untrained drop, and begins where ten delta are lost.
WIDE = {"LADDER_END": 80.0, "FIRST_LEFT": 0.07}


def main() -> None:
    """Run the cell and write its JSON."""
    parser = argparse.ArgumentParser(description="One method on one network.")
    parser.add_argument("method", choices=("ours", "teacher", *PLAIN, "pruning", "reference"))
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--objective", choices=("params", "macs"), required=True)
    parser.add_argument("--delta", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    config = load_config(
        options.model,
        {
            "time_limit": 60 * options.minutes,
            "objective": options.objective,
            "delta": options.delta,
            "seed": options.seed,
            "threads": options.threads,
            "labels": options.method != "teacher",
        },
    )
    start = time.perf_counter()
    row = cell(options.method, options.model, options.target, config)
    row["seconds"] = time.perf_counter() - start
    row["machine"] = machine(options.threads)
    write_row(options.result, row)


def cell(method: str, model: Path, target: Path, config: Config) -> dict[str, Any]:
    """What a method made of a network, as the table needs it."""
    if method == "reference":
        return reference(model, target, config)
    with baseline(method, model):
        report = delivery.compress_file(model, target, config, tell)
    return row_of(report)


@contextlib.contextmanager
def baseline(method: str, model: Path) -> Iterator[None]:
    """A baseline in the place of what `compress_file` makes its search with; nothing for our own method."""
    with contextlib.ExitStack() as stack:
        if method in (*PLAIN, "pruning"):
            for name, value in WIDE.items():
                stack.enter_context(mock.patch.object(search, name, value))
        if method == "pruning":
            import baseline_pruning

            stack.enter_context(baseline_pruning.in_place(model))
        if method in PLAIN:

            def made(
                task: Task, seconds: float, tell: Callable[[str, float], None], *_: object, **__: object
            ) -> Baseline:
                return Baseline(task, tell, PLAIN[method])

            stack.enter_context(mock.patch.object(conductor, "Workbench", made))
        yield


def row_of(report: Report) -> dict[str, Any]:
    """The columns of the table, and the whole report."""
    last = report.stage2 or report.stage1
    assert last is not None
    return {
        "original": dataclasses.asdict(report.original),
        "result": dataclasses.asdict(last),
        "drop": report.drop,
        "drop_interval": None if report.drop_interval is None else dataclasses.asdict(report.drop_interval),
        "compressed": report.compressed,
        "versions": {**report.versions, **other_versions()},
        "report": json.loads(report.to_json()),
    }


def reference(model: Path, target: Path, config: Config) -> dict[str, Any]:
    """The original fine-tuned for the whole time with the same loss, and its drop on the test split."""
    with threadpool_limits(limits=1, user_api="blas"):
        clock = Phases(config.time_limit, tell)
        given = load(model)
        opened = prepare.open_model(given.model, model.name, config)
        config, metric, dataset = prepare.settled(opened, config)
        judges = deciding(dataset, config.seed, config.data.path)
        samples = prepare.first_examples(dataset.test, conductor.SAMPLES)
        marked = mark(opened, samples, config)
        batch = prepare.evaluation_batch(opened) if marked.freed else 1
        start = time.perf_counter()
        rows = prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched)
        measuring = time.perf_counter() - start
        warnings: list[str] = []
        task = conductor.make_task(marked, config, metric, dataset, judges, rows, batch)
        task = conductor.with_training(task, config, warnings)
        tuner = Reference(task, Runner(task.batched, task.loss.outputs, threads=task.threads), None, _silent)
        left = clock.left - measuring - conductor.VERIFY_SECONDS
        trained = tuner.tuned(Network(), left, "reference") if task.training is not None and left > 0 else None
        network = trained or Network()
        own = prepare.evaluate(
            build(task, network, batched=True), judges.test, metric, batch, config.threads, marked.batched
        )
        made = build(task, network)
        save(made, target, given.external)
        sample = prepare.first_examples(judges.test, 1)[0]
        times = measured_latencies([opened.model, made], sample, config.threads)
    drop = interval(metric, rows, own, config.seed)
    before, after = (
        {
            "metric": metrics.value(metric, scores),
            "params": cost.params(graph),
            "size_bytes": cost.size_bytes(path),
            "macs": cost.macs(graph, prepare.types_of(graph, opened.shapes)),
            "latency_ms": latency,
        }
        for scores, graph, path, latency in (
            (rows, opened.model, model, times[0]),
            (own, made, target, times[1]),
        )
    )
    return {
        "original": before,
        "result": after,
        "drop": drop.value,
        "drop_interval": dataclasses.asdict(drop),
        "compressed": False,
        "versions": {**versions(), **other_versions()},
        "report": {
            "warnings": [*warnings, *tuner.warnings],
            "training": [dataclasses.asdict(own) for own in trainings(tuner.fine_tunes, config.threads)],
        },
    }


class Reference(Tuner):
    """Keeps what was trained whatever its metric becomes."""

    def _better(self, before: Network, after: Network) -> Network:
        return after


def other_versions() -> dict[str, str]:
    """Versions of what only a baseline needs, where it is there."""
    found = {}
    for name in ("torch", "torch-pruning"):
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def _silent(what: str, share: float) -> None:
    """Hear of progress and say nothing."""


def tell(event: Event) -> None:
    """Write messages that stay to standard error."""
    if event.message:
        print(f"{event.elapsed:7.1f} s  {event.message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
