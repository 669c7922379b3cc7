"""The conductor: load, normalize, mark, calibrate, search, verify, save (Deeplite Neutrino, AAAI 2021)."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from threadpoolctl import threadpool_limits

from onnxneutrino import cost, large, metrics, prepare
from onnxneutrino.candidates import whole_point
from onnxneutrino.chain_latency import LatencyTable, measure
from onnxneutrino.config import Config
from onnxneutrino.data import Dataset, Deciding, Inputs, deciding
from onnxneutrino.errors import ModelError, OutputError, TrainingError
from onnxneutrino.formats import format_metric
from onnxneutrino.graph import TensorType, check, check_writable, load, save
from onnxneutrino.layer_options import Objective, cost_unit
from onnxneutrino.normalize import normalize
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.report import CandidateRow, Event, Report
from onnxneutrino.runtime import Runner, random_inputs, runtime_conflict
from onnxneutrino.search import Candidate, Settings, accepted, search
from onnxneutrino.summary import Chosen, candidate_line, candidate_row, make_report, with_file_size
from onnxneutrino.task import Marked, Network, Task, build, trainable_initializers
from onnxneutrino.training_plan import plan_training
from onnxneutrino.weights import stored_bytes
from onnxneutrino.workbench import Workbench

Tell = Callable[[Event], None]
CALIBRATION_SHARE = 0.1
LATENCY_SHARE = 0.03
SAMPLES = 3
VERIFICATIONS = 3
VERIFY_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Result:
    """The compressed model (None after a dry run), the report, and the inputs' shapes at batch 1 during the run."""

    model: ModelProto | None
    report: Report
    shapes: Mapping[str, tuple[int, ...]]
    network: Network | None = None  # large tensors of the model lie in files that go with it


class Clock:
    """The time of a run: read at its phases, never inside a decision about the model."""

    def __init__(self, limit: float, tell: Tell) -> None:
        self._start = time.perf_counter()
        self._limit = limit
        self._tell = tell
        self._phase = ""
        self._phase_start = self._start
        self.seconds: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._limit - self.elapsed

    def phase(self, name: str) -> None:
        """Close the current phase and begin `name`."""
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._phase_start
        self._phase, self._phase_start = name, now
        self.tell("")

    def tell(self, detail: str, message: str = "") -> None:
        """Show where the run is, and a message that stays."""
        self._tell(Event(self._phase, detail, self.elapsed, max(self.left, 0.0), message))


def compress(
    model: ModelProto,
    config: Config,
    *,
    name: str = "model",
    size_bytes: int | None = None,
    tell: Tell = lambda event: None,
) -> Result:
    """Compress a model.

    Args:
        model: as it was given.
        config: what the user asked for.
        name: how messages and the report call the model.
        size_bytes: of the model on disk; None for its size in memory.
        tell: progress.

    Raises:
        NeutrinoError: see `errors`.
    """
    # Layers are worked on side by side, each with one thread: the linear algebra libraries' own threads wait for
    # each other in a loop, which on cores shared with anything else costs several times what it saves.
    with threadpool_limits(limits=1, user_api="blas"):
        return _compress(model, config, name, size_bytes, tell)


def _compress(model: ModelProto, config: Config, name: str, size_bytes: int | None, tell: Tell) -> Result:
    clock = Clock(config.time_limit, tell)
    clock.phase("load")
    conflict = runtime_conflict()
    warnings = [conflict] if conflict else []
    opened = prepare.open_model(model, name, config)
    prepare.check_main_graph(opened)
    config, metric, dataset = prepare.settled(opened, config)
    judges = deciding(dataset, config.seed, config.data.path)
    warnings.extend(dataset.warnings)
    clock.phase("normalize")
    samples = prepare.first_examples(dataset.test, SAMPLES)
    marked = mark(opened, samples, config)
    if not marked.layers:
        raise prepare.without_layers(name, marked.frozen)
    clock.phase("measure the original")
    batch = prepare.evaluation_batch(opened) if marked.freed else 1
    start = time.perf_counter()
    rows = prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched)
    evaluation_seconds = time.perf_counter() - start
    value = metrics.value(metric, rows)
    prepare.check_not_chance(value, metric, opened, config)
    clock.tell("", f"{name}: {metric.name} {format_metric(value)} on {len(rows)} test examples")
    task = make_task(marked, config, metric, dataset, judges, rows, batch)
    if config.trainer != "none":
        clock.phase("check gradients")
        task = with_training(task, config, warnings)
    warnings.extend(large.notes(task.layers, task.training is not None))
    clock.phase("calibrate")
    bench = Workbench(task, CALIBRATION_SHARE * config.time_limit, lambda what, share: clock.tell(what))
    reserve = VERIFICATIONS * evaluation_seconds + VERIFY_SECONDS
    settings = Settings(
        delta=config.delta,
        z=NormalDist().inv_cdf(config.confidence),
        stage=config.stage,
        time_limit=config.time_limit,
        train=task.training is not None,
        dry_run=config.dry_run,
        seed=config.seed,
    )
    clock.phase("search")
    tried: list[CandidateRow] = []

    def note(candidate: Candidate, ok: bool) -> None:
        tried.append(candidate_row(candidate, ok, task, value))
        clock.tell("", candidate_line(candidate, ok, bench.full_cost))

    candidates = search(bench, settings, lambda: clock.left - reserve, note)
    clock.phase("verify")
    warnings.extend(bench.tuner.warnings)
    if settings.train and not (config.dry_run or bench.tuner.fine_tunes or bench.tuner.warnings):
        warnings.append(f"no network was fine-tuned: --time-limit {config.time_limit:g}s left no time; give more")
    chosen = choose(candidates, settings, task, rows, judges, warnings)
    report = make_report(
        opened,
        marked,
        config,
        task,
        judges,
        chosen,
        rows,
        size_bytes,
        tuple(tried),
        bench.tuner.fine_tunes,
        tuple(warnings),
    )
    clock.phase("")
    final = None if config.dry_run else build(task, chosen.network)
    return Result(final, dataclasses.replace(report, seconds=clock.seconds), opened.shapes, chosen.network)


def mark(opened: prepare.Opened, samples: Sequence[Inputs], config: Config) -> Marked:
    """Normalize the graph, free its batch and list its layers."""
    model, notes = normalize(opened.model, samples, _runs(config.threads))
    types = prepare.types_of(model, opened.shapes)
    found = find_layers(model, types, config.exclude, config.only)
    batched, freed = prepare.free(model, samples, config.threads)
    return Marked(
        opened=opened,
        model=model,
        batched=batched,
        notes=tuple(notes),
        types=types,
        layers=tuple(layer for layer in found if isinstance(layer, Layer)),
        frozen=tuple(layer for layer in found if isinstance(layer, Frozen)),
        order=tuple(layer.name for layer in found),
        freed=freed,
    )


def _runs(threads: int) -> Callable[[ModelProto, Inputs], list[NDArray[Any]]]:
    """Run a graph on inputs; the session is kept until another graph comes, for building one takes longer."""
    kept: list[tuple[ModelProto, Runner]] = []

    def run(graph: ModelProto, inputs: Inputs) -> list[NDArray[Any]]:
        if not kept or kept[0][0] is not graph:
            kept.clear()
            kept.append((graph, Runner(graph, threads=threads)))
        return kept[0][1](inputs)

    return run


def make_task(
    marked: Marked,
    config: Config,
    metric: metrics.Metric,
    dataset: Dataset,
    judges: Deciding,
    rows: NDArray[Any],
    batch: int,
) -> Task:
    """Put together what stands fixed during the search."""
    if judges.select_rows is not None:
        original_rows = rows[judges.select_rows]
    else:
        original_rows = prepare.evaluate(marked.batched, judges.select, metric, batch, config.threads, marked.batched)
    objective: Objective = config.objective
    if objective == "latency":
        example, seconds = prepare.first_examples(judges.select, 1)[0], LATENCY_SHARE * config.time_limit
        objective = measure(marked.model, marked.layers, example, config.threads, seconds)
    whole = sum(whole_cost(layer, objective) for layer in marked.layers)
    return Task(
        model=marked.model,
        batched=marked.batched,
        types=marked.types,
        layers=marked.layers,
        trainable=tuple(trainable_initializers(marked)),
        loss=prepare.choose_loss(marked.model, marked.types, config),
        metric=metric,
        train=dataset.train,
        stop=dataset.stop,
        select=judges.select,
        original_rows=original_rows,
        objective=objective,
        rest=total_cost(marked.model, marked.types, objective) - whole,
        batch=min(prepare.training_batch(marked.model, marked.types), len(dataset.train)) if marked.freed else 1,
        evaluation_batch=batch,
        threads=config.threads,
        seed=config.seed,
        labels=config.labels,
    )


def with_training(task: Task, config: Config, warnings: list[str]) -> Task:
    """The task with the way in which it is trained; without one, and a warning, where nothing can be."""
    first = next(iter(task.train.batches(task.batch, seed=task.seed, augment=True)))
    try:
        plan = plan_training(
            task.batched,
            task.types,
            task.layers,
            task.trainable,
            task.loss,
            first.inputs,
            batch=task.batch,
            reconstruct=config.trainer == "reconstruct",
            threads=task.threads,
        )
    except TrainingError as error:
        warnings.append(f"nothing is fine-tuned, factors and refit only: {error}")
        return task
    warnings.extend(plan.warnings)
    return dataclasses.replace(task, training=plan)


def whole_cost(layer: Layer, objective: Objective) -> float:
    """Cost of a layer as it is, in the unit of the objective."""
    return cost_unit(layer, objective)(whole_point(layer))


def total_cost(model: ModelProto, types: Mapping[str, TensorType], objective: Objective) -> float:
    """Cost of a whole graph, in the unit that `cost_unit` counts layers in."""
    if isinstance(objective, LatencyTable):
        return objective.total
    if objective == "size":
        return float(stored_bytes(model))
    if objective == "memory":
        return float(cost.memory_bytes(model, types))
    if objective == "macs":
        return float(cost.macs(model, types))
    return float(cost.params(model))


def choose(
    candidates: Sequence[Candidate],
    settings: Settings,
    task: Task,
    rows: NDArray[Any],
    judges: Deciding,
    warnings: list[str],
) -> Chosen:
    """The smallest accepted candidate of each stage whose drop on the whole test split is within delta too."""

    def smallest_within(pool: Sequence[Candidate]) -> tuple[Candidate | None, NDArray[Any]]:
        for candidate in sorted(pool, key=lambda c: c.cost):
            own = prepare.evaluate(
                build(task, candidate.network, batched=True),
                judges.test,
                task.metric,
                task.evaluation_batch,
                task.threads,
                task.batched,
            )
            drop = metrics.drop(task.metric, rows, own, seed=task.seed)
            if drop.value <= settings.delta:
                return candidate, own
            warnings.append(
                f"{candidate.name} was accepted on the deciding images but drops {drop.value:.2f} on the whole "
                "test split; the next larger one was taken, so the test split took part in the selection"
            )
        return None, rows

    good = [candidate for candidate in candidates if accepted(candidate, settings)]
    early = [candidate for candidate in good if candidate.stage == 1]
    first, first_rows = smallest_within(early)
    if settings.stage == 1:
        return Chosen(first, first_rows, first, first_rows)
    later = [candidate for candidate in good if candidate.stage == 2 and (first is None or candidate.cost < first.cost)]
    second, second_rows = smallest_within(later)
    return Chosen(first, first_rows, second or first, second_rows if second else first_rows)


def compress_file(source: Path, target: Path, config: Config, tell: Tell = lambda event: None) -> Report:
    """Compress a file into a file, with the report beside it as `target.report.json`.

    Raises:
        NeutrinoError: nothing is written then.
    """
    if not config.dry_run:
        check_writable(target)
        report_path = target.with_suffix(".report.json")
        check_writable(report_path)
        if target.exists() and source.exists() and target.samefile(source):
            raise OutputError(f"{target}: is the input itself; give another output path")
    given = load(source)
    result = compress(given.model, config, name=source.name, size_bytes=cost.size_bytes(source), tell=tell)
    if result.model is None:
        return result.report
    temporary = report_path.with_name(f".{report_path.name}.tmp")
    try:
        # Before the model takes its place: where the disk cannot hold the report, nothing is written.
        _write(temporary, result.report, report_path)
        save(result.model, target, given.external)
        verify_file(target, result, config)
        report = with_file_size(result.report, cost.size_bytes(target))
        _write(temporary, report, report_path)
        os.replace(temporary, report_path)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _write(temporary: Path, report: Report, path: Path) -> None:
    try:
        temporary.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def verify_file(path: Path, result: Result, config: Config) -> None:
    """Load the written file again, check it and compare what it computes with the model that was measured.

    Raises:
        OutputError: the file does not give the same outputs; it is removed.
    """
    written = load(path).model
    model = result.model
    assert model is not None
    inputs = random_inputs(written, result.shapes, config.seed)
    names = [value.name for value in model.graph.output]
    try:
        check(written, path.name)
        got, wanted = Runner(path, threads=config.threads)(inputs), Runner(model, threads=config.threads)(inputs)
    except ModelError as error:
        path.unlink()
        raise OutputError(f"{path}: the written file does not run ({error}); it was removed") from error
    for name, a, b in zip(names, got, wanted, strict=True):
        if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            path.unlink()
            raise OutputError(f"{path}: output '{name}' of the written file differs; it was removed")
