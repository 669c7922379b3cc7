"""Bring a model down to the newest opset that the installed runtime loads; what it computes stays the same.

After opset 21 most operators changed by the element types they allow only: their nodes stay as they are and the
opset is stamped anew. What differs for a node is looked up in the schemas of the installed `onnx`; a new operator
is rewritten by its formula in the ONNX operator specification, or refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import onnx.defs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxneutrino.errors import ModelError
from onnxneutrino.shapes import inferred
from onnxneutrino.walk import all_nodes, attribute_values, attributes, copied, fresh_name, graphs, opset, used_names

RUNTIME_OPSET = 21

Kinds: TypeAlias = Mapping[str, int]
Name: TypeAlias = Callable[[str], str]


def brought_down(model: ModelProto) -> ModelProto:
    """A copy in opset 21; the model itself where its opset is not newer.

    Raises:
        ModelError: a node has no equal in opset 21; see `too_new`.
    """
    version = opset(model)
    if version is None or version <= RUNTIME_OPSET:
        return model
    fault = too_new(model)
    if fault is not None:
        raise ModelError(fault)
    copy = copied(model)
    taken = used_names(copy)
    rewritten = any(_rewrite(node) is not None for node in all_nodes(copy.graph))
    kinds = _element_types(copy) if rewritten else {}
    for graph in reversed(list(graphs(copy.graph))):  # bodies first: their nodes are copied with the outer ones
        _bring_down(graph, version, kinds, lambda base: fresh_name(taken, base))
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = RUNTIME_OPSET
    return copy


def too_new(model: ModelProto) -> str | None:
    """One line about the first node that cannot be written in opset 21, None where there is none."""
    version = opset(model)
    if version is None or version <= RUNTIME_OPSET:
        return None
    for node in all_nodes(model.graph):
        what = _fault(node, version)
        if what is not None:
            return (
                f"node '{node.name or ', '.join(node.output)}': {what} is newer than the installed ONNX Runtime, "
                f"which knows opset {RUNTIME_OPSET}; export with opset {RUNTIME_OPSET}"
            )
    return None


@functools.cache
def _schemas(operator: str, version: int) -> tuple[onnx.defs.OpSchema, onnx.defs.OpSchema | None] | None:
    """The operator at `version` and at opset 21 (None: it is new), or None where it did not change since."""
    try:
        new = onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:  # no operator at all: that is the checker's to say
        return None
    if new.since_version <= RUNTIME_OPSET:
        return None
    try:
        return new, onnx.defs.get_schema(operator, RUNTIME_OPSET, "")
    except onnx.defs.SchemaError:
        return new, None


def _fault(node: NodeProto, version: int) -> str | None:
    """What of the node opset 21 does not have."""
    changed = _schemas(node.op_type, version) if node.domain in ("", "ai.onnx") else None
    if changed is None:
        return None
    new, old = changed
    if old is None:
        return None if _rewrite(node) is not None else node.op_type
    if len(node.input) > old.max_input or len(node.output) > old.max_output:
        return f"its use of {node.op_type}"
    given = attributes(node)
    for name, declared in new.attributes.items():
        known = old.attributes.get(name)
        if known is None and name in given and not _is_default(node, name, new):
            return f"attribute '{name}' of {node.op_type}"
        if known is not None and name not in given and known.default_value != declared.default_value:
            return f"the default of '{name}' of {node.op_type}"
    return None


def _is_default(node: NodeProto, name: str, schema: onnx.defs.OpSchema) -> bool:
    default = schema.attributes[name].default_value
    if not default.name:
        return False
    return bool(helper.get_attribute_value(attributes(node)[name]) == helper.get_attribute_value(default))


def _bring_down(graph: GraphProto, version: int, kinds: Kinds, name: Name) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        rewrite = _rewrite(node)
        if rewrite is not None:
            nodes += rewrite(node, kinds, name)
            continue
        changed = _schemas(node.op_type, version) if node.domain in ("", "ai.onnx") else None
        if changed is not None and changed[1] is not None:
            kept = [attribute for attribute in node.attribute if attribute.name in changed[1].attributes]
            del node.attribute[:]
            node.attribute.extend(kept)
        nodes.append(node)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _element_types(model: ModelProto) -> dict[str, int]:
    """Element types of all tensors that shape inference knows."""
    found: dict[str, int] = {}
    for graph in graphs(inferred(model).graph):
        for value in (*graph.input, *graph.value_info, *graph.output):
            found[value.name] = value.type.tensor_type.elem_type
        found.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    return found


class _Lines:
    """The nodes that replace one node, written one after the other."""

    def __init__(self, node: NodeProto, name: Name) -> None:
        self.nodes: list[NodeProto] = []
        self._node, self._name = node, name

    def __call__(self, operator: str, *inputs: str, last: bool = False, **values: Any) -> str:
        """Add a node; the name of its output, which is the replaced node's for the `last` one."""
        label = self._name(f"{self._node.name or self._node.output[0]}/{operator}")
        output = self._node.output[0] if last else self._name(f"{label}/output")
        self.nodes.append(helper.make_node(operator, inputs, [output], label, **values))
        return output


def _swish(node: NodeProto, kinds: Kinds, name: Name) -> list[NodeProto]:
    """`x · sigmoid(alpha x)`."""
    (x,) = node.input
    alpha = helper.get_attribute_value(attributes(node)["alpha"]) if "alpha" in attributes(node) else 1.0
    line = _Lines(node, name)
    inner = x if alpha == 1.0 else line("Mul", x, _scalar(line, float(alpha), x, kinds))
    line("Mul", x, line("Sigmoid", inner), last=True)
    return line.nodes


def _rms_normalization(node: NodeProto, kinds: Kinds, name: Name) -> list[NodeProto]:
    """`x / sqrt(mean(x², axes from axis on) + epsilon) · scale`, all but the last product in `stash_type`."""
    x, scale = node.input
    given = attribute_values(node)
    axis, epsilon = int(given.get("axis", -1)), float(given.get("epsilon", 1e-5))
    stash = int(given.get("stash_type", TensorProto.FLOAT))
    line = _Lines(node, name)
    exact = kinds.get(x) == stash
    wide = x if exact else line("Cast", x, to=stash)
    if axis < 0:
        axes = line("Constant", value_ints=list(range(axis, 0)))
    else:  # the rank may be unknown: count it when it runs
        ends = [line("Constant", value_int=axis), line("Size", line("Shape", x)), line("Constant", value_int=1)]
        axes = line("Range", *ends)
    mean = line("ReduceMean", line("Mul", wide, wide), axes, keepdims=1)
    shift = _scalar(line, epsilon, wide, {wide: stash})
    normal = line("Div", wide, line("Sqrt", line("Add", mean, shift)))
    line("Mul", normal if exact else line("CastLike", normal, x), scale, last=True)
    return line.nodes


def _scalar(line: _Lines, value: float, like: str, kinds: Kinds) -> str:
    """A constant of the element type of the tensor `like`."""
    constant = line("Constant", value_float=value)
    return constant if kinds.get(like) == TensorProto.FLOAT else line("CastLike", constant, like)


_REWRITES = {"Swish": _swish, "RMSNormalization": _rms_normalization}


def _rewrite(node: NodeProto) -> Callable[[NodeProto, Kinds, Name], list[NodeProto]] | None:
    return _REWRITES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
