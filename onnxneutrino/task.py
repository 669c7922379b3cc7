"""The values that a run is made of: the marked graph, the task, and the networks that are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import metrics
from onnxneutrino.config import TrainConfig
from onnxneutrino.data import Split
from onnxneutrino.external import External
from onnxneutrino.factors import Factors
from onnxneutrino.graph import TensorType, with_arrays
from onnxneutrino.graph import arrays as graph_arrays
from onnxneutrino.layer_options import Objective
from onnxneutrino.losses import Loss
from onnxneutrino.passes.factorize import factorize, stage_names
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.prepare import Opened
from onnxneutrino.training_plan import TrainingPlan
from onnxneutrino.walk import read_behind


@dataclass(frozen=True, eq=False)
class Marked:
    """What is known before the search: the normalized graph and its layers."""

    opened: Opened
    model: ModelProto
    batched: ModelProto
    notes: tuple[str, ...]
    types: Mapping[str, TensorType]
    layers: tuple[Layer, ...]
    frozen: tuple[Frozen, ...]
    order: tuple[str, ...]
    freed: bool


@dataclass(frozen=True, eq=False)
class Task:
    """What stands fixed during a run.

    Attributes:
        model: the normalized, deployable graph.
        batched: the same graph with a symbolic batch where that is possible; for running and training.
        types: tensor types of `model` at batch 1.
        layers: the marked layers.
        trainable: initializers that training may change, where a graph still holds them.
        loss: what the whole network learns, and what its divergence is measured on.
        metric: the user's metric.
        train: the training split without its validation share.
        stop: the validation share of the training split; a fine-tune must not lose on it. None without one.
        select: the deciding images.
        original_rows: the original's metric statistics on them.
        delta: the largest drop, in the metric's units; infinite where any will do.
        objective: what is made small.
        rest: cost of everything that is not a marked layer, in the unit of the objective; with hard targets the
            sum of its shares of them.
        batch: examples of a training step.
        evaluation_batch: examples of an inference run.
        threads: for the runtime.
        seed: of every draw.
        labels: train with labels where there are some.
        training: how it is trained; None where it is not.
        recipe: the user's wishes for it.
        external: the user's own training loop; None for the project's.
        teacher: the original with a symbolic batch, where channels were removed from `batched`; else None.
        full_cost: of the original, in the unit of the objective; None where it is that of `model`.
    """

    model: ModelProto
    batched: ModelProto
    types: Mapping[str, TensorType]
    layers: tuple[Layer, ...]
    trainable: tuple[str, ...]
    loss: Loss
    metric: metrics.Metric
    train: Split
    stop: Split | None
    select: Split
    original_rows: NDArray[Any]
    delta: float
    objective: Objective
    rest: float
    batch: int
    evaluation_batch: int
    threads: int
    seed: int
    labels: bool
    training: TrainingPlan | None = None
    recipe: TrainConfig = field(default_factory=TrainConfig)
    external: External | None = None
    teacher: ModelProto | None = None
    full_cost: float | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """Factors by layer name, and trained arrays of other initializers by their name."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class FineTune:
    """One fine-tune, for the report: what was run, the loss of every step, and the metric after some of them.

    Of the user's own training loop nothing is known: no steps, no learning rate (NaN). `floor` is what the metric must
    reach on the images that it was looked at with, None without a delta.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    losses: tuple[float, ...]
    looks: Mapping[int, float] = field(default_factory=dict)
    floor: float | None = None


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a fine-tune ended with.

    Attributes:
        network: the trained one, or that from before; None where training failed.
        fine_tune: for the report; None where training failed.
        warnings: for the report.
        learning_rate: that later fine-tunes begin with; None where none was found yet.
        batch: that later fine-tunes begin with.
    """

    network: Network | None
    fine_tune: FineTune | None
    warnings: tuple[str, ...]
    learning_rate: float | None
    batch: int


def build(task: Task, network: Network, batched: bool = False) -> ModelProto:
    """The graph of a network: deployable, or with a symbolic batch."""
    model = factorize(task.batched if batched else task.model, task.layers, network.factors)
    held = graph_arrays(model)
    return with_arrays(model, {name: array for name, array in network.arrays.items() if name in held})


def trainable_names(task: Task, network: Network, graph: ModelProto) -> list[str]:
    """Float initializers of `graph` that training may change: all stages, and the task's others behind them.

    What stands before all that was changed computes what it does in the original, and has nothing to learn from it.
    """
    stages = [
        name
        for layer in task.layers
        if layer.name in network.factors
        for name in stage_names(layer, network.factors[layer.name])
    ]
    held = graph_arrays(graph)
    changed = {*stages, *network.arrays}
    if task.teacher is not None:
        before = graph_arrays(task.teacher)
        changed |= {name for name, own in held.items() if not np.array_equal(own, before.get(name, ()))}
    behind = read_behind(graph.graph, changed) if changed else held
    floats = {name for name, own in held.items() if own.dtype in (np.float32, np.float16)}
    return [name for name in (*stages, *task.trainable) if name in behind and name in floats]


def untouched_nodes(marked: Marked) -> set[str]:
    """Names of the layers that the user left out."""
    return {layer.name for layer in marked.frozen if "--exclude" in layer.reason or "--only" in layer.reason}


def trainable_initializers(marked: Marked) -> list[str]:
    """Float constants of linear layers, and of what is added or multiplied, except in layers the user left out."""
    left_out = untouched_nodes(marked)
    names: dict[str, None] = {}
    untouched: set[str] = set()
    for node in marked.model.graph.node:
        if node.name in left_out or (node.op_type == "Add" and untouched & set(node.input)):
            untouched.update(node.output if node.name in left_out else ())
            continue
        if node.op_type in ("Conv", "Gemm"):
            names.update(dict.fromkeys(node.input[1:]))
        elif node.op_type in ("MatMul", "Add", "Mul"):
            names.update(dict.fromkeys(node.input))
    held = graph_arrays(marked.model)
    return [name for name in names if name in held and held[name].dtype.kind == "f" and held[name].size > 1]
