"""Walks through a graph and the graphs within its nodes: who makes a tensor, who reads it, what is named."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper


def copied(model: ModelProto) -> ModelProto:
    """A copy that shares nothing with the model."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def opset(model: ModelProto) -> int | None:
    """Version of the ai.onnx operators the model uses, None where it imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def attributes(node: NodeProto) -> dict[str, AttributeProto]:
    """A node's attributes by name."""
    return {attribute.name: attribute for attribute in node.attribute}


def attribute_values(node: NodeProto) -> dict[str, Any]:
    """The values of a node's attributes by name, as Python holds them."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs within it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Nodes of the graph and of all graphs within it."""
    for inner in graphs(graph):
        yield from inner.node


def named_tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every constant of the graphs with its name; a Constant node's is that of its output."""
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.values
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    yield node.output[0], attribute.t


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every constant of the model, local functions included."""
    for _, tensor in named_tensors(model):
        yield tensor
    for function in model.functions:
        for node in function.node:
            yield from (attribute.t for attribute in node.attribute if attribute.type == AttributeProto.TENSOR)


def data_bytes(model: ModelProto) -> int:
    """Bytes of the tensors, about; of those whose data is in a file too."""
    return sum(tensor_bytes(tensor) for tensor in tensors(model))


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor, about, wherever its data is."""
    if tensor.data_location == TensorProto.EXTERNAL:
        given = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        return (
            given[0] if given else math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        )
    return int(tensor.ByteSize())  # `len(raw_data)` would copy the data


def used_names(model: ModelProto) -> set[str]:
    """Every tensor and node name of the model, those of subgraphs included."""
    names: set[str] = set()
    for graph in graphs(model.graph):
        names.update(value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer))
        for node in graph.node:
            names.update((node.name, *node.input, *node.output))
    return names


def fresh_name(taken: set[str], base: str) -> str:
    """`base`, or `base_1`, `base_2` ... where it is taken; the name is added to `taken`."""
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def reads(node: NodeProto) -> list[str]:
    """Tensors a node reads: its inputs, and what its subgraphs take from outside."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        names += _captured(graph)
    return names


def _captured(graph: GraphProto) -> list[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own.update(sparse.values.name for sparse in graph.sparse_initializer)
    own.update(name for node in graph.node for name in node.output)
    wanted = [name for node in graph.node for name in reads(node)] + [value.name for value in graph.output]
    return [name for name in dict.fromkeys(wanted) if name not in own]


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto | None]]:
    """The readers of each tensor, one entry per use; None stands for the graph's own outputs.

    A tensor that a subgraph captures counts as read by the node that holds the subgraph.
    """
    found: dict[str, list[NodeProto | None]] = {}
    for node in graph.node:
        for name in reads(node):
            found.setdefault(name, []).append(node)
    for value in graph.output:
        found.setdefault(value.name, []).append(None)
    return found


def read_behind(graph: GraphProto, names: Collection[str]) -> set[str]:
    """All that is read by nodes that read one of `names`, and by nodes that what these compute gets to."""
    found, reached = set[str](), set(names)
    for node in graph.node:
        own = set(reads(node))
        if own & reached:
            reached.update(node.output)
            found |= own
    return found


def replace_uses(graph: GraphProto, old: str, new: str) -> None:
    """Let every node, those of subgraphs included, read `new` where it reads `old`, in place.

    ONNX forbids an inner name that hides an outer one, so renaming inside subgraphs is safe. Graph outputs
    keep their names.
    """
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for inner in subgraphs(node):
            replace_uses(inner, old, new)
            for value in inner.output:
                if value.name == old:
                    value.name = new


def name_nodes(graph: GraphProto) -> None:
    """Give every unnamed node, and every second one of a name, the name `<op>_<index>`, in place."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = fresh_name(taken, f"{node.op_type}_{index}")
        seen.add(node.name)
