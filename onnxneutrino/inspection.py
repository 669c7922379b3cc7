"""What `analyze`, `profile` and `evaluate` find out about a model without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxneutrino import cost, metrics, prepare
from onnxneutrino.agreement import compared
from onnxneutrino.calibrate import calibrate, images_needed
from onnxneutrino.config import Config
from onnxneutrino.console import AnalyzedLayer
from onnxneutrino.cost import NodeCost
from onnxneutrino.data import Split
from onnxneutrino.errors import ModelError
from onnxneutrino.forms import applicable
from onnxneutrino.graph import element_dtype, load, real_inputs
from onnxneutrino.layer_options import LayerOptions
from onnxneutrino.marking import mark
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.report import Agreement, Interval, SixMetrics
from onnxneutrino.runtime import Runner, latencies, random_inputs
from onnxneutrino.summary import six_metrics
from onnxneutrino.task import Marked

NORMALIZE_SAMPLES = 2
SENSITIVITY_IMAGES = 4096
SENSITIVITY_SHARE = 0.5


@dataclass(frozen=True)
class Profile:
    """The six metrics of one model, and its nodes; `metric_name` is the one that would be or was measured."""

    name: str
    metric_name: str
    metrics: SixMetrics
    nodes: tuple[NodeCost, ...]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same test examples: their profiles, and how much worse the second is, with its interval."""

    profiles: tuple[Profile, Profile]
    drop: Interval
    examples: int
    agreement: Agreement | None


@dataclass(frozen=True)
class Evaluation:
    """A metric's value on the test split, in its own units, the number of examples, and what the data warns of."""

    metric: str
    value: float
    examples: int
    warnings: tuple[str, ...] = ()


def analyze(path: Path, config: Config) -> list[AnalyzedLayer]:
    """Every Conv, ConvTranspose, Gemm and MatMul of the normalized graph, marked or frozen.

    Where data is described, a marked layer has its sensitivity: the relative error of its output at half its
    params, on up to 4096 training inputs.

    Raises:
        NeutrinoError: see `errors`.
    """
    opened = prepare.open_model(load(path).model, path.name, config)
    samples = [random_inputs(opened.model, opened.shapes, config.seed + index) for index in range(NORMALIZE_SAMPLES)]
    dataset = prepare.settled(opened, config)[2] if config.data.path else None
    if dataset is not None:
        samples = prepare.first_examples(dataset.test, NORMALIZE_SAMPLES)
    marked = mark(opened, samples, config)
    errors = {} if dataset is None else sensitivities(marked, dataset.train, config)
    macs = {node.name: node.macs for node in cost.node_costs(marked.model, marked.types)}
    listed: list[Layer | Frozen] = [*marked.layers, *marked.frozen]
    found = {layer.name: layer for layer in listed}
    rows = []
    for name in marked.order:
        layer = found[name]
        rows.append(
            AnalyzedLayer(
                name=name,
                op=layer.op,
                weight_shape=layer.weight_shape,
                params=layer.params,
                macs=layer.macs if isinstance(layer, Layer) else macs.get(name, 0),
                forms=applicable(layer.weight.shape) if isinstance(layer, Layer) else (),
                sensitivity=errors.get(name),
                reason=layer.reason if isinstance(layer, Frozen) else None,
            )
        )
    return rows


def profile(paths: Sequence[Path], config: Config) -> list[Profile]:
    """The six metrics of each model, latencies measured in turn; the user's metric where data is described.

    Raises:
        ModelError: a model has other inputs than the first.
        NeutrinoError: see `errors`.
    """
    opened = _alike(paths, config)
    found = [_measured(own, config) if config.data.path else None for own in opened]
    name = next((own.metric for own in found if own is not None), config.metric or prepare.DEFAULT_METRIC)
    return _profiles(opened, paths, name, [None if own is None else own.value for own in found], config)


def _alike(paths: Sequence[Path], config: Config) -> list[prepare.Opened]:
    """Models of the same inputs."""
    opened = [prepare.open_model(load(path).model, path.name, config) for path in paths]
    for own in opened[1:]:
        if _signature(own) != _signature(opened[0]):
            raise ModelError(
                f"{own.name}: its inputs differ from those of {opened[0].name} in number, shape or type; "
                "compare models of the same inputs"
            )
    return opened


def _profiles(
    opened: Sequence[prepare.Opened],
    paths: Sequence[Path],
    metric: str,
    values: Sequence[float | None],
    config: Config,
) -> list[Profile]:
    """The six metrics of each model, latencies measured in turn."""
    inputs = random_inputs(opened[0].model, opened[0].shapes, config.seed)
    renamed = [dict(zip(own.shapes, inputs.values(), strict=True)) for own in opened]
    times = latencies([Runner(own.model, threads=config.threads, spinning=True) for own in opened], renamed)[0]
    return [
        Profile(
            own.name,
            metric,
            six_metrics(own.model, own.shapes, value, cost.size_bytes(path), time),
            tuple(cost.node_costs(own.model, own.types)),
        )
        for own, path, value, time in zip(opened, paths, values, times, strict=True)
    ]


def compare(original: Path, other: Path, config: Config) -> Comparison:
    """Profile two models, and measure the drop from the first to the second, paired over the test examples.

    Raises:
        ModelError: the second has other inputs than the first.
        NeutrinoError: see `errors`.
    """
    opened = _alike([original, other], config)
    if list(opened[0].shapes) != list(opened[1].shapes):
        wanted, got = (", ".join(own.shapes) for own in opened)
        raise ModelError(f"{opened[1].name}: its inputs are called {got}, not {wanted}; both get the same examples")
    config, metric, dataset = prepare.settled(opened[0], config)
    samples = prepare.first_examples(dataset.test, NORMALIZE_SAMPLES)
    freed = [prepare.free(own.model, samples, config.threads) for own in opened]
    batch = prepare.evaluation_batch(opened[0]) if all(free for _, free in freed) else 1
    models = [model for model, _ in freed]
    rows = [prepare.evaluate(own, dataset.test, metric, batch, config.threads, models[0]) for own in models]
    drop = metrics.drop(metric, *rows, seed=config.seed)
    values = [metrics.value(metric, own) for own in rows]
    before, after = _profiles(opened, [original, other], metric.name, values, config)
    alike = compared(models[0], models[1], dataset.test, metric, batch, config.threads)
    return Comparison((before, after), Interval(drop.value, drop.low, drop.high), len(rows[0]), alike)


def evaluate(path: Path, config: Config) -> Evaluation:
    """The metric on the test split; of a quantized model, too.

    Raises:
        NeutrinoError: see `errors`.
    """
    return _measured(prepare.open_model(load(path, quantized=True).model, path.name, config), config)


def sensitivities(marked: Marked, train: Split, config: Config) -> dict[str, float]:
    """Relative output error of every marked layer at half its params: the least of all forms.

    Layers that no form brings to half are left out.
    """
    tensors = sorted({use.input for layer in marked.layers for use in layer.uses})
    if not tensors:
        return {}
    batch = prepare.evaluation_batch(marked.opened) if marked.freed else 1
    moments, _ = calibrate(
        Runner(marked.batched, tensors, threads=config.threads),
        tensors,
        marked.layers,
        (drawn.inputs for drawn in train.batches(batch, seed=config.seed)),
        min(images_needed(marked.layers), SENSITIVITY_IMAGES, len(train)),
        config.seed,
    )
    found = {}
    for layer in marked.layers:
        options = LayerOptions(layer, moments[layer.name], "params").options
        losses = [option.loss for option in options if option.cost <= SENSITIVITY_SHARE * layer.params]
        if losses:
            found[layer.name] = min(losses)
    return found


def _signature(opened: prepare.Opened) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape at batch 1 and type of every input."""
    return [
        (opened.shapes[value.name], element_dtype(value.type.tensor_type.elem_type))
        for value in real_inputs(opened.model)
    ]


def _measured(opened: prepare.Opened, config: Config) -> Evaluation:
    config, metric, dataset = prepare.settled(opened, config)
    batched, freed = prepare.free(opened.model, prepare.first_examples(dataset.test, 3), config.threads)
    batch = prepare.evaluation_batch(opened) if freed else 1
    rows = prepare.evaluate(batched, dataset.test, metric, batch, config.threads, batched)
    return Evaluation(metric.name, metrics.value(metric, rows), len(rows), tuple(dataset.warnings))
