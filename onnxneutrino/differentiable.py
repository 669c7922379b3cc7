"""Which operators the training runtime differentiates rightly, and where a gradient passes in a graph.

Known from measurement (fixtures/operators, docs/operators.md): ONNX Runtime 1.19.2, CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto

from onnxneutrino.walk import attribute_values, reads

# fmt: off
TRAINABLE_OPERATORS = frozenset((
    "Conv", "Gemm", "MatMul", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Clip", "Max", "Min", "MaxPool",
    "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "Softmax", "LogSoftmax", "Concat",
    "Slice", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather",
    "Where", "TopK", "Add", "Sub", "Mul", "Div", "Pow", "Exp", "Log", "Sqrt", "Abs", "Neg", "Erf", "Sin", "Cos",
    "Identity", "Cast", "Dropout", "Constant", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "Trilu",
    "SoftmaxCrossEntropyLoss",
))
# Their output is a mask, an index, a shape or made of these: no gradient is asked through them.
WITHOUT_DERIVATIVE = frozenset((
    "Shape", "Size", "ConstantOfShape", "Range", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not",
    "And", "Or", "Xor", "IsNaN", "IsInf", "ArgMax", "ArgMin", "NonZero",
    "EyeLike", "OneHot",
))
# fmt: on


def differentiated(model: ModelProto, trainable: Sequence[str], outputs: Sequence[str]) -> list[NodeProto]:
    """Nodes through which a gradient passes on its way from `outputs` to a trainable initializer."""
    reached = set(trainable)
    after: list[NodeProto] = []
    for node in model.graph.node:
        if carries_gradient(node) and not reached.isdisjoint(reads(node)):
            reached |= set(node.output)
            after.append(node)
    needed = set(outputs)
    found = []
    for node in reversed(after):
        if needed & set(node.output):
            needed |= set(reads(node))
            found.append(node)
    return found[::-1]


def untrainable(model: ModelProto, trainable: Sequence[str], outputs: Sequence[str]) -> list[tuple[str, str]]:
    """Nodes `(name, operator)` on the way from a trainable initializer to the loss that have no right gradient."""
    passed = differentiated(model, trainable, outputs)
    return [(node.name, node.op_type) for node in passed if not has_gradient(node)]


def carries_gradient(node: NodeProto) -> bool:
    """Whether a node's output depends on its float inputs' values other than as a mask, an index or a shape."""
    return node.domain not in ("", "ai.onnx") or node.op_type not in WITHOUT_DERIVATIVE


def has_gradient(node: NodeProto) -> bool:
    """Whether the training runtime's gradient of this node is known to be right."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in TRAINABLE_OPERATORS | WITHOUT_DERIVATIVE:
        return False
    attributes = attribute_values(node)
    if node.op_type == "Pad":
        return bool(attributes.get("mode", b"constant") == b"constant")
    if node.op_type in ("ScatterElements", "ScatterND"):
        return bool(attributes.get("reduction", b"none") == b"none")
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return False
    if node.op_type == "Conv":
        return attributes.get("group", 1) == 1 or len(attributes.get("kernel_shape", (1, 1))) == 2
    if attributes.get("ceil_mode", 0) and node.op_type in ("AveragePool", "MaxPool") and not _covers(attributes):
        return False
    if node.op_type == "AveragePool":
        return len(attributes.get("kernel_shape", ())) < 3 and set(attributes.get("dilations", (1,))) == {1}
    if node.op_type == "MaxPool":
        return not attributes.get("storage_order", 0)
    return True


def _covers(pool: Mapping[str, Any]) -> bool:
    """Whether no window of a pool with `ceil_mode` can start behind the data: what it gives is not defined."""
    kernel = pool["kernel_shape"]
    ones, after = [1] * len(kernel), pool.get("pads", [0, 0] * len(kernel))[len(kernel) :]
    axes = zip(kernel, pool.get("strides", ones), pool.get("dilations", ones), after, strict=True)
    return all((size - 1) * dilation + 1 >= stride + end for size, stride, dilation, end in axes)
