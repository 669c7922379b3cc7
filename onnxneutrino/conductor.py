"""The conductor: load, normalize, mark, calibrate, search, verify, save (Deeplite Neutrino, AAAI 2021)."""

from __future__ import annotations

import dataclasses
import hashlib
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
from onnxneutrino.bench import Candidate, Settings
from onnxneutrino.chain_latency import LatencyTable, measure
from onnxneutrino.choice import choose
from onnxneutrino.clock import now, recording
from onnxneutrino.config import Config
from onnxneutrino.data import Dataset, Deciding, Inputs, deciding
from onnxneutrino.errors import ModelError, OutputError, TrainingError
from onnxneutrino.events import Event
from onnxneutrino.figures import figures, rest_cost
from onnxneutrino.formats import format_metric
from onnxneutrino.graph import check, check_writable, load, save
from onnxneutrino.layer_options import GOAL, Objective, Target
from onnxneutrino.normalize import normalize
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.report import CandidateRow, Report, TargetRow
from onnxneutrino.runtime import Runner, random_inputs, runtime_conflict
from onnxneutrino.search import search
from onnxneutrino.summary import candidate_line, candidate_row, make_report, with_file_size
from onnxneutrino.target_search import search_targets
from onnxneutrino.task import FineTune, Marked, Network, Task, build, trainable_initializers
from onnxneutrino.training_plan import plan_training
from onnxneutrino.workbench import Workbench

Tell = Callable[[Event], None]
CALIBRATION_SHARE = 0.1
LATENCY_SHARE = 0.03
LARGE_DROP = 0.1  # of the original's metric
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
    """The time of a run: its phases, and what is left."""

    def __init__(self, limit: float, tell: Tell) -> None:
        self._start = time.perf_counter()
        self._begun = now()
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
        """Seconds until the limit, a reading that decides."""
        return self._limit - (now() - self._begun)

    def phase(self, name: str) -> None:
        """Close the current phase and begin `name`."""
        time_now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time_now - self._phase_start
        self._phase, self._phase_start = name, time_now
        self.tell("")

    def tell(self, detail: str, message: str = "") -> None:
        """Show where the run is, and a message that stays."""
        self._tell(Event(self._phase, detail, self.elapsed, max(self._limit - self.elapsed, 0.0), message))


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
    with threadpool_limits(limits=1, user_api="blas"), recording(config.clock) as tape:
        result = _compress(model, config, name, size_bytes, tell)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, clock=tuple(tape.readings)))


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
    start = now()
    rows = prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched)
    evaluation_seconds = now() - start
    value = metrics.value(metric, rows)
    prepare.check_not_chance(value, metric, opened, config)
    clock.tell("", f"{name}: {metric.name} {format_metric(value)} on {len(rows)} test examples")
    objective = make_objective(marked, config, judges, clock)
    task = make_task(marked, config, metric, dataset, judges, rows, batch, objective)
    settings = Settings(
        delta=config.largest_drop,
        z=NormalDist().inv_cdf(config.confidence),
        stage=config.stage,
        time_limit=config.time_limit,
        train=config.trainer != "none",
        dry_run=config.dry_run,
        seed=config.seed,
        goal=GOAL if config.limits else 0.0,
        large_drop=LARGE_DROP * abs(value),
    )
    reserve = VERIFICATIONS * evaluation_seconds + VERIFY_SECONDS
    found = Found()
    if isinstance(objective, tuple) and max(figures(task, objective, {})) <= GOAL:
        clock.tell("", f"{name} meets all hard targets as it is")
    else:
        if settings.train:
            clock.phase("check gradients")
            task = with_training(task, config, warnings)
        found = _searched(task, dataclasses.replace(settings, train=task.training is not None), value, reserve, clock)
    clock.phase("verify")
    warnings.extend(found.warnings)
    chosen = choose(found.candidates, settings, task, rows, judges, opened.model, warnings)
    report = make_report(
        opened,
        marked,
        config,
        task,
        judges,
        chosen,
        rows,
        size_bytes,
        found.rows,
        found.fine_tunes,
        tuple(warnings),
    )
    least = found.least or [None] * len(config.limits)
    targets = tuple(TargetRow(*limit, own) for limit, own in zip(config.limits.items(), least, strict=True))
    clock.phase("")
    final = None if config.dry_run else build(task, chosen.network)
    report = dataclasses.replace(report, targets=targets, seconds=clock.seconds)
    return Result(final, report, opened.shapes, chosen.network)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found; `least` is what the smallest plan has of each hard target's cost."""

    candidates: tuple[Candidate, ...] = ()
    rows: tuple[CandidateRow, ...] = ()
    fine_tunes: tuple[FineTune, ...] = ()
    least: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()


def _searched(task: Task, settings: Settings, value: float, reserve: float, clock: Clock) -> Found:
    """Calibrate and search; `value` is the original's metric, `reserve` the seconds that verification takes."""
    warnings = large.notes(task.layers, task.training is not None)
    clock.phase("calibrate")
    bench = Workbench(task, CALIBRATION_SHARE * settings.time_limit, lambda what, share: clock.tell(what))
    clock.phase("search")
    tried: list[CandidateRow] = []

    def note(candidate: Candidate, ok: bool) -> None:
        tried.append(candidate_row(candidate, ok, task, value))
        clock.tell("", candidate_line(candidate, ok, bench.full_cost))

    find = search_targets if settings.goal else search
    candidates = find(bench, settings, lambda: clock.left - reserve, note)
    tuner = bench.tuner
    warnings = [*warnings, *tuner.warnings]
    if settings.train and not (settings.dry_run or tuner.fine_tunes or tuner.warnings):
        warnings.append(f"no network was fine-tuned: --time-limit {settings.time_limit:g}s left no time; give more")
    least = bench.least_of_targets if settings.goal else ()
    return Found(tuple(candidates), tuple(tried), tuple(tuner.fine_tunes), least, tuple(warnings))


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
    objective: Objective | None = None,
) -> Task:
    """Put together what stands fixed during the search; without an objective it is the name that `config` has."""
    if judges.select_rows is not None:
        original_rows = rows[judges.select_rows]
    else:
        original_rows = prepare.evaluate(marked.batched, judges.select, metric, batch, config.threads, marked.batched)
    objective = config.objective if objective is None else objective
    if isinstance(objective, tuple):
        rest = sum(target.rest / target.limit for target in objective)
    else:
        rest = rest_cost(marked, objective)
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
        delta=config.largest_drop,
        objective=objective,
        rest=rest,
        batch=min(prepare.training_batch(marked.model, marked.types), len(dataset.train)) if marked.freed else 1,
        evaluation_batch=batch,
        threads=config.threads,
        seed=config.seed,
        labels=config.labels,
    )


def make_objective(marked: Marked, config: Config, judges: Deciding, clock: Clock) -> Objective:
    """What costs are counted in: the hard targets, else the objective; latencies are measured where they count."""
    names = tuple(config.limits) or (config.objective,)
    units: dict[str, str | LatencyTable] = {name: name for name in names}
    if "latency" in names:
        clock.phase("measure latencies")
        example, seconds = prepare.first_examples(judges.select, 1)[0], LATENCY_SHARE * config.time_limit
        units["latency"] = measure(marked.model, marked.layers, example, config.threads, seconds)
    if not config.limits:
        return units[config.objective]
    return tuple(
        Target(name, limit, units[name], rest_cost(marked, units[name])) for name, limit in config.limits.items()
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
        report = dataclasses.replace(report, sha256=hashlib.sha256(target.read_bytes()).hexdigest())
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
