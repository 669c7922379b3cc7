"""Training copy: a MatMul with a 1-D factor becomes one of matrices, `(K)` read as `(1, K)` left and `(K, 1)` right.

ONNX Runtime's gradient of a 1-D factor is wrong or cannot be built.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite each MatMul with a 1-D factor."""
    return rewritten(model, {"MatMul": _matmul})


def _matmul(writer: Writer) -> None:
    left, right = writer.node.input
    a, b = writer.shape(left), writer.shape(right)
    if len(a) > 1 and len(b) > 1:
        raise Kept("both factors are matrices")
    if len(a) == 1:
        left = writer.reshape(left, [1, *a])
    if len(b) == 1:
        right = writer.reshape(right, [*b, 1])
    result = [*(a[:-1] if len(b) == 1 else b[:-2]), *(b[-1:] if len(b) > 1 else ())]
    writer.reshape(writer.add("MatMul", [left, right]), result, writer.node.output[0])
