"""Training copy: normalizations by mean and variance become ReduceMean, Sqrt and arithmetic.

    y = scale (x - mean) / sqrt(variance + epsilon) + bias

over all positions of a channel (InstanceNormalization) or of a group of channels (GroupNormalization), over the last
axes (LayerNormalization), or over chosen axes without scale, bias and epsilon (MeanVarianceNormalization, which adds
1e-9 to the deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx import ModelProto

from onnxneutrino.reductions import float_shape, root
from onnxneutrino.rewrite import Kept, Writer, rewritten

FIRST_OPSET_WITH_SCALE_PER_CHANNEL = 21
SMALLEST_DEVIATION = 1e-9
EPSILON = 1e-5


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every such normalization of a float32 tensor of known shape."""
    rewrites = {
        "InstanceNormalization": _instance,
        "GroupNormalization": _group,
        "LayerNormalization": _layer,
        "MeanVarianceNormalization": _mean_variance,
    }
    return rewritten(model, rewrites)


def _standardized(writer: Writer, tensor: str, axes: Sequence[int]) -> str:
    mean = writer.reduce("ReduceMean", tensor, axes)
    centred = writer.add("Sub", [tensor, mean])
    return writer.add("Mul", [centred, _inverse_deviation(writer, centred, axes)])


def _inverse_deviation(writer: Writer, centred: str, axes: Sequence[int], output: str | None = None) -> str:
    variance = writer.reduce("ReduceMean", writer.add("Mul", [centred, centred]), axes)
    epsilon = writer.store(writer.attribute("epsilon", EPSILON))
    deviation = writer.add("Sqrt", [writer.add("Add", [variance, epsilon])])
    return writer.add("Div", [writer.store(1.0), deviation], output)


def _scaled(writer: Writer, value: str, form: Sequence[int], output: str | None = None) -> str:
    scale, bias = (writer.reshape(writer.node.input[index], form) for index in (1, 2))
    return writer.add("Add", [writer.add("Mul", [value, scale]), bias], output)


def _instance(writer: Writer) -> None:
    rank = len(float_shape(writer))
    value = _standardized(writer, writer.node.input[0], range(2, rank))
    _scaled(writer, value, [-1, *[1] * (rank - 2)], writer.node.output[0])


def _group(writer: Writer) -> None:
    shape, groups = float_shape(writer), writer.attribute("num_groups", None)
    if not groups or shape[1] % groups:
        raise Kept(f"{shape[1]} channels do not fall into {groups} groups")
    size = math.prod(shape[1:]) // groups
    value = _standardized(writer, writer.reshape(writer.node.input[0], [shape[0], groups, size]), [2])
    if writer.opset < FIRST_OPSET_WITH_SCALE_PER_CHANNEL:
        writer.reshape(_scaled(writer, value, [groups, 1]), shape, writer.node.output[0])
    else:
        _scaled(writer, writer.reshape(value, shape), [-1, *[1] * (len(shape) - 2)], writer.node.output[0])


def _layer(writer: Writer) -> None:
    source, rank = writer.node.input[0], len(float_shape(writer))
    axes = range(writer.attribute("axis", -1) % rank, rank)
    outputs = [*writer.node.output, "", ""]
    mean = writer.reduce("ReduceMean", source, axes, outputs[1] or None)
    centred = writer.add("Sub", [source, mean])
    inverse = _inverse_deviation(writer, centred, axes, outputs[2] or None)
    bias, output = writer.input(2), writer.node.output[0]
    value = writer.add("Mul", [centred, inverse])
    scaled = writer.add("Mul", [value, writer.node.input[1]], None if bias else output)
    if bias:
        writer.add("Add", [scaled, bias], output)


def _mean_variance(writer: Writer) -> None:
    rank, source = len(float_shape(writer)), writer.node.input[0]
    axes = sorted(axis % rank for axis in writer.attribute("axes", [0, 2, 3]))
    centred = writer.add("Sub", [source, writer.reduce("ReduceMean", source, axes)])
    variance = writer.reduce("ReduceMean", writer.add("Mul", [centred, centred]), axes)
    deviation = writer.add("Add", [root(writer, variance, 2), writer.store(SMALLEST_DEVIATION)])
    writer.add("Div", [centred, deviation], writer.node.output[0])
