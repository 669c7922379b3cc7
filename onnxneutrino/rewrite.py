"""Replace single nodes of a training copy by others: what the lowering passes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxneutrino.graph import arrays, copied, fresh_name, opset, tensor_types, used_names
from onnxneutrino.shapes import TensorType

# The first opset in which these reductions take their axes as an input.
_AXES_INPUT = {"ReduceSum": 13}
_AXES_INPUT_ELSE = 18


class Kept(Exception):  # noqa: N818 - it ends a rewrite, not a run
    """A node cannot be rewritten; the text says why."""


class Writer:
    """The node that is replaced, what is known about it, and the nodes that take its place.

    Attributes:
        node: the node; its outputs must be written by the new nodes.
        opset: of the graph.
    """

    def __init__(
        self,
        node: NodeProto,
        version: int,
        types: Mapping[str, TensorType],
        constants: Mapping[str, NDArray[Any]],
        taken: set[str],
    ) -> None:
        self.node = node
        self.opset = version
        self.nodes: list[NodeProto] = []
        self.stored: dict[str, NDArray[Any]] = {}
        self._types = types
        self._constants = constants
        self._taken = taken
        self._prefix = f"{node.name or node.output[0]}.{node.op_type}"

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute's value, text as str, or `default`."""
        for own in self.node.attribute:
            if own.name == name:
                value = helper.get_attribute_value(own)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def input(self, index: int) -> str | None:
        """Name of an input, None where it is absent or empty."""
        return self.node.input[index] if index < len(self.node.input) and self.node.input[index] else None

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Static shape of a tensor that was in the graph before.

        Raises:
            Kept: it is not known.
        """
        if tensor in self._constants:
            return tuple(self._constants[tensor].shape)
        if tensor not in self._types:
            raise Kept(f"the shape of '{tensor}' is unknown")
        return self._types[tensor].shape

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """Element type of a tensor that was in the graph before.

        Raises:
            Kept: it is not known.
        """
        if tensor in self._constants:
            return self._constants[tensor].dtype
        if tensor not in self._types:
            raise Kept(f"the type of '{tensor}' is unknown")
        return self._types[tensor].dtype

    def is_constant(self, index: int) -> bool:
        """Whether an input is absent or a constant."""
        name = self.input(index)
        return name is None or name in self._constants

    def constant(self, index: int) -> NDArray[Any] | None:
        """Value of an input; None where it is absent.

        Raises:
            Kept: it is computed at run time.
        """
        name = self.input(index)
        if name is None:
            return None
        if name not in self._constants:
            raise Kept(f"input '{name}' is computed at run time")
        return self._constants[name]

    def store(self, value: Any, dtype: Any = np.float32) -> str:
        """A new constant; its name."""
        name = fresh_name(self._taken, f"{self._prefix}.constant")
        self.stored[name] = np.asarray(value, dtype)
        return name

    def number(self, value: float) -> str:
        """A new scalar of the type of the node's first input, float32 where that is unknown; its name."""
        known = self._types.get(self.node.input[0])
        return self.store(value, known.dtype if known else np.float32)

    def add(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """A new node with one output; the output's name, a fresh one unless it is given."""
        target = output or fresh_name(self._taken, f"{self._prefix}.{operator}.output")
        name = fresh_name(self._taken, f"{self._prefix}.{operator}")
        self.nodes.append(helper.make_node(operator, list(inputs), [target], name, **attributes))
        return target

    def reduce(
        self, operator: str, tensor: str, axes: Sequence[int], output: str | None = None, keepdims: int = 1
    ) -> str:
        """A reduction over `axes`, as the graph's opset writes it."""
        if self.opset >= _AXES_INPUT.get(operator, _AXES_INPUT_ELSE):
            return self.add(operator, [tensor, self.store(list(axes), np.int64)], output, keepdims=keepdims)
        return self.add(operator, [tensor], output, axes=list(axes), keepdims=keepdims)

    def reshape(self, tensor: str, shape: Sequence[int], output: str | None = None) -> str:
        """A Reshape to a fixed shape."""
        return self.add("Reshape", [tensor, self.store(list(shape), np.int64)], output)

    def slice(self, tensor: str, axis: int, start: int, end: int) -> str:
        """The part of a tensor from `start` to before `end` of one axis."""
        return self.add("Slice", [tensor, *(self.store([value], np.int64) for value in (start, end, axis))])


Rewrite: TypeAlias = Callable[[Writer], None]


def rewritten(model: ModelProto, rewrites: Mapping[str, Rewrite]) -> tuple[ModelProto, list[str]]:
    """A copy in which every standard node of these operators is replaced by what its rewrite adds.

    Nodes within the bodies of If, Loop and Scan stay. A rewrite that raises `Kept` leaves its node.

    Args:
        model: inputs with fixed shapes, or what needs them is kept.
        rewrites: by operator.

    Returns:
        The copy, the model itself where every node is kept, and one line per node rewritten or kept.
    """
    chosen = [node for node in model.graph.node if node.op_type in rewrites and node.domain in ("", "ai.onnx")]
    if not chosen:
        return model, []
    types, constants, taken = tensor_types(model, {}), arrays(model), used_names(model)
    version = opset(model) or 0
    nodes: list[NodeProto] = []
    stored: dict[str, NDArray[Any]] = {}
    notes: list[str] = []
    changed = False
    for node in model.graph.node:
        if node.op_type not in rewrites or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        writer = Writer(node, version, types, constants, taken)
        try:
            rewrites[node.op_type](writer)
        except Kept as reason:
            nodes.append(node)
            notes.append(f"{node.op_type} {node.name} kept: {reason}")
            continue
        nodes.extend(writer.nodes)
        stored |= writer.stored
        changed = True
        notes.append(
            f"{node.op_type} {node.name} lowered to {', '.join(dict.fromkeys(n.op_type for n in writer.nodes))}"
        )
    if not changed:
        return model, notes
    copy = copied(model)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return copy, notes
