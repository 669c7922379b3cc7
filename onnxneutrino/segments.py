"""Parts of a graph between two places, so that what was computed up to the first need not be computed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import ModelProto, helper

from onnxneutrino.blocks import bottlenecks
from onnxneutrino.graph import TensorType, copied, expose, producers
from onnxneutrino.plan import Layer


def resting_places(
    model: ModelProto,
    types: Mapping[str, TensorType],
    layers: Sequence[Layer],
    outputs: Sequence[str],
    largest: float,
) -> dict[str, str | None]:
    """For each layer the last tensor before it through which every way leads; None where there is none.

    What stands behind that tensor can be run from it alone.

    Args:
        model: the graph in which the layers were found.
        types: of its tensors at batch 1.
        layers: in the order of the graph.
        outputs: what the graph is run for.
        largest: elements of one example that such a tensor may have at most.
    """
    narrow = bottlenecks(model, outputs)
    made = [
        (place, name)
        for place, node in enumerate(model.graph.node)
        for name in node.output
        if name in narrow and name in types and math.prod(types[name].shape) <= largest
    ]
    places = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    # Up to the layer's input, not to its node: a Flatten between the two goes when the layer is factorized.
    return {
        layer.name: next((name for place, name in reversed(made) if place <= places.get(layer.input, -1)), None)
        for layer in layers
    }


def between(
    model: ModelProto, start: str | None, tensors: Sequence[str], types: Mapping[str, TensorType]
) -> ModelProto:
    """The part of a graph that computes `tensors` from `start`, which becomes an input.

    What is needed besides (a shape that is read off an earlier tensor) is still computed from the graph's inputs.

    Args:
        model: any graph.
        start: a tensor that a node of the main graph makes; None for the graph's own inputs.
        tensors: what the part gives.
        types: of the graph's tensors, `start` among them; only its rank and element type matter.

    Raises:
        ModelError: the graph has no such tensor.
    """
    maker = None if start is None else producers(model.graph).get(start)
    if start is None or maker is None:
        return expose(model, tensors)
    place = list(model.graph.node).index(maker)
    copy = copied(model)
    made = copy.graph.node[place].output
    made[list(made).index(start)] = f"{start}/unused"
    kind = helper.np_dtype_to_tensor_dtype(types[start].dtype)
    copy.graph.input.append(helper.make_tensor_value_info(start, kind, [None] * len(types[start].shape)))
    del copy.graph.value_info[:]
    return expose(copy, tensors)
