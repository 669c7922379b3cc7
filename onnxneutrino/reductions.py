"""Axes, maxima and p-norms: what the lowering passes of reductions, pools and normalizations share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxneutrino.rewrite import Kept, Writer


def reduced_axes(writer: Writer) -> list[int]:
    """Axes of a reduction node, from its attribute or its second input, counted from the front; all where none.

    Raises:
        Kept: they are computed at run time, the node passes its input on, or its input is not float32.
    """
    shape = float_shape(writer)
    stored = writer.constant(1)
    given = writer.attribute("axes", [] if stored is None else stored.tolist())
    if not given and writer.attribute("noop_with_empty_axes", 0):
        raise Kept("it has no axes")
    return sorted({axis % len(shape) for axis in given} if given else range(len(shape)))


def float_shape(writer: Writer) -> tuple[int, ...]:
    """Shape of the node's first input.

    Raises:
        Kept: it is unknown, or its type is not float32.
    """
    source = writer.node.input[0]
    shape = writer.shape(source)
    if writer.dtype(source) != np.float32:
        raise Kept(f"'{source}' is not float32")
    return shape


def result_shape(writer: Writer, axes: Sequence[int]) -> list[int]:
    """Shape of a reduction's output, by its `keepdims`."""
    shape = writer.shape(writer.node.input[0])
    if writer.attribute("keepdims", 1):
        return [1 if axis in axes else size for axis, size in enumerate(shape)]
    return [size for axis, size in enumerate(shape) if axis not in axes]


def rows(writer: Writer, tensor: str, shape: Sequence[int], axes: Sequence[int]) -> tuple[str, int, int]:
    """The tensor with `axes` last and the rest before, its two sizes: what is kept, what is reduced."""
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    order = [*kept, *axes]
    if order != list(range(len(shape))):
        tensor = writer.add("Transpose", [tensor], perm=order)
    return tensor, math.prod(shape[axis] for axis in kept), math.prod(shape[axis] for axis in axes)


def maximum(
    writer: Writer, tensor: str, shape: Sequence[int], axes: Sequence[int], result: Sequence[int], output: str | None
) -> str:
    """Largest value over `axes` as a MaxPool over rows; where several are largest the first has the gradient.

    Args:
        writer: of the node that is replaced.
        tensor: a float32 tensor.
        shape: its shape.
        axes: reduced axes.
        result: shape of the output.
        output: its name, a fresh one unless it is given.
    """
    ordered, count, length = rows(writer, tensor, shape, axes)
    flat = writer.reshape(ordered, [1, count, length, 1])
    return writer.reshape(writer.add("MaxPool", [flat], kernel_shape=[length, 1]), result, output)


def power(writer: Writer, tensor: str, p: int) -> str:
    """`|x|ᵖ`, elementwise, for a whole number `p >= 1`."""
    if p == 1:
        return writer.add("Abs", [tensor])
    if p == 2:
        return writer.add("Mul", [tensor, tensor])
    return writer.add("Pow", [writer.add("Abs", [tensor]), writer.store(p)])


def root(writer: Writer, total: str, p: int) -> str:
    """`total^(1/p)` of a sum that is not negative, with gradient 0 where it is 0.

    The root is taken of 1 there: the infinite slope of the root at 0 times 0 would be NaN.
    """
    if p == 1:
        return total
    positive = writer.add("Greater", [total, writer.store(0.0)])
    safe = writer.add("Where", [positive, total, writer.store(1.0)])
    taken = writer.add("Sqrt", [safe]) if p == 2 else writer.add("Pow", [safe, writer.store(1 / p)])
    return writer.add("Where", [positive, taken, writer.store(0.0)])
