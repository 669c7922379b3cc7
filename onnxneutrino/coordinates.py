"""Coordinates in which steps of Adam are good: an array is `origin + unit · step`, steps turned to what a layer reads.

Adam moves every element by about the learning rate, whatever its size and whatever it multiplies (Kingma and
Ba 2015).

- Where batch normalizations were folded, or inputs are not normalized, the weights of two output channels differ in
  size by four orders, and a step that is small for one destroys the other. So a step is a share of each output
  channel's size.
- What a layer reads varies far more in some directions than in others (`directions.py`): every step moves the outputs
  along these, and the learning rate that they allow is too low for all others. So steps are those of a layer whose
  inputs are centred and vary alike in all directions (Desjardins et al. 2015, Natural neural networks; the input factor
  of K-FAC, Martens and Grosse 2015).

A weight's rows are `w = w₀ + u (s + ((s V) ∘ (scales - 1)) Vᵀ)`, its bias `b = b₀ + u' s' - (w - w₀) mean`; V, scales
and mean are those of `Directions`. The units make the root mean square of `s` that stands for the whole of `w₀` 0.1, so
that learning rates mean what they are known for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxneutrino.directions import Directions
from onnxneutrino.graph import arrays, attributes, replace_uses, with_arrays
from onnxneutrino.plan import Array

PREFIX = "/onnxneutrino/"
COMMON = 0.1  # root mean square of what is trained
LEAST = 0.01  # of that of the whole array: a channel of zeros must be able to move


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Of the arrays in `origins`, by name.

    Attributes:
        origins: where they begin.
        units: of shapes that broadcast to theirs.
        axes: the axis along which the outputs of a weight in `directions` lie, 0 or 1.
        directions: of what weights multiply.
    """

    origins: Mapping[str, Array] = field(default_factory=dict)
    units: Mapping[str, Array] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    directions: Mapping[str, Directions] = field(default_factory=dict)

    def arrays(self, steps: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays at `steps`; those without coordinates are copied."""
        changes = {name: own * self.units[name] for name, own in steps.items() if name in self.origins}
        for name, own in self.directions.items():
            rows = self._rows(name, changes[name])
            rows = rows + ((rows @ own.vectors) * (own.scales - 1)) @ own.vectors.T
            changes[name] = rows.T if self.axes[name] else rows.reshape(changes[name].shape)
            if own.bias:
                changes[own.bias] = changes[own.bias] - (rows @ own.mean).reshape(changes[own.bias].shape)
        found = {name: np.asarray(self.origins[name] + own, np.float32) for name, own in changes.items()}
        return {name: found[name] if name in found else np.array(own) for name, own in steps.items()}

    def _rows(self, name: str, weight: Array) -> Array:
        return weight.T if self.axes[name] else weight.reshape(len(weight), -1)


def with_coordinates(
    model: ModelProto, names: Sequence[str], directions: Mapping[str, Directions]
) -> tuple[ModelProto, Coordinates]:
    """A copy in which the arrays `names` are steps, zeros at first, and what they stand for is computed.

    Args:
        model: a training copy.
        names: trainable float32 initializers.
        directions: of what weights among them multiply.
    """
    wanted = set(names)
    axes: dict[str, int | None] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in wanted:
                axis = _output_axis(node, index)
                axes[name] = axis if axes.get(name, axis) == axis else None
    held = arrays(model)
    origins = {name: np.asarray(held[name], np.float32) for name in axes}
    turned = {name: own for name, own in directions.items() if name in origins}
    biases = {own.bias: name for name, own in turned.items() if own.bias in origins}
    units = {name: _unit(value, axes[name], turned.get(name)) for name, value in origins.items()}
    for bias, name in biases.items():
        units[bias] = units[name].reshape(origins[bias].shape) * np.float32(turned[name].level)
    own_axes = {name: 0 if axes[name] == 0 else 1 for name in turned}
    coordinates = Coordinates(origins, units, own_axes, turned)
    return _graph(model, coordinates), coordinates


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


def _unit(value: Array, axis: int | None, directions: Directions | None) -> Array:
    """Units of an array, in its number of axes; 1 for an array of zeros."""
    squares = np.square(value, dtype=np.float64)
    others = None if axis is None else tuple(other for other in range(value.ndim) if other != axis % value.ndim)
    own = np.mean(squares, axis=others, keepdims=True)
    if directions is not None and axis is not None:
        rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        # In the coordinates of the step a strong direction counts as much more as inputs vary along it.
        more = np.square(rows @ directions.vectors, dtype=np.float64) @ (1 / np.square(directions.scales) - 1)
        own = own + (more / rows.shape[1]).reshape(own.shape)
    whole = np.mean(own)
    if not whole:
        return np.ones_like(own, np.float32)
    return np.asarray(np.sqrt(np.maximum(own, LEAST**2 * whole)) / COMMON, np.float32)


def _graph(model: ModelProto, coordinates: Coordinates) -> ModelProto:
    origins = coordinates.origins
    copy = with_arrays(model, {name: np.zeros_like(value) for name, value in origins.items()})
    graph, nodes = copy.graph, list[NodeProto]()

    def constant(name: str, value: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def turned(source: str, output: str) -> str:
        return add("Transpose", [source], output, perm=[1, 0])

    def reshaped(source: str, name: str, output: str) -> str:
        return add("Reshape", [source, constant(f"{output}/size", np.array(origins[name].shape, np.int64))], output)

    shifts: dict[str, str] = {}
    for name in sorted(origins, key=lambda name: name not in coordinates.directions):  # weights before their biases
        replace_uses(graph, name, f"{name}{PREFIX}array")
        at = name + PREFIX
        change = add("Mul", [name, constant(at + "unit", coordinates.units[name])], at + "scaled")
        if name in coordinates.directions:
            own, across = coordinates.directions[name], coordinates.axes[name]
            rows = turned(change, at + "rows") if across else add("Flatten", [change], at + "rows")
            strong = add("MatMul", [rows, constant(at + "vectors", own.vectors)], at + "strong")
            back = constant(at + "back", ((own.scales - 1) * own.vectors).T)
            rows = add("Add", [rows, add("MatMul", [strong, back], at + "less")], at + "turned")
            change = turned(rows, at + "change") if across else reshaped(rows, name, at + "change")
            if own.bias:
                shifts[own.bias] = add("MatMul", [rows, constant(at + "mean", own.mean[:, None])], at + "shift")
        if name in shifts:
            change = add("Sub", [change, reshaped(shifts[name], name, at + "shift")], at + "centred")
        add("Add", [constant(at + "origin", origins[name]), change], at + "array")
    for node in reversed(nodes):
        graph.node.insert(0, node)
    return copy
