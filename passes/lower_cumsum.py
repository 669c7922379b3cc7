"""Training copy: CumSum becomes a product with a triangular matrix of ones.

y = T x along the axis, with T[i, j] = 1 where j <= i (exclusive: j < i); `reverse` transposes T. The tensor is seen
as `[before, n, after]` around an axis of length n.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten

LARGEST = 4096  # of n: the matrix has n² elements


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every CumSum of float tensors along a constant axis."""
    return rewritten(model, {"CumSum": _cumsum})


def _cumsum(writer: Writer) -> None:
    source, target = writer.node.input[0], writer.node.output[0]
    shape, axis = writer.shape(source), writer.constant(1)
    if writer.dtype(source) != np.float32:
        raise Kept("its input is not float")
    if axis is None or not shape:
        raise Kept("it has no axis")
    along = int(axis.reshape(-1)[0]) % len(shape)
    length = shape[along]
    if length > LARGEST:
        raise Kept(f"its axis has {length} elements, more than {LARGEST}")
    ones = np.tri(length, k=-1 if writer.attribute("exclusive", 0) else 0)
    matrix = writer.store(ones.T if writer.attribute("reverse", 0) else ones)
    folded = writer.reshape(source, (math.prod(shape[:along]), length, math.prod(shape[along + 1 :])))
    writer.reshape(writer.add("MatMul", [matrix, folded]), shape, target)
