"""What a graph may ask for: demands that no real model has, refused before a library takes them at their word.

ONNX Runtime divides by a stride of zero, shape inference lays out a Range of 2^62 elements, and both take time that
doubles with every body within a body. None of it can be caught once it has begun.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from onnxneutrino.shapes import TensorType, declared_shape
from onnxneutrino.walk import attributes, data_bytes, named_tensors, reads, subgraphs
from onnxneutrino.weights import hidden

MOST_NODES = 20_000
MOST_TENSORS = 50_000
DEEPEST = 8  # bodies within bodies: ONNX Runtime 1.19.2 takes 0.1 s at 8, 0.7 s at 12, 12 s at 16
DEEPEST_CALLS = 64  # local functions that call each other
LARGEST_ATTRIBUTE = 2**31 - 1
POSITIVE = frozenset({"strides", "dilations", "kernel_shape", "group", "blocksize"})
BOUNDED = frozenset({"pads", "output_padding", "output_shape", "shape", "hidden_size", "block_size", "num_outputs"})
# What is computed from constants alone, beside four times the constants themselves: masks and tables are far smaller.
COMPUTED_BYTES = 2**28
COMPUTED_FACTOR = 4
MEMORY_SHARE = 0.5
RANKS = {"Conv": (3, math.inf), "ConvTranspose": (3, math.inf), "Gemm": (2, 2), "MatMul": (1, math.inf)}


def structure_fault(model: ModelProto) -> str | None:
    """One line about the first thing in the nodes that libraries do not survive, or None; local functions too.

    Counted are the nodes that are there once local functions are inlined.
    """
    calls = {(function.domain, function.name): function.node for function in model.functions}
    bodies: dict[tuple[str, str], tuple[int, int]] = {}

    def measured(nodes: Iterable[NodeProto], open_: tuple[tuple[str, str], ...]) -> tuple[int, int]:
        """Nodes with everything within them, and how deep the bodies go."""
        count, deepest = 0, 0
        for node in nodes:
            count += 1
            key = (node.domain, node.op_type)
            inner = [measured(body.node, open_) for body in subgraphs(node)]
            within = 1
            if key in calls:
                if key in open_ or len(open_) >= DEEPEST_CALLS:
                    how = "calls itself" if key in open_ else f"is the end of more than {DEEPEST_CALLS} nested calls"
                    raise _FaultError(f"local function '{node.op_type}' {how}; export the model without functions")
                if key not in bodies:
                    bodies[key] = measured(calls[key], (*open_, key))
                inner, within = [*inner, bodies[key]], 0
            count += sum(below for below, _ in inner)
            deepest = max([deepest, *(depth + within for _, depth in inner)])
            if count > MOST_NODES:
                raise _FaultError(f"has more than {MOST_NODES} nodes; export a smaller part of it")
            if deepest > DEEPEST:
                raise _FaultError(f"has graphs nested deeper than {DEEPEST}; export it without nested If and Loop")
            _check_node(node, inside_function=bool(open_))
        return count, deepest

    try:
        _check_texts(model)
        measured(model.graph.node, ())
        _check_ranks(model.graph)
        for key, nodes in calls.items():
            measured(nodes, (key,))
        _check_tensors(model)
    except _FaultError as fault:
        return str(fault)
    return None


class _FaultError(Exception):
    """What is wrong, in one line."""


def _check_texts(model: ModelProto) -> None:
    """Refuse text that is not UTF-8: reading it gives bytes, and copying it fails."""
    waiting: list[Message] = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, TensorProto):  # whose data listing would copy
            waiting += [*message.external_data, *message.metadata_props]
            texts: list[Any] = [message.name, message.doc_string]
        else:
            texts = []
            for field, value in message.ListFields():
                values = [value] if isinstance(value, (str, bytes, Message)) else value
                if field.type == FieldDescriptor.TYPE_STRING:
                    texts += values
                elif field.type == FieldDescriptor.TYPE_MESSAGE:
                    waiting += values
        if any(isinstance(text, bytes) for text in texts):
            raise _FaultError("a name in it is not UTF-8: the file is damaged; export or download it again")


def _check_node(node: NodeProto, inside_function: bool) -> None:
    where = f"node '{node.name or ', '.join(node.output)}'"
    if not node.output:
        raise _FaultError(f"{where} ({node.op_type}) has no outputs; export the model again")
    for name, attribute in attributes(node).items():
        if attribute.ref_attr_name and not inside_function:
            raise _FaultError(f"{where} takes {name} from a function that is not there; export the model again")
        if name not in POSITIVE and name not in BOUNDED:
            continue
        least = 1 if name in POSITIVE else -LARGEST_ATTRIBUTE
        for value in (attribute.i,) if attribute.type == AttributeProto.INT else attribute.ints:
            if not least <= value <= LARGEST_ATTRIBUTE:
                raise _FaultError(f"{where} has {name} {value}; export the model again")


def _check_ranks(graph: GraphProto) -> None:
    """Refuse weights whose rank their operator does not take: whoever reads them relies on it."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        least, most = RANKS.get(node.op_type, (0, math.inf))
        for name in node.input[1:2]:
            if not least <= ranks.get(name, least) <= most:
                where = f"node '{node.name or ', '.join(node.output)}' ({node.op_type})"
                raise _FaultError(f"{where} has a weight '{name}' of {ranks[name]} dimensions; export the model again")


def _check_tensors(model: ModelProto) -> None:
    count = len(model.graph.initializer) + len(model.graph.input) + len(model.graph.output)
    if count > MOST_TENSORS:
        raise _FaultError(f"has more than {MOST_TENSORS} inputs, outputs and weights; export a smaller part of it")
    known = set(TensorProto.DataType.values())
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type not in known:
            kind = value.type.tensor_type.elem_type
            raise _FaultError(f"tensor '{value.name}' has the element type {kind}, which ONNX does not have")
    for name, tensor in named_tensors(model):
        if tensor.data_type not in known or any(size < 0 for size in tensor.dims):
            raise _FaultError(f"tensor '{name}' is damaged: element type {tensor.data_type}, {_text(tensor.dims)}")


def size_fault(model: ModelProto, types: Mapping[str, TensorType]) -> str | None:
    """One line about a tensor that this machine cannot hold, or None.

    Args:
        model: the model.
        types: what shape inference knows of its tensors at batch 1.
    """
    most = MEMORY_SHARE * memory_bytes()
    for name, own in types.items():
        size = math.prod(own.shape) * own.dtype.itemsize
        if size > most:
            return (
                f"tensor '{name}' of {_text(own.shape)} takes {size / 1e9:.3g} GB at batch 1, more than half of "
                "this machine's memory; give a smaller --input-shape, or export the model for smaller inputs"
            )
    return None


def constant_fault(model: ModelProto) -> str | None:
    """One line about constants that would be computed into far more bytes than the model has, or None.

    Every library folds them. Sizes are inferred without following values: that alone lays some of them out.
    """
    allowed = COMPUTED_FACTOR * data_bytes(model) + COMPUTED_BYTES
    fault = "constants of the graph would become {:.3g} GB ('{}'); export the model with constants folded"
    total = 0
    for name, sparse in _sparse_tensors(model.graph):
        total += math.prod(sparse.dims) * 8
        if total > allowed:
            return fault.format(total / 1e9, name)
    try:
        graph = onnx.shape_inference.infer_shapes(hidden(model)).graph
    except Exception:  # a model that the checker, or the runtime, refuses
        return None
    known = {value.name: value for value in graph.value_info}
    made = {tensor.name for tensor in graph.initializer} | {"", *(name for name, _ in _sparse_tensors(graph))}
    for node in graph.node:
        if not made.issuperset(reads(node)):
            continue
        made.update(node.output)
        for name in node.output:
            if name not in known or node.op_type == "Constant":
                continue
            sizes = declared_shape(known[name]) or ()
            numbers = [size for size in sizes if isinstance(size, int)]
            if len(numbers) == len(sizes):
                total += math.prod(numbers) * _width(known[name].type.tensor_type.elem_type)
            if total > allowed:
                return fault.format(total / 1e9, name)
    return None


def _width(kind: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize) if kind else 1


def _sparse_tensors(graph: GraphProto) -> Iterator[tuple[str, SparseTensorProto]]:
    """Sparse constants of the main graph, by the name of the dense tensor that they become."""
    yield from ((sparse.values.name, sparse) for sparse in graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                yield node.output[0], attribute.sparse_tensor


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(shape: Sequence[int]) -> str:
    return f"shape [{', '.join(map(str, shape))}]"
