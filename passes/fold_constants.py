"""Fold what only lays out, casts or dequantizes a constant into a new initializer: weights stand ready to be read.

Exporters reach a weight through Transpose, Reshape, Flatten, Cast, or DequantizeLinear,
`y = (x - zero point) · scale` per tensor, per axis or per block. The new initializer has the name of the node's
output. A node that makes more elements than it reads (Expand, Tile) is none of these and stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxneutrino.graph import Tensor, arrays, attributes, complete_inputs, consumers, copied, element_dtype

LAYOUT = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
SMALL = 1024  # elements: a second copy of fewer costs nothing
MADE_FLOAT = "quantized or half-precision weights are folded: the output holds them as {}"


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Fold in graph order, so that chains of such nodes vanish as a whole.

    A node stays whose output is a graph output, or whose constant has other readers too: both would hold it then.
    """
    copy = copied(model)
    graph = copy.graph
    values = arrays(model)
    readers = consumers(graph)
    notes: list[str] = []
    widened: set[str] = set()
    for node in list(graph.node):
        if not _is_foldable(node, values, readers):
            continue
        source, value = values[node.input[0]], _computed(node, values, model)
        if value.dtype.kind not in "fiub":
            continue
        target = node.output[0]
        graph.node.remove(node)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), target))
        values[target] = value
        for name in set(node.input):
            readers[name] = [reader for reader in readers[name] if reader is not node]
        notes.append(f"{node.op_type} {node.name} folded into weights")
        if value.nbytes > source.nbytes and value.size >= SMALL:
            widened.add(str(value.dtype))
    if not notes:
        return copy, notes
    _drop_sources(graph, {name for name, left in readers.items() if not left and name in values})
    if widened:
        notes.append(MADE_FLOAT.format(" and ".join(sorted(widened))))
    return complete_inputs(copy), notes


def _is_foldable(node: NodeProto, values: Mapping[str, Tensor], readers: Mapping[str, list[NodeProto | None]]) -> bool:
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return False
    given = attributes(node)
    casts = node.op_type == "Cast" and given["to"].i in FLOATS
    if not (casts or node.op_type in LAYOUT or node.op_type == "DequantizeLinear"):
        return False
    if any(name and name not in values for name in node.input) or None in readers.get(node.output[0], []):
        return False
    source = values[node.input[0]]
    if casts and source.dtype not in (np.float32, np.float16):
        return False
    alone = all(reader is node for reader in readers[node.input[0]])
    return alone or source.size < SMALL


def _computed(node: NodeProto, values: Mapping[str, Tensor], model: ModelProto) -> Tensor:
    """The node's output, from the definition of the operator at the model's opset."""
    if node.op_type == "DequantizeLinear":
        return _dequantized(node, values)
    constants = [numpy_helper.from_array(values[name], name) for name in dict.fromkeys(node.input) if name]
    graph = helper.make_graph([node], "constant", [], [helper.make_empty_tensor_value_info(node.output[0])], constants)
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return np.asarray(next(iter(ReferenceEvaluator(single).run(None, {}))))


def _dequantized(node: NodeProto, values: Mapping[str, Tensor]) -> Tensor:
    """`(x - zero point) · scale` in float32; `scale` is a number, `(x.shape[axis],)`, or x's shape in blocks."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    x, scale = (values[name] for name in node.input[:2])
    zero = values[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros_like(scale)
    axis, block = given.get("axis", 1), given.get("block_size", 0)

    def spread(value: Tensor) -> NDArray[np.float64]:
        if block:
            value = np.repeat(value, block, axis).take(range(x.shape[axis]), axis)
        elif value.size > 1:
            value = value.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])
        else:
            value = value.reshape(())
        return value.astype(np.float64)  # exact for every stored type

    kind = given.get("output_dtype", 0)
    shifted: NDArray[np.float64] = x.astype(np.float64) - spread(zero)
    product = shifted.astype(np.float32) * spread(scale).astype(np.float32)
    return np.asarray(product, element_dtype(kind) if kind else scale.dtype)


def _drop_sources(graph: GraphProto, unread: set[str]) -> None:
    for index in reversed(range(len(graph.node))):
        if graph.node[index].op_type == "Constant" and graph.node[index].output[0] in unread:
            del graph.node[index]
    gone = {tensor.name for tensor in graph.initializer} & unread
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in gone:
            del graph.initializer[index]
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in gone:
            del graph.input[index]
