"""Training copy: operators that left ONNX, which ONNX Runtime still runs, in today's operators of any opset.

Affine         y = alpha x + beta
ImageScaler    y = scale x + bias[c] on axis 1
Crop           border (left, top, right, bottom) cut off axes 2 and 3, or `scale` (height, width) from (top, left) on
ScaledTanh     y = alpha tanh(beta x)
Scale          y = scale x
ParametricSoftplus   y = alpha Softplus(beta x), whose own pass follows

No schema, hence no shape inference and no conversion of the opset, gets past them: they go first.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten

FIRST_SLICE_WITH_INPUTS = 10
TO_THE_END = np.iinfo(np.int64).max


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every one of them."""
    rewrites = {
        "Affine": _affine,
        "ImageScaler": _image_scaler,
        "Crop": _crop,
        "Scale": _scale,
        "ScaledTanh": lambda writer: _scaled(writer, "Tanh"),
        "ParametricSoftplus": lambda writer: _scaled(writer, "Softplus"),
    }
    return rewritten(model, rewrites)


def _affine(writer: Writer) -> None:
    scaled = writer.add("Mul", [writer.node.input[0], writer.store(writer.attribute("alpha", 1.0))])
    writer.add("Add", [scaled, writer.store(writer.attribute("beta", 0.0))], writer.node.output[0])


def _image_scaler(writer: Writer) -> None:
    bias = np.asarray(writer.attribute("bias", [0.0]), np.float32)
    scaled = writer.add("Mul", [writer.node.input[0], writer.store(writer.attribute("scale", 1.0))])
    writer.add("Add", [scaled, writer.store(bias.reshape(-1, 1, 1))], writer.node.output[0])


def _scale(writer: Writer) -> None:
    writer.add("Mul", [writer.node.input[0], writer.store(writer.attribute("scale", 1.0))], writer.node.output[0])


def _scaled(writer: Writer, curve: str) -> None:
    inner = writer.add("Mul", [writer.node.input[0], writer.store(writer.attribute("beta", 1.0))])
    bent = writer.add(curve, [inner])
    writer.add("Mul", [bent, writer.store(writer.attribute("alpha", 1.0))], writer.node.output[0])


def _crop(writer: Writer) -> None:
    border, size = writer.attribute("border", []), writer.attribute("scale", [])
    if len(border) != 4:
        raise Kept("its border has not four numbers")
    left, top, right, bottom = border
    ends = [top + size[0], left + size[1]] if len(size) else [-bottom or TO_THE_END, -right or TO_THE_END]
    source, target = writer.node.input[0], writer.node.output[0]
    if writer.opset < FIRST_SLICE_WITH_INPUTS:
        writer.add("Slice", [source], target, axes=[2, 3], starts=[top, left], ends=ends)
    else:
        bounds = [writer.store(values, np.int64) for values in ([top, left], ends, [2, 3])]
        writer.add("Slice", [source, *bounds], target)
