"""Which channels of a graph go together: the groups that can be removed as a whole (Fang et al., DepGraph, CVPR 2023).

An analysis: the model is only read. A channel is made by a row of a layer's weight and lives through pointwise
operators, pools and depthwise convolutions until other layers read it; an Add ties the channels of both its sides. Of
every operator that is not known here the channels that it reads stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxneutrino.graph import TensorType, arrays, attribute_values, consumers, reads
from onnxneutrino.plan import Layer

Groups: TypeAlias = NDArray[np.int64]
STAYS = 0  # the group of what cannot be removed

_POINTWISE = frozenset({"Abs", "Cast", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"})
_POINTWISE |= {"HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Tanh"}
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


@dataclass(frozen=True, eq=False)
class Slice:
    """An axis of a constant that counts channels; `groups` has the group of each of its elements."""

    constant: str
    axis: int
    groups: Groups


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a graph by group; group 0 stays.

    Attributes:
        count: groups are numbered below it.
        slices: what goes with them in the constants.
        sizes: elements of shape constants that count channels: name, index and the groups of what is counted.
        depthwise: the groups of the channels of each depthwise convolution, by the name of its node.
        inputs: the groups of what each layer reads, one for each of its input channels.
        outputs: the groups of what each layer makes.
    """

    count: int
    slices: tuple[Slice, ...]
    sizes: tuple[tuple[str, int, Groups], ...]
    depthwise: Mapping[str, Groups]
    inputs: Mapping[str, Groups]
    outputs: Mapping[str, Groups]


def find_channels(
    model: ModelProto,
    types: Mapping[str, TensorType],
    layers: Sequence[Layer],
    mending: Collection[str],
    untouched: Collection[str] = (),
) -> Channels:
    """The groups of channels between layers.

    Args:
        model: its node names are unique.
        types: tensor types at batch 1.
        layers: of the graph.
        mending: names of those that can make up for what is taken from their inputs.
        untouched: names of nodes whose constants stay.
    """
    own = {layer.name: layer for layer in layers if not layer.others}
    finder = _Finder(model, types, own, frozenset(mending), frozenset(untouched))
    for node in model.graph.node:
        finder.visit(node)
    finder.hold(value.name for value in model.graph.output)
    return finder.channels()


@dataclass(frozen=True)
class _Labels:
    """The channels of a tensor: the axis that counts them, and their numbers."""

    axis: int
    numbers: Groups


@dataclass(eq=False)
class _Finder:
    """Goes through the graph and notes what belongs together."""

    model: ModelProto
    types: Mapping[str, TensorType]
    layers: Mapping[str, Layer]
    mending: frozenset[str]
    untouched: frozenset[str]
    parents: list[int] = field(default_factory=lambda: [STAYS])
    labels: dict[str, _Labels] = field(default_factory=dict)
    slices: list[tuple[str, int, Groups]] = field(default_factory=list)
    sizes: list[tuple[str, int, Groups]] = field(default_factory=list)
    depthwise: dict[str, Groups] = field(default_factory=dict)
    inputs: dict[str, Groups] = field(default_factory=dict)
    outputs: dict[str, Groups] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = arrays(self.model)
        self.readers = consumers(self.model.graph)

    # --- groups ---------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Groups:
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number

    def join(self, first: Groups, second: Groups | int) -> None:
        for one, two in np.broadcast(first, second):
            low, high = sorted((self.root(one), self.root(two)))
            self.parents[high] = low

    def hold(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.labels:
                self.join(self.labels[name].numbers, STAYS)

    def channels(self) -> Channels:
        """What was found, its groups numbered anew."""
        used = sorted({self.root(number) for number in range(len(self.parents))})
        places = {root: place for place, root in enumerate(used)}

        def grouped(numbers: Groups) -> Groups:
            return np.array([places[self.root(number)] for number in numbers], np.int64)

        return Channels(
            len(used),
            tuple(Slice(name, axis, grouped(numbers)) for name, axis, numbers in self.slices),
            tuple((name, index, grouped(numbers)) for name, index, numbers in self.sizes),
            {name: grouped(numbers) for name, numbers in self.depthwise.items()},
            {name: grouped(numbers) for name, numbers in self.inputs.items()},
            {name: grouped(numbers) for name, numbers in self.outputs.items()},
        )

    # --- nodes ----------------------------------------------------------------------------------------------

    def visit(self, node: NodeProto) -> None:
        """Label what a node makes; where that is not known, what it reads stays."""
        known = node.domain in ("", "ai.onnx") and node.name not in self.untouched
        handler = self._handler(node.op_type) if known else None
        made = handler(node) if handler is not None else None
        if made is None:
            self.hold(reads(node))
        elif made.numbers.size:
            self.labels[node.output[0]] = made

    def _handler(self, op: str) -> Callable[[NodeProto], _Labels | None] | None:
        if op in _POINTWISE or op in _POOLS:
            return self._unchanged
        if op in _BINARY:
            return self._binary
        if op in _REDUCTIONS:
            return self._reduction
        return {
            "BatchNormalization": self._normalization,
            "Concat": self._concat,
            "Conv": self._conv,
            "Flatten": self._flat,
            "Gemm": self._dense,
            "MatMul": self._dense,
            "Pad": self._unchanged,
            "Reshape": self._flat,
            "Resize": self._resize,
            "Squeeze": self._same_front,
            "Transpose": self._transpose,
            "Unsqueeze": self._same_front,
            "Upsample": self._unchanged,
        }.get(op)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self.types[name].shape if name in self.types else None

    def _alone(self, name: str) -> bool:
        """Whether a constant is read once, so that it can be cut."""
        return name in self.values and len(self.readers.get(name, [])) == 1

    def _unchanged(self, node: NodeProto) -> _Labels | None:
        """What keeps channels apart and their axis in place; all other inputs are constants."""
        own = self.labels.get(node.input[0])
        before, after = self._shape(node.input[0]), self._shape(node.output[0])
        if own is None or before is None or after is None or len(before) != len(after):
            return None
        if node.op_type in _POOLS and own.axis != 1:
            return None
        others = [name for name in node.input[1:] if name]
        if after[own.axis] != len(own.numbers) or len(node.output) > 1 or not set(others) <= self.values.keys():
            return None
        return own

    def _resize(self, node: NodeProto) -> _Labels | None:
        return None if len(node.input) > 3 and node.input[3] else self._unchanged(node)  # sizes name the channels

    def _conv(self, node: NodeProto) -> _Labels | None:
        weight, own = node.input[1], self.labels.get(node.input[0])
        constants = [name for name in node.input[1:] if name]
        if not all(self._alone(name) for name in constants):
            return None
        groups = int(attribute_values(node).get("group", 1))
        if groups == 1:
            return self._layer(node, 1, 0, own)
        if own is None or own.axis != 1 or self.values[weight].shape[:2] != (groups, 1):
            return None
        self.slices += [(name, 0, own.numbers) for name in constants]
        self.depthwise[node.name] = own.numbers
        return own

    def _dense(self, node: NodeProto) -> _Labels | None:
        attributes = attribute_values(node)
        plain = all(attributes.get(name, usual) == usual for name, usual in (("alpha", 1.0), ("beta", 1.0)))
        constants = [name for name in node.input[1:] if name]
        if not plain or attributes.get("transA", 0) or not all(self._alone(name) for name in constants):
            return None
        turned = bool(attributes.get("transB", 0))
        return self._layer(node, int(turned), int(not turned), self.labels.get(node.input[0]))

    def _layer(self, node: NodeProto, inner: int, outer: int, own: _Labels | None) -> _Labels | None:
        """A layer reads channels, which its weight makes good, and makes others."""
        layer, shape = self.layers.get(node.name), self._shape(node.output[0])
        if layer is None or shape is None:
            return None
        weight = self.values[node.input[1]]
        outputs, axis = weight.shape[outer], len(shape) - 1 if node.op_type == "MatMul" else 1
        biases = [self.values[name].shape for name in node.input[2:] if name]
        if any(bias != (outputs,) for bias in biases):
            return None
        seen = self.labels.get(layer.input)
        plain = np.array_equal(np.moveaxis(weight, outer, 0).reshape(outputs, -1), layer.weight.reshape(outputs, -1))
        mends = layer.name in self.mending and plain and self._has_bias(node, layer)
        if mends and own is not None and own.axis == axis and seen is not None:
            self.slices.append((node.input[1], inner, own.numbers))
            self.inputs[layer.name] = seen.numbers
        else:
            self.hold([node.input[0], layer.input])
        made = self.fresh(outputs)
        self.slices.append((node.input[1], outer, made))
        self.slices += [(name, 0, made) for name in node.input[2:] if name]
        self.outputs[layer.name] = made
        return _Labels(axis, made)

    def _has_bias(self, node: NodeProto, layer: Layer) -> bool:
        """Whether the layer has a bias of its own or can be given one: removed channels leave their mean in it."""
        if len(layer.initializers) == 1:
            return node.op_type != "MatMul"
        return self._alone(layer.initializers[1]) and self.values[layer.initializers[1]].size == len(layer.bias)

    def _binary(self, node: NodeProto) -> _Labels | None:
        shape = self._shape(node.output[0])
        if shape is None:
            return None
        found: _Labels | None = None
        others: list[str] = []
        for name in node.input:
            own, mine = self.labels.get(name), self._shape(name)
            if own is not None and mine is not None:
                axis = own.axis + len(shape) - len(mine)
                if len(own.numbers) != shape[axis] or (found is not None and found.axis != axis):
                    return None
                if found is not None:
                    self.join(found.numbers, own.numbers)
                found = found or _Labels(axis, own.numbers)
            else:
                others.append(name)
        if found is None:
            return None
        for name in others:
            sizes = self.values[name].shape if name in self.values else self._shape(name)
            if sizes is None:
                return None
            axis = found.axis - (len(shape) - len(sizes))
            if axis < 0 or sizes[axis] == 1:
                continue
            if not self._alone(name):
                return None
            self.slices.append((name, axis, found.numbers))
        return found

    def _normalization(self, node: NodeProto) -> _Labels | None:
        own = self.labels.get(node.input[0])
        constants = list(node.input[1:])
        if own is None or own.axis != 1 or len(node.output) > 1 or not all(self._alone(name) for name in constants):
            return None
        self.slices += [(name, 0, own.numbers) for name in constants]
        return own

    def _concat(self, node: NodeProto) -> _Labels | None:
        shape = self._shape(node.output[0])
        shapes = [self._shape(name) for name in node.input]
        own = [self.labels.get(name) for name in node.input]
        axes = {labels.axis for labels in own if labels is not None}
        if shape is None or len(axes) != 1:
            return None
        (axis,) = axes
        if int(attribute_values(node)["axis"]) % len(shape) != axis:
            return None
        parts: list[Groups] = []
        for labels, sizes in zip(own, shapes, strict=True):
            if labels is not None:
                parts.append(labels.numbers)
            elif sizes is not None:
                parts.append(np.full(sizes[axis], STAYS))
            else:
                return None
        return _Labels(axis, np.concatenate(parts))

    def _flat(self, node: NodeProto) -> _Labels | None:
        """A map `(N, C, ...)` as a matrix whose columns are those of one channel after the other."""
        own, before, after = self.labels.get(node.input[0]), self._shape(node.input[0]), self._shape(node.output[0])
        if own is None or own.axis != 1 or before is None or after is None:
            return None
        if before[0] != 1 or after != (1, math.prod(before)):
            return None
        numbers = np.repeat(own.numbers, math.prod(before[2:]))
        if node.op_type == "Reshape":
            target = self.values.get(node.input[1])
            if target is None or not self._alone(node.input[1]):
                return None
            if target[1] > 0:
                self.sizes.append((node.input[1], 1, numbers))
            elif target[1] == 0:
                return None
        return _Labels(1, numbers)

    def _same_front(self, node: NodeProto) -> _Labels | None:
        own, before, after = self.labels.get(node.input[0]), self._shape(node.input[0]), self._shape(node.output[0])
        if own is None or own.axis != 1 or before is None or after is None or before[:2] != after[:2]:
            return None
        return own

    def _reduction(self, node: NodeProto) -> _Labels | None:
        own, before, after = self.labels.get(node.input[0]), self._shape(node.input[0]), self._shape(node.output[0])
        if own is None or own.axis != 1 or before is None or after is None or len(after) < 2:
            return None
        given = attribute_values(node).get("axes")
        if given is None and len(node.input) > 1 and node.input[1] in self.values:
            given = self.values[node.input[1]].reshape(-1).tolist()
        if not given or min(int(axis) % len(before) for axis in given) < 2:
            return None
        return own

    def _transpose(self, node: NodeProto) -> _Labels | None:
        own, shape = self.labels.get(node.input[0]), self._shape(node.input[0])
        if own is None or shape is None:
            return None
        order = list(attribute_values(node).get("perm", range(len(shape))[::-1]))
        return _Labels(order.index(own.axis), own.numbers)
