"""The conductor: load, normalize, mark, calibrate, search, verify, save (Deeplite Neutrino, AAAI 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto
from threadpoolctl import threadpool_limits

from onnxneutrino import large, metrics, prepare
from onnxneutrino.agreement import EXAMPLES, compared
from onnxneutrino.bench import Candidate, Settings
from onnxneutrino.blocks import Block
from onnxneutrino.chain_latency import LatencyTable, measure
from onnxneutrino.choice import choose
from onnxneutrino.clock import now, recording
from onnxneutrino.config import Config
from onnxneutrino.data import Dataset, Deciding, deciding
from onnxneutrino.errors import TrainingError
from onnxneutrino.external import load_external
from onnxneutrino.figures import figures, rest_cost, total_cost
from onnxneutrino.formats import format_metric
from onnxneutrino.hooks import Hooks
from onnxneutrino.journal import UNKEPT, Journal
from onnxneutrino.layer_options import GOAL, Objective, Target
from onnxneutrino.marking import mark, narrow
from onnxneutrino.own_loss import OwnLoss, load_loss, prepared
from onnxneutrino.phases import Phases, Tell
from onnxneutrino.report import REFUSED, CandidateRow, Report, Sensitivity, TargetRow
from onnxneutrino.runtime import Runner, runtime_conflict
from onnxneutrino.search import search
from onnxneutrino.summary import candidate_row, candidate_told, frozen_told, make_report, sensitivity_rows
from onnxneutrino.target_search import search_targets
from onnxneutrino.task import FineTune, Marked, Network, Task, build, trainable_initializers
from onnxneutrino.training_plan import TrainingPlan, plan_training
from onnxneutrino.workbench import Workbench

CALIBRATION_SHARE = 0.1
LATENCY_SHARE = 0.03


LARGE_DROP, LEAST_DELTA = 0.1, 0.001  # of the original's metric
SAMPLES = 3
VERIFICATIONS = 3
VERIFY_SECONDS = 5.0
LARGE = "so large a model keeps no journal: --resume starts its search anew"


@dataclass(frozen=True, eq=False)
class Result:
    """What a run ended with.

    Attributes:
        model: the compressed network; None after a dry run.
        report: what the run found; its `to_json` is `report.json`.
        shapes: of the inputs at batch 1 during the run.
        network: of a large model, whose tensors lie in files that go with it.
    """

    model: ModelProto | None
    report: Report
    shapes: Mapping[str, tuple[int, ...]]
    network: Network | None = None


def compress(
    model: ModelProto,
    config: Config,
    *,
    name: str = "model",
    size_bytes: int | None = None,
    tell: Tell = lambda event: None,
    journal: Journal = UNKEPT,
) -> Result:
    """Compress a model.

    Args:
        model: as it was given.
        config: what the user asked for.
        name: how messages and the report call the model.
        size_bytes: of the model on disk; None for its size in memory.
        tell: progress.
        journal: of the run, which goes on from there.

    Raises:
        NeutrinoError: see `errors`.
    """
    # Layers are worked on side by side, each with one thread: the linear algebra libraries' own threads wait for
    # each other in a loop, which on cores shared with anything else costs several times what it saves.
    recorded, onward = (journal.readings, True) if config.clock is None else (config.clock, False)
    with threadpool_limits(limits=1, user_api="blas"), recording(recorded, onward) as tape:
        result = _compress(model, config, name, size_bytes, tell, journal)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, clock=tuple(tape.readings)))


def _compress(
    model: ModelProto, config: Config, name: str, size_bytes: int | None, tell: Tell, journal: Journal
) -> Result:
    clock = Phases(config.time_limit, tell, lambda: journal.seconds)
    clock.phase("load")
    conflict = runtime_conflict()
    warnings = [conflict] if conflict else []
    opened = prepare.open_model(model, name, config)
    prepare.check_main_graph(opened)
    hooks, external, own = Hooks(config.train), load_external(config.trainer), load_loss(config.train.loss)
    config, metric, dataset = prepare.settled(opened, config)
    judges = deciding(dataset, config.seed, config.data.path)
    warnings.extend(dataset.warnings)
    clock.phase("normalize")
    samples = prepare.first_examples(dataset.test, SAMPLES)
    marked = mark(opened, samples, config)
    if not marked.layers:
        raise prepare.without_layers(name, marked.frozen)
    for told in (*marked.notes, *frozen_told(marked.frozen)):
        clock.say(told, aside=True)
    clock.phase("measure the original")
    batch = prepare.evaluation_batch(opened) if marked.freed else 1
    start = now()
    rows = journal.step(
        "the original's metric",
        lambda: prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched),
    )
    evaluation_seconds = now() - start
    value = metrics.value(metric, rows)
    prepare.check_not_chance(value, metric, opened, config)
    clock.say(f"{name}: {metric.name} {format_metric(value)} on {len(rows)} test examples")
    task = make_task(marked, config, metric, dataset, judges, rows, batch)
    narrowed = narrow(marked, samples, config, task, clock, journal)
    objective = make_objective(narrowed, config, judges, clock, journal)
    task = dataclasses.replace(with_objective(task, marked, narrowed, objective), external=external)
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
        least_delta=LEAST_DELTA * abs(value),
    )
    verifications = VERIFICATIONS + 2 * min(EXAMPLES / len(rows), 1)  # the last two: original and result compared
    reserve = verifications * evaluation_seconds + VERIFY_SECONDS
    found = Found()
    if isinstance(objective, tuple) and task.full_cost is not None and task.full_cost <= GOAL:
        clock.say(f"{name} meets all hard targets as it is")
    else:
        if settings.train:
            clock.phase("check gradients")
            task = with_training(task, config, warnings, own, journal)
        settings = dataclasses.replace(settings, train=task.training is not None)
        if large.is_large(task.layers):  # its arrays lie in temporary files
            if journal is not UNKEPT:
                warnings.append(LARGE)
            journal = UNKEPT
        found = _searched(task, settings, reserve, clock, hooks, journal)
    clock.phase("verify")
    warnings.extend((*found.warnings, *journal.warnings))
    chosen = choose(found.candidates, settings, task, rows, judges, opened.model, warnings)
    if chosen.final is None:  # the original is written, with all of its channels
        narrowed, task = marked, with_objective(task, marked, marked, objective)
    report = make_report(
        opened,
        marked,
        narrowed,
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
    if chosen.final is not None:
        made = build(task, chosen.network, batched=True)
        alike = compared(marked.batched, made, judges.test, metric, batch, config.threads)
        report = dataclasses.replace(report, agreement=alike)
    clock.phase("")
    final = None if config.dry_run else build(task, chosen.network)
    report = dataclasses.replace(report, targets=targets, sensitivities=found.sensitivities, seconds=clock.seconds)
    return Result(final, report, opened.shapes, chosen.network)


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found; `least` is what the smallest plan has of each hard target's cost."""

    candidates: tuple[Candidate, ...] = ()
    rows: tuple[CandidateRow, ...] = ()
    fine_tunes: tuple[FineTune, ...] = ()
    least: tuple[float, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    warnings: tuple[str, ...] = ()


def _searched(task: Task, settings: Settings, reserve: float, clock: Phases, hooks: Hooks, journal: Journal) -> Found:
    """Calibrate and search; `reserve` is the seconds that verification takes."""
    warnings = large.notes(task.layers, task.training is not None)
    clock.phase("calibrate")
    seconds = CALIBRATION_SHARE * settings.time_limit

    def before(candidate: Candidate) -> None:
        if task.recipe.before:
            model = partial(build, task, candidate.network)
            journal.step("before a candidate", lambda: hooks.before(candidate, bench.full_cost, model))

    bench = Workbench(task, seconds, lambda what, share: clock.tell(what), clock.watch, before=before, journal=journal)
    clock.say(f"calibrated {len(task.layers)} layers on {bench.calibration_images} inputs", aside=True)
    clock.phase("search")
    tried: list[CandidateRow] = []

    def note(candidate: Candidate, ok: bool) -> bool:
        model = partial(build, task, candidate.network)
        refused = bool(task.recipe.after) and journal.step(
            "after a candidate", lambda: hooks.after(candidate, bench.full_cost, ok, model)
        )
        ok = ok and not refused
        smallest = ok and not any(row.accepted and row.cost <= candidate.cost for row in tried)
        tried.append(candidate_row(candidate, ok, task, task.recipe.after if refused else ""))
        told = candidate_told(candidate, bench.full_cost)
        verdict = f"{REFUSED}{task.recipe.after}" if refused else "accepted" if ok else "refused"
        clock.say(f"{candidate.name}: {told}, {verdict}", best=told if smallest else "")
        if smallest:
            journal.best(model, told)
        return not refused

    find = search_targets if settings.goal else search
    candidates = find(bench, settings, lambda: clock.left - reserve, note)
    tuner = bench.tuner
    warnings = [*warnings, *tuner.warnings, *hooks.warnings]
    if settings.train and not (settings.dry_run or tuner.fine_tunes or tuner.warnings):
        warnings.append(f"no network was fine-tuned: --time-limit {settings.time_limit:g}s left no time; give more")
    for own in tuner.fine_tunes:
        how = f"{own.steps} steps of {own.batch}, learning rate {own.learning_rate:.2g}" if own.steps else "elsewhere"
        clock.say(f"{own.name}: {how}", aside=True)
    least = bench.least_of_targets if settings.goal else ()
    curves = sensitivity_rows(bench.known_sensitivities)
    return Found(tuple(candidates), tuple(tried), tuple(tuner.fine_tunes), least, curves, tuple(warnings))


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
        rest=_rest(marked, objective),
        batch=min(prepare.training_batch(marked.model, marked.types), len(dataset.train)) if marked.freed else 1,
        evaluation_batch=batch,
        threads=config.threads,
        seed=config.seed,
        labels=config.labels,
        recipe=config.train,
    )


def with_objective(task: Task, marked: Marked, narrowed: Marked, objective: Objective) -> Task:
    """The task that makes the narrowed graph small, while the original teaches and is what costs are compared with."""
    whole = dataclasses.replace(task, objective=objective, rest=_rest(narrowed, objective))
    if isinstance(objective, tuple):
        full = float(max(figures(whole, objective, {})))
    else:
        full = total_cost(marked.model, marked.types, objective)
    return dataclasses.replace(
        whole,
        model=narrowed.model,
        batched=narrowed.batched,
        types=narrowed.types,
        layers=narrowed.layers,
        trainable=tuple(trainable_initializers(narrowed)),
        teacher=None if narrowed is marked else marked.batched,
        full_cost=full,
    )


def _rest(marked: Marked, objective: Objective) -> float:
    if isinstance(objective, tuple):
        return float(sum(target.rest / target.limit for target in objective))
    return rest_cost(marked, objective)


def make_objective(
    marked: Marked, config: Config, judges: Deciding, clock: Phases, journal: Journal = UNKEPT
) -> Objective:
    """What costs are counted in: the hard targets, else the objective; latencies are measured where they count."""
    names = tuple(config.limits) or (config.objective,)
    units: dict[str, str | LatencyTable] = {name: name for name in names}
    if "latency" in names:
        clock.phase("measure latencies")
        example, seconds = prepare.first_examples(judges.select, 1)[0], LATENCY_SHARE * config.time_limit
        units["latency"] = journal.step(
            "latencies", lambda: measure(marked.model, marked.layers, example, config.threads, seconds)
        )
    if not config.limits:
        return units[config.objective]
    return tuple(
        Target(name, limit, units[name], rest_cost(marked, units[name])) for name, limit in config.limits.items()
    )


def with_training(
    task: Task, config: Config, warnings: list[str], own: OwnLoss | None = None, journal: Journal = UNKEPT
) -> Task:
    """The task with the way in which it is trained; without one, and a warning, where nothing can be.

    Raises:
        TrainingError: nothing can be trained in the way that the user asks for.
    """
    if task.external is not None:
        if large.is_large(task.layers):
            raise TrainingError(f"{task.external.name}: too large a model to be handed on; use --trainer reconstruct")
        whole = Block(tuple(layer.name for layer in task.layers), task.loss.outputs, reconstructed=False)
        return dataclasses.replace(task, training=TrainingPlan(task.loss, (whole,)))
    first = next(iter(task.train.batches(task.batch, seed=task.seed, augment=True)))
    loss, labels = task.loss, first.targets if task.labels else None
    if own is not None:
        names = prepare.float_outputs(task.model, task.types)
        outputs = Runner(task.batched, names, threads=task.threads)(first.inputs)
        loss = prepared(own, dict(zip(names, outputs, strict=True)), labels, task.threads)
    try:
        plan = journal.step(
            "gradients",
            lambda: plan_training(
                task.batched,
                task.types,
                task.layers,
                task.trainable,
                loss,
                first.inputs,
                batch=task.batch,
                reconstruct=config.trainer == "reconstruct",
                threads=task.threads,
                labels=labels,
            ),
        )
    except TrainingError as error:
        if own is not None:
            raise
        warnings.append(f"nothing is fine-tuned, factors and refit only: {error}")
        return task
    warnings.extend(plan.warnings)
    return dataclasses.replace(task, training=plan)
