"""What `analyze`, `profile` and `evaluate` find out about a model without changing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxneutrino import cost, metrics, prepare
from onnxneutrino.conductor import mark
from onnxneutrino.config import Config
from onnxneutrino.console import AnalyzedLayer
from onnxneutrino.cost import NodeCost
from onnxneutrino.forms import applicable
from onnxneutrino.graph import load
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.report import SixMetrics
from onnxneutrino.runtime import Runner, latencies, random_inputs
from onnxneutrino.summary import six_metrics

NORMALIZE_SAMPLES = 2


@dataclass(frozen=True)
class Profile:
    """The six metrics of one model, and its nodes."""

    name: str
    metrics: SixMetrics
    nodes: tuple[NodeCost, ...]


def analyze(path: Path, config: Config) -> list[AnalyzedLayer]:
    """Every Conv, ConvTranspose, Gemm and MatMul of the normalized graph, marked or frozen.

    Raises:
        NeutrinoError: see `errors`.
    """
    opened = prepare.open_model(load(path).model, path.name, config)
    samples = [random_inputs(opened.model, opened.shapes, config.seed + index) for index in range(NORMALIZE_SAMPLES)]
    marked = mark(opened, samples, config)
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
                macs=macs.get(name, 0),
                forms=applicable(layer.weight.shape) if isinstance(layer, Layer) else (),
                sensitivity=None,
                reason=layer.reason if isinstance(layer, Frozen) else None,
            )
        )
    return rows


def profile(paths: Sequence[Path], config: Config) -> list[Profile]:
    """The six metrics of each model, latencies measured in turn; the user's metric where data is described.

    Raises:
        NeutrinoError: see `errors`.
    """
    opened = [prepare.open_model(load(path).model, path.name, config) for path in paths]
    values: list[float | None] = [None] * len(opened)
    if config.data.path:
        values = [_measured(own, config)[0] for own in opened]
    inputs = random_inputs(opened[0].model, opened[0].shapes, config.seed)
    renamed = [dict(zip(own.shapes, inputs.values(), strict=True)) for own in opened]
    times = latencies([Runner(own.model, threads=config.threads) for own in opened], renamed)[0]
    return [
        Profile(
            own.name,
            six_metrics(own.model, own.shapes, value, cost.size_bytes(path), time),
            tuple(cost.node_costs(own.model, own.types)),
        )
        for own, path, value, time in zip(opened, paths, values, times, strict=True)
    ]


def evaluate(path: Path, config: Config) -> tuple[float, int]:
    """The metric on the test split, and its number of examples.

    Raises:
        NeutrinoError: see `errors`.
    """
    return _measured(prepare.open_model(load(path).model, path.name, config), config)


def _measured(opened: prepare.Opened, config: Config) -> tuple[float, int]:
    metric = metrics.resolve(config.metric, config.metric_base)
    dataset = prepare.open_dataset(opened, metric, config)
    batched, freed = prepare.free(opened.model, prepare.first_examples(dataset.test, 3), config.threads)
    batch = prepare.evaluation_batch(opened) if freed else 1
    rows = prepare.evaluate(batched, dataset.test, metric, batch, config.threads, batched)
    return metrics.value(metric, rows), len(rows)
