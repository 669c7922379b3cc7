"""Training copy: reductions without a right gradient become sums, products and MaxPools.

ReduceL1 = sum |x|          ReduceL2 = (sum x²)^(1/2)          ReduceSumSquare = sum x²
ReduceLogSum = log sum x    ReduceLogSumExp = m + log sum exp(x - m) with m = max x, which keeps exp finite
ReduceMax = MaxPool         ReduceMin = -max(-x)               ReduceProd = products of halves, halves of halves, ...

GlobalMaxPool and GlobalLpPool are ReduceMax and the p-norm over all axes but the first two. ReduceL2 has a gradient
of its own in ONNX Runtime, which fails to build with `keepdims = 0`.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from onnxneutrino.reductions import float_shape, maximum, power, reduced_axes, result_shape, root, rows
from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every such reduction of float32 over constant axes."""
    rewrites = {
        "ReduceL1": lambda writer: _norm(writer, reduced_axes(writer), 1),
        "ReduceL2": lambda writer: _norm(writer, reduced_axes(writer), 2),
        "ReduceSumSquare": _sum_square,
        "ReduceLogSum": _log_sum,
        "ReduceLogSumExp": _log_sum_exp,
        "ReduceMax": _max,
        "ReduceMin": _min,
        "ReduceProd": _prod,
        "GlobalMaxPool": _global_max,
        "GlobalLpPool": lambda writer: _norm(writer, _positions(writer), writer.attribute("p", 2)),
    }
    return rewritten(model, rewrites)


def _positions(writer: Writer) -> list[int]:
    return list(range(2, len(float_shape(writer))))


def _finish(writer: Writer, value: str, axes: Sequence[int]) -> None:
    writer.reshape(value, result_shape(writer, axes), writer.node.output[0])


def _norm(writer: Writer, axes: Sequence[int], p: int) -> None:
    total = writer.reduce("ReduceSum", power(writer, writer.node.input[0], p), axes)
    _finish(writer, root(writer, total, p), axes)


def _sum_square(writer: Writer) -> None:
    axes = reduced_axes(writer)
    _finish(writer, writer.reduce("ReduceSum", power(writer, writer.node.input[0], 2), axes), axes)


def _log_sum(writer: Writer) -> None:
    axes = reduced_axes(writer)
    _finish(writer, writer.add("Log", [writer.reduce("ReduceSum", writer.node.input[0], axes)]), axes)


def _log_sum_exp(writer: Writer) -> None:
    axes, source = reduced_axes(writer), writer.node.input[0]
    shape = writer.shape(source)
    ones = [1 if axis in axes else size for axis, size in enumerate(shape)]
    largest = maximum(writer, source, shape, axes, ones, None)
    total = writer.reduce("ReduceSum", writer.add("Exp", [writer.add("Sub", [source, largest])]), axes)
    _finish(writer, writer.add("Add", [writer.add("Log", [total]), largest]), axes)


def _max(writer: Writer) -> None:
    axes, (source, *_) = reduced_axes(writer), writer.node.input
    maximum(writer, source, writer.shape(source), axes, result_shape(writer, axes), writer.node.output[0])


def _min(writer: Writer) -> None:
    axes, (source, *_) = reduced_axes(writer), writer.node.input
    negative = writer.add("Neg", [source])
    largest = maximum(writer, negative, writer.shape(source), axes, result_shape(writer, axes), None)
    writer.add("Neg", [largest], writer.node.output[0])


def _global_max(writer: Writer) -> None:
    axes, (source, *_) = _positions(writer), writer.node.input
    maximum(writer, source, writer.shape(source), axes, result_shape(writer, axes), writer.node.output[0])


def _prod(writer: Writer) -> None:
    axes, (source, *_) = reduced_axes(writer), writer.node.input
    ordered, count, length = rows(writer, source, writer.shape(source), axes)
    value = writer.reshape(ordered, [count, length])
    while length > 1:
        half = length // 2
        product = writer.add("Mul", [writer.slice(value, 1, 0, half), writer.slice(value, 1, half, 2 * half)])
        if length % 2:
            product = writer.add("Concat", [product, writer.slice(value, 1, 2 * half, length)], axis=1)
        value, length = product, half + length % 2
    _finish(writer, value, axes)
