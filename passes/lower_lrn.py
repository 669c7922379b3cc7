"""Training copy: LRN, whose sum over neighbouring channels becomes a 1×1 Conv with a band of ones.

y[c] = x[c] / (bias + alpha / size · sum x[j]²)^beta,    c - floor((size-1)/2) <= j <= c + ceil((size-1)/2)
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto

from onnxneutrino.reductions import float_shape
from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every LRN of a float32 tensor of known shape."""
    return rewritten(model, {"LRN": _lrn})


def _lrn(writer: Writer) -> None:
    source, shape = writer.node.input[0], float_shape(writer)
    size = writer.attribute("size", 1)
    channels = np.arange(shape[1])
    ahead = channels[None, :] - channels[:, None]
    band = (ahead >= -((size - 1) // 2)) & (ahead <= size // 2)
    weight = writer.attribute("alpha", 1e-4) / size * band.astype(np.float32)[:, :, None, None]
    flat = writer.reshape(source, [shape[0], shape[1], math.prod(shape[2:]), 1])
    near = writer.add("Conv", [writer.add("Mul", [flat, flat]), writer.store(weight)])
    base = writer.add("Add", [near, writer.store(writer.attribute("bias", 1.0))])
    divisor = writer.add("Pow", [base, writer.store(writer.attribute("beta", 0.75))])
    writer.reshape(writer.add("Div", [flat, divisor]), shape, writer.node.output[0])
