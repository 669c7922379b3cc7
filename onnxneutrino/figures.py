"""What the network of a plan truly costs, before a single factor is fitted: its graph is made of shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import cost, prepare
from onnxneutrino.candidates import whole_point
from onnxneutrino.chain_latency import LatencyTable
from onnxneutrino.forms import filled
from onnxneutrino.graph import TensorType
from onnxneutrino.layer_options import Objective, Target, cost_unit
from onnxneutrino.plan import Array, Choice, Layer
from onnxneutrino.runtime import Runner, latencies
from onnxneutrino.shapes import real_inputs
from onnxneutrino.task import Marked, Network, Task, build
from onnxneutrino.weights import stored_bytes

LATENCY_SECONDS = 1.0
LATENCY_MARGIN = 0.05  # times scatter from one measurement to the next


def total_cost(model: ModelProto, types: Mapping[str, TensorType], objective: str | LatencyTable) -> float:
    """Cost of a whole graph, in the unit that `cost_unit` counts layers in; a table's is that of the original."""
    if isinstance(objective, LatencyTable):
        return objective.total
    if objective == "size":
        return float(stored_bytes(model))
    if objective == "memory":
        return float(cost.memory_bytes(model, types))
    if objective == "macs":
        return float(cost.macs(model, types))
    return float(cost.params(model))


def whole_cost(layer: Layer, objective: Objective) -> float:
    """Cost of a layer as it is."""
    return cost_unit(layer, objective)(whole_point(layer))


def rest_cost(marked: Marked | Task, unit: str | LatencyTable) -> float:
    """Cost of everything that is not a marked layer."""
    return total_cost(marked.model, marked.types, unit) - sum(whole_cost(layer, unit) for layer in marked.layers)


def figures(task: Task, targets: tuple[Target, ...], plan: Mapping[str, Choice]) -> NDArray[np.float64]:
    """The costs of a plan's network in shares of the targets' limits, counted on its graph; latency is measured.

    Five per cent are added to the latency. At most 1 everywhere: all targets are met.

    Args:
        task: the run.
        targets: in the order of the result.
        plan: of the layers that are factorized; empty for the original.
    """
    chains = {
        layer.name: filled(plan[layer.name], layer.weight, layer.bias, _zeros)
        for layer in task.layers
        if layer.name in plan
    }
    model = build(task, Network(chains))
    types = task.types
    if plan:
        types = prepare.types_of(model, {value.name: task.types[value.name].shape for value in real_inputs(task.model)})
    found = []
    for target in targets:
        if isinstance(target.unit, LatencyTable):
            # In turn with the original, as the report has it: a network that runs alone finds its caches warm.
            runners = [Runner(own, threads=task.threads, spinning=True) for own in (task.model, model)]
            example = prepare.first_examples(task.select, 1)[0]
            (_, ms), _ = latencies(runners, [example] * 2, LATENCY_SECONDS)
            found.append(ms * (1 + LATENCY_MARGIN) / target.limit)
        else:
            found.append(total_cost(model, types, target.unit) / target.limit)
    return np.array(found)


def _zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)
