"""Trainable arrays in units of their own size, so that a step of Adam changes all of them by the same share.

Adam moves every element by about the learning rate, whatever the element's size (Kingma and Ba 2015). Where batch
normalizations were folded, or inputs are not normalized, the weights of two output channels differ in size by four
orders, and a step that is small for one destroys the other. So `v` is trained in `w = u v`, `u` fixed: about ten times
the root mean square of an output channel's weights, and of other arrays that of all elements. The arrays `v` are then
of the size of common weights, and learning rates mean what they are known for. Powers of two round nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxneutrino.graph import arrays, attributes, replace_uses, with_arrays
from onnxneutrino.plan import Array

UNIT, WEIGHT = "/onnxneutrino/unit", "/onnxneutrino/weight"
COMMON = 0.1  # root mean square of what is trained
LEAST = 0.01  # of that of the whole array: a channel of zeros must be able to move


def with_units(model: ModelProto, names: Sequence[str]) -> tuple[ModelProto, dict[str, Array]]:
    """A copy whose arrays `names` are multiplied by units before they are used, and these units.

    Args:
        model: a training copy.
        names: trainable float32 initializers; in the copy they hold `v`.

    Returns:
        The copy, and `u` by name, of shapes that broadcast to those of the arrays.
    """
    wanted = set(names)
    axes: dict[str, int | None] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in wanted:
                axis = _output_axis(node, index)
                axes[name] = axis if axes.get(name, axis) == axis else None
    held = arrays(model)
    values = {name: np.asarray(held[name], np.float32) for name in axes}
    units = {name: _unit(value, axes[name]) for name, value in values.items()}
    copy = with_arrays(model, {name: np.asarray(value / units[name]) for name, value in values.items()})
    for name, unit in units.items():
        copy.graph.initializer.append(numpy_helper.from_array(unit, name + UNIT))
        replace_uses(copy.graph, name, name + WEIGHT)
        copy.graph.node.insert(0, helper.make_node("Mul", [name, name + UNIT], [name + WEIGHT], name + WEIGHT))
    return copy, units


def _output_axis(node: NodeProto, index: int) -> int | None:
    """The axis of a weight along which the outputs of its node lie; None for what is no weight of a linear layer."""
    if node.op_type == "Conv" and index == 1:
        return 0
    if node.op_type == "Gemm" and index == 1:
        known = attributes(node)
        return 0 if "transB" in known and known["transB"].i else 1
    if node.op_type == "MatMul":
        return -1 if index == 1 else -2
    return None


def _unit(value: Array, axis: int | None) -> Array:
    """Units of an array, in its number of axes; 1 for an array of zeros."""
    whole = np.sqrt(np.mean(np.square(value), keepdims=True, dtype=np.float64))
    if not whole.any():
        return np.ones_like(whole, np.float32)
    others = None if axis is None else tuple(other for other in range(value.ndim) if other != axis % value.ndim)
    own = np.sqrt(np.mean(np.square(value), axis=others, keepdims=True, dtype=np.float64))
    return np.asarray(2.0 ** np.rint(np.log2(np.maximum(own, LEAST * whole) / COMMON)), np.float32)
