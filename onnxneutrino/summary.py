"""From a finished search to the report: six metrics of each stage, drops with intervals, layers, candidates."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import cost, metrics, prepare
from onnxneutrino.bench import Candidate
from onnxneutrino.candidates import macs_of
from onnxneutrino.config import Config
from onnxneutrino.data import Deciding, Inputs
from onnxneutrino.formats import format_metric, format_ratio
from onnxneutrino.plan import Choice, Frozen, Layer
from onnxneutrino.report import (
    REFUSED,
    CandidateRow,
    CurvePoint,
    DecidingImages,
    Interval,
    LayerRow,
    Report,
    Sensitivity,
    SensitivityPoint,
    SixMetrics,
    TrainedBlock,
    Training,
    by_reason,
    enhancement,
)
from onnxneutrino.runtime import Runner, latencies
from onnxneutrino.sensitivity import Curve
from onnxneutrino.task import FineTune, Marked, Network, Task, build
from onnxneutrino.weights import stored_bytes

CURVE_POINTS = 60
LIBRARIES = ("onnxneutrino", "onnx", "onnxruntime-training-cpu", "onnxslim", "numpy", "scipy", "matplotlib")


def six_metrics(
    model: ModelProto, shapes: Mapping[str, tuple[int, ...]], value: float | None, size_bytes: int, latency_ms: float
) -> SixMetrics:
    """The six metrics of a model; costs are counted, metric and latency were measured."""
    types = prepare.types_of(model, shapes)
    return SixMetrics(
        metric=value,
        params=cost.params(model),
        size_bytes=size_bytes,
        macs=cost.macs(model, types),
        memory_bytes=cost.memory_bytes(model, types),
        latency_ms=latency_ms,
    )


def measured_latencies(models: Sequence[ModelProto], sample: Inputs, threads: int) -> list[float]:
    """Median latency in ms of each model on one example, measured in turn."""
    values, _ = latencies([Runner(model, threads=threads, spinning=True) for model in models], [sample] * len(models))
    return values


def interval(metric: metrics.Metric, original: NDArray[Any], own: NDArray[Any], seed: int) -> Interval:
    """A drop and its 95 % interval."""
    drop = metrics.drop(metric, original, own, seed=seed)
    return Interval(drop.value, drop.low, drop.high)


def candidate_row(candidate: Candidate, ok: bool, task: Task, refused_by: str = "") -> CandidateRow:
    """One line of the report's list of candidates; `refused_by` is the user's function that did."""
    drop = candidate.drop
    notes = [f"{REFUSED}{refused_by}"] if refused_by else []
    notes += [] if candidate.trained else [f"divergence {candidate.divergence:.4g}, untrained"]
    sign = 1.0 if task.metric.higher_is_better else -1.0
    original = metrics.value(task.metric, task.original_rows)  # on the images that decide, as the drop
    return CandidateRow(
        name=candidate.name,
        plan=plan_of(candidate.network),
        cost=candidate.cost,
        metric=None if drop is None else original - sign * drop.value,
        drop=None if drop is None else drop.value,
        trained=candidate.trained > 0,
        seconds=candidate.seconds,
        accepted=ok,
        note="; ".join(notes),
    )


def candidate_told(candidate: Candidate, full_cost: float) -> str:
    """A measured candidate in words: how much smaller, and what it loses."""
    drop = candidate.drop
    lost = "not measured" if drop is None else f"{format_metric(drop.value)} ± {format_metric(drop.standard_error)}"
    return f"{format_ratio(full_cost / candidate.cost)} smaller, drop {lost}"


def frozen_told(frozen: Sequence[Frozen]) -> list[str]:
    """One line for each reason why layers are frozen."""
    return [f"frozen, {reason}: {', '.join(names)}" for reason, names in by_reason(frozen).items()]


def sensitivity_rows(curves: Mapping[str, Curve]) -> tuple[Sensitivity, ...]:
    """The measured curves of all layers."""
    rows = (
        Sensitivity(name, tuple(SensitivityPoint(*point) for point in curve.points)) for name, curve in curves.items()
    )
    return tuple(row for row in rows if row.points)


def plan_of(network: Network) -> dict[str, Choice]:
    """Form and ranks of the factorized layers."""
    return {name: Choice(own.form, own.ranks) for name, own in network.factors.items()}


def layer_rows(marked: Marked, narrowed: Marked, network: Network) -> tuple[LayerRow, ...]:
    """What became of every layer, in the order of the graph; `narrowed` is the graph without its spare channels."""
    costs = [cost.node_costs(own.model, own.types) for own in (marked, narrowed)]
    counted, recounted = ({node.name: node.macs for node in own} for own in costs)
    listed: list[Layer | Frozen] = [*marked.layers, *marked.frozen]
    rest: list[Layer | Frozen] = [*narrowed.layers, *narrowed.frozen]
    left = {layer.name: layer for layer in rest}
    rows = {}
    for layer in listed:
        own, now = network.factors.get(layer.name), left[layer.name]
        before = layer.macs if isinstance(layer, Layer) else counted.get(layer.name, 0)
        after = now.macs if isinstance(now, Layer) else recounted.get(now.name, 0)
        rows[layer.name] = LayerRow(
            layer.name,
            layer.op,
            layer.weight_shape,
            None if own is None else own.form,
            () if own is None else own.ranks,
            layer.params,
            now.params if own is None else own.params,
            before,
            after if own is None or isinstance(now, Frozen) else macs_of(now, own.written),
            layer.reason if isinstance(layer, Frozen) else None,
            None if now.weight_shape == layer.weight_shape else now.weight_shape,
        )
    return tuple(rows[name] for name in marked.order)


def trainings(fine_tunes: Sequence[FineTune], threads: int) -> tuple[Training, ...]:
    """The fine-tunes, as they can be repeated, and how they went."""
    return tuple(
        Training(own.name, own.steps, own.batch, threads, own.learning_rate, curve(own), own.floor)
        for own in fine_tunes
    )


def curve(own: FineTune) -> tuple[CurvePoint, ...]:
    """A fine-tune in a few dozen points: mean losses, and the metric at the steps where it was looked at."""
    between = max(1, -(-own.steps // CURVE_POINTS))
    ends = sorted({*range(between, own.steps, between), own.steps, *own.looks} - {0})
    return tuple(
        CurvePoint(end, float(np.mean(own.losses[start:end])), own.looks.get(end))
        for start, end in zip([0, *ends], ends, strict=False)
    )


def trained_blocks(task: Task) -> tuple[TrainedBlock, ...]:
    """Which layers are trained how; none where nothing is trained."""
    found = () if task.training is None else task.training.blocks
    return tuple(
        TrainedBlock(own.layers, "reconstruction" if own.reconstructed else "end to end", own.learns, own.ended_by)
        for own in found
    )


def versions() -> dict[str, str]:
    """Versions of Python and the libraries in use."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def machine() -> str:
    """System, processor and cores in words."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def settings(config: Config) -> dict[str, Any]:
    """The options that shaped the run, by name."""
    values = dataclasses.asdict(config)
    for hidden in ("data", "metric_base", "clock"):
        values.pop(hidden)
    values["input_shape"] = {name: list(shape) for name, shape in config.input_shape.items()}
    data = dataclasses.asdict(config.data)
    data.pop("base")
    values["data"] = data
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True, eq=False)
class Chosen:
    """What each stage ended with, and its metric statistics on the whole test split.

    `stage1` or `final` is None where nothing smaller was accepted: the normalized original stands then.
    """

    stage1: Candidate | None
    stage1_rows: NDArray[Any]
    final: Candidate | None
    final_rows: NDArray[Any]

    @property
    def network(self) -> Network:
        """The network to write."""
        return Network() if self.final is None else self.final.network


def make_report(
    opened: prepare.Opened,
    marked: Marked,
    narrowed: Marked,
    config: Config,
    task: Task,
    judges: Deciding,
    chosen: Chosen,
    rows: NDArray[Any],
    size_bytes: int | None,
    tried: tuple[CandidateRow, ...],
    fine_tunes: Sequence[FineTune],
    warnings: tuple[str, ...],
) -> Report:
    """Measure what is still missing (latency) and put the report together.

    Args:
        opened: the original.
        marked: normalized graph and layers.
        narrowed: the same without the channels that were removed.
        config: what was asked for.
        task: what stood fixed.
        judges: who decided.
        chosen: what the stages ended with.
        rows: the original's metric statistics on the whole test split.
        size_bytes: of the original on disk; None for its size in memory.
        tried: candidates.
        fine_tunes: in the order run.
        warnings: for the user.
    """
    metric, seed = task.metric, config.seed
    measured = [(opened.model, rows), (build(task, chosen.network), chosen.final_rows)]
    if chosen.stage1 is not chosen.final:
        first = marked.model if chosen.stage1 is None else build(task, chosen.stage1.network)
        measured.append((first, chosen.stage1_rows))
    sample = prepare.first_examples(judges.test, 1)[0]
    times = measured_latencies([model for model, _ in measured], sample, config.threads)
    sizes = [stored_bytes(model) for model, _ in measured]
    sizes[0] = sizes[0] if size_bytes is None else size_bytes
    original, final, *rest = (
        six_metrics(model, opened.shapes, metrics.value(metric, own), size, time)
        for (model, own), size, time in zip(measured, sizes, times, strict=True)
    )
    stage1 = rest[0] if rest else final
    select = None if chosen.final is None or chosen.final.drop is None else chosen.final.drop
    whole = interval(metric, rows, chosen.final_rows, seed)
    mine = judges.report_rows
    return Report(
        model=opened.name,
        data=config.data.path,
        metric_name=metric.name,
        original=original,
        stage1=stage1,
        stage2=final if config.stage == 2 else None,
        enhancement=enhancement(original, final, whole.value),
        drop=whole.value,
        drop_interval=whole,
        drop_select=None if select is None else Interval(select.value, select.low, select.high),
        drop_report=interval(metric, rows[mine], chosen.final_rows[mine], seed),
        deciding=DecidingImages(judges.source, len(judges.select)),
        delta=config.delta if config.limits else config.largest_drop,
        objective=config.objective,
        compressed=chosen.final is not None,
        layers=layer_rows(marked, narrowed, chosen.network),
        normalization=marked.notes,
        candidates=tried,
        training=trainings(fine_tunes, config.threads),
        blocks=trained_blocks(task),
        seed=seed,
        settings=settings(config),
        versions=versions(),
        machine=machine(),
        warnings=warnings,
    )


def with_file_size(report: Report, size_bytes: int) -> Report:
    """The report with the written file's own size."""
    last = report.stage2 or report.stage1
    assert last is not None
    written = dataclasses.replace(last, size_bytes=size_bytes)
    gain = enhancement(report.original, written, report.drop)
    stage1 = written if report.stage1 == last else report.stage1
    return dataclasses.replace(report, enhancement=gain, stage1=stage1, stage2=report.stage2 and written)
