"""What a model costs, computed from its graph: params, MACs, bytes on disk and in memory, all at batch 1.

Only what the graph outputs depend on counts, for the runtime drops the rest. A node with bodies (If, Loop,
Scan) is one node here: its constants are those of all its bodies, its MACs those of an If's dearer branch or
of one pass through a Loop's or Scan's body. Inside bodies, where static shape inference may not reach, a
tensor of unknown shape counts nothing; in the main graph it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxneutrino.errors import ModelError
from onnxneutrino.shapes import TensorType, declared_shape, element_dtype, inferred
from onnxneutrino.walk import copied, reads, subgraphs, tensors

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class NodeCost:
    """What one node costs at batch 1; `params` of a constant read by several nodes count at the first."""

    name: str
    op: str
    params: int
    macs: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class _Constant:
    """An initializer or the output of a Constant node."""

    type: TensorType
    elements: int
    floating: bool

    @property
    def size_bytes(self) -> int:
        return self.elements * self.type.dtype.itemsize


def params(model: ModelProto) -> int:
    """Count the elements of all float constants the graph outputs depend on.

    Initializers and Constant nodes of float16, bfloat16, float32 and float64, integers that a DequantizeLinear
    reads, BatchNormalization statistics and the bodies of If, Loop and Scan included; a constant that several
    nodes share counts once, a sparse one its stored values.
    """
    return sum(constant.elements for constant in _needed_constants(model.graph) if constant.floating)


def node_costs(model: ModelProto, types: Mapping[str, TensorType]) -> list[NodeCost]:
    """List every node of the main graph that the outputs depend on, Constant nodes aside, in graph order.

    Params and MACs add up to `params(model)` and `macs(model, types)`, but for constants that no node reads
    because they are themselves graph outputs.

    Args:
        model: the model.
        types: shapes and dtypes of the main graph's tensors at batch 1.

    Raises:
        ModelError: the shape of a Conv, ConvTranspose, Gemm or MatMul is not in `types`.
    """
    model = _with_body_shapes(model, types)
    constants = _constants(model.graph)
    scope = {**types, **{name: constant.type for name, constant in constants.items()}}
    seen: set[str] = set()
    costs = []
    for node in _needed_nodes(model.graph)[0]:
        if node.op_type == "Constant":
            continue
        read = set(reads(node))
        inner = sum(c.elements for body in subgraphs(node) for c in _needed_constants(body) if c.floating)
        outer = sum(constants[name].elements for name in (read & constants.keys()) - seen if constants[name].floating)
        seen |= read
        output = scope.get(node.output[0])
        costs.append(
            NodeCost(
                name=node.name,
                op=node.op_type,
                params=inner + outer,
                macs=_node_macs(node, scope, strict=True),
                output_shape=output.shape if output else (),
            )
        )
    return costs


def macs(model: ModelProto, types: Mapping[str, TensorType]) -> int:
    """Count the multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul at batch 1.

    - Conv: `Ho·Wo · O · I/groups · kh·kw`, padding counted like every other position.
    - ConvTranspose: `Hi·Wi · I · O/groups · kh·kw`, over the input positions.
    - Gemm: `M · N · K`.
    - MatMul: `batch · M · N · K`, the batch broadcast from both sides.

    Raises:
        ModelError: a shape it needs is not in `types`.
    """
    return sum(cost.macs for cost in node_costs(model, types))


def memory_bytes(model: ModelProto, types: Mapping[str, TensorType]) -> int:
    """Count the bytes of all constants and of the largest sum of live activations, at batch 1.

    Nodes run in graph order. A tensor lives from the node that makes it to its last use, a graph input from
    the start to its last use, a graph output to the end; a node's inputs and outputs are alive together, and
    so is the largest sum of its bodies. Constants of every type count, integers too.

    Raises:
        ModelError: the type of an activation is not in `types`.
    """
    model = _with_body_shapes(model, types)
    weights = sum(constant.size_bytes for constant in _needed_constants(model.graph))
    return weights + _peak_bytes(model.graph, types, strict=True)


def size_bytes(path: Path) -> int:
    """Add up the bytes on disk of an ONNX file and of the external data files it refers to.

    Raises:
        ModelError: a file is missing or cannot be parsed.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        files = {
            path.parent / entry.value
            for tensor in tensors(model)
            if tensor.data_location == TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return sum(file.stat().st_size for file in (path, *files))
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise ModelError(f"{path}: is not an ONNX file, or a damaged one; export it again") from error


def _node_macs(node: NodeProto, scope: Mapping[str, TensorType], strict: bool) -> int:
    branches = [_body_macs(body, scope) for body in subgraphs(node)]
    if branches:
        return max(branches) if node.op_type == "If" else sum(branches)
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    shapes = []
    for name in (node.input[0], node.input[1], node.output[0]):
        if name not in scope:
            if strict:
                raise _unknown(node, name)
            return 0
        shapes.append(scope[name].shape)
    left, right, out = shapes
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(out) * left[0 if transposed else 1]
    return math.prod(out) * left[-1]


def _body_macs(graph: GraphProto, outer: Mapping[str, TensorType]) -> int:
    scope = _scope(graph, outer)
    return sum(_node_macs(node, scope, strict=False) for node in _needed_nodes(graph)[0])


def _peak_bytes(graph: GraphProto, scope: Mapping[str, TensorType], strict: bool) -> int:
    """Largest sum of live activations of one graph; constants are not activations."""
    constants = _constants(graph)
    nodes = [node for node in _needed_nodes(graph)[0] if node.op_type != "Constant"]
    end = len(nodes)
    makers: dict[str, tuple[int, NodeProto | None]] = {
        value.name: (0, None) for value in graph.input if value.name not in constants
    }
    last = dict.fromkeys(makers, 0)
    bodies = [0] * (end + 1)
    for index, node in enumerate(nodes):
        makers.update({name: (index, node) for name in node.output if name})
        last.update({name: index for name in node.output if name})
        last.update({name: index for name in reads(node) if name in makers})
        for body in subgraphs(node):
            bodies[index] = max(bodies[index], _peak_bytes(body, _scope(body, scope), strict=False))
    last.update({value.name: end for value in graph.output if value.name in makers})
    # Bytes that become alive at a node and bytes that are freed after it: live sums are a running total.
    change = [0] * (end + 2)
    for name, (start, maker) in makers.items():
        if name not in scope:
            if strict:
                raise _unknown(maker, name)
            continue
        size = math.prod(scope[name].shape) * scope[name].dtype.itemsize
        change[start] += size
        change[last[name] + 1] -= size
    peak = live = 0
    for index in range(end + 1):
        live += change[index]
        peak = max(peak, live + bodies[index])
    return peak


def _unknown(node: NodeProto | None, tensor: str) -> ModelError:
    where = f"{node.op_type} {node.name}" if node is not None else f"input {tensor}"
    return ModelError(
        f"{where}: the shape of tensor '{tensor}' is unknown; fix free dimensions with --input-shape NAME=1x3x64x64"
    )


def _needed_nodes(graph: GraphProto) -> tuple[list[NodeProto], set[str]]:
    """Nodes the graph's outputs depend on, in order, and every name that they or the outputs refer to."""
    names = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if names.isdisjoint(node.output):
            continue
        nodes.append(node)
        names.update(reads(node))
    return nodes[::-1], names


def _needed_constants(graph: GraphProto) -> Iterator[_Constant]:
    """Constants the graph's outputs depend on, those of bodies included."""
    nodes, names = _needed_nodes(graph)
    for name, constant in _constants(graph).items():
        if name in names:
            yield constant
    for node in nodes:
        for body in subgraphs(node):
            yield from _needed_constants(body)


def _constants(graph: GraphProto) -> dict[str, _Constant]:
    """Initializers and Constant nodes of one graph, bodies aside, by tensor name."""
    found = {tensor.name: _dense(tensor) for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        found[sparse.values.name] = _sparse(sparse)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            found[node.output[0]] = _constant_node(node.attribute[0])
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in found:
            found[node.input[0]] = replace(found[node.input[0]], floating=True)  # weights, stored as integers
    return found


def _constant_node(attribute: AttributeProto) -> _Constant:
    if attribute.type == AttributeProto.TENSOR:
        return _dense(attribute.t)
    if attribute.type == AttributeProto.SPARSE_TENSOR:
        return _sparse(attribute.sparse_tensor)
    value = np.asarray(helper.get_attribute_value(attribute))
    floating = attribute.type in (AttributeProto.FLOAT, AttributeProto.FLOATS)
    dtype = np.dtype(np.float32) if floating else value.dtype
    return _Constant(TensorType(value.shape, dtype), value.size, floating)


def _dense(tensor: TensorProto) -> _Constant:
    kind = TensorType(tuple(tensor.dims), element_dtype(tensor.data_type))
    return _Constant(kind, math.prod(tensor.dims), tensor.data_type in FLOATS)


def _sparse(sparse: onnx.SparseTensorProto) -> _Constant:
    kind = element_dtype(sparse.values.data_type)
    stored = math.prod(sparse.values.dims)
    return _Constant(TensorType(tuple(sparse.dims), kind), stored, sparse.values.data_type in FLOATS)


def _scope(graph: GraphProto, outer: Mapping[str, TensorType]) -> dict[str, TensorType]:
    """Types visible inside a body: `outer`, its own constants and what shape inference left in it."""
    scope = {**outer, **{name: constant.type for name, constant in _constants(graph).items()}}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape, kind = declared_shape(value), value.type.tensor_type.elem_type
        if value.name in scope or shape is None or not kind:
            continue
        numbers = tuple(size for size in shape if isinstance(size, int))
        if len(numbers) == len(shape):
            scope[value.name] = TensorType(numbers, element_dtype(kind))
    return scope


def _with_body_shapes(model: ModelProto, types: Mapping[str, TensorType]) -> ModelProto:
    """Infer the shapes inside bodies from those of the main graph; the model itself where it has no body."""
    if not any(True for node in model.graph.node for _ in subgraphs(node)):
        return model
    copy = copied(model)
    graph = copy.graph
    known = {
        name: helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind.dtype), kind.shape)
        for name, kind in types.items()
    }
    declared = [*graph.input, *graph.output]
    for value in declared:
        value.CopyFrom(known.pop(value.name, value))
    del graph.value_info[:]
    graph.value_info.extend(known.values())
    return inferred(copy)
