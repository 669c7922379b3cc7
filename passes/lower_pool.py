"""Training copy: LpPool, and AveragePool over three axes or with dilations, become a Conv with a kernel of ones.

    LpPool = (sum |x|ᵖ)^(1/p)        AveragePool = sum x / count

over each window, every channel alone; `count` is the number of positions of the window in the input, in the padded
input with `count_include_pad`. ONNX Runtime's gradient of these AveragePools is wrong without an error, as is that of
a MaxPool with column major indices: `storage_order` says how its second output counts, and is dropped where nobody
asks for that. A MaxPool of a large kernel goes along one axis after the other, which is the same: of equal elements the
first one in the window gets the gradient either way (5x5, 9x9 and 13x13 on 13x13 took 55 ms, so 20).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.graph import attribute_values
from onnxneutrino.reductions import float_shape, power, root
from onnxneutrino.rewrite import Kept, Writer, rewritten

LARGEST_RIGHT_RANK = 4


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite each such pool of a float32 tensor of known shape whose pads are written out."""
    return rewritten(model, {"AveragePool": _average, "LpPool": _lp, "MaxPool": _max})


def _average(writer: Writer) -> None:
    shape = float_shape(writer)
    kernel, strides, dilations, pads = _window(writer)
    if len(shape) <= LARGEST_RIGHT_RANK and set(dilations) == {1}:
        raise Kept("its gradient is right")
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    counted = np.ones(shape[2:], np.float32)
    if writer.attribute("count_include_pad", 0):
        if any(needed > given for needed, given in zip(_pads_after(writer), after, strict=True)):
            raise Kept("with ceil_mode, its last window hangs over its pads, which runtimes count differently")
        counted = np.pad(counted, list(zip(before, after, strict=True)), constant_values=1)
        before = [0] * len(kernel)
    counts = _window_sums(counted, _counts(writer), kernel, strides, dilations, before)
    total = _summed(writer, writer.node.input[0])
    writer.add("Div", [total, writer.store(np.maximum(counts, 1))], writer.node.output[0])


def _lp(writer: Writer) -> None:
    float_shape(writer)
    p = writer.attribute("p", 2)
    total = _summed(writer, power(writer, writer.node.input[0], p))
    writer.add("Identity", [root(writer, total, p)], writer.node.output[0])


def _max(writer: Writer) -> None:
    own = attribute_values(writer.node)
    turned = own.pop("storage_order", 0)
    if len(writer.node.output) > 1 and writer.node.output[1]:
        raise Kept("its indices are asked for")
    steps = _by_axis(writer)
    if not (turned or steps):
        raise Kept("its gradient is right")
    tensor = writer.node.input[0]
    for step in steps or [own]:
        tensor = writer.add("MaxPool", [tensor], **step)
    writer.add("Identity", [tensor], writer.node.output[0])


def _by_axis(writer: Writer) -> list[dict[str, Any]]:
    """Attributes of pools along one axis each, the last first; none where they would not halve the comparisons."""
    try:
        sizes, counts = list(writer.shape(writer.node.input[0])[2:]), _counts(writer)
    except Kept:
        return []
    kernel, strides, dilations, pads = _window(writer)
    rank, compared = len(kernel), 0
    steps = []
    for axis in reversed(range(rank)):
        sizes[axis] = counts[axis]
        compared += kernel[axis] * math.prod(sizes)
        alone = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
        step: dict[str, Any] = {key: [v if i == axis else 1 for i, v in enumerate(own)] for key, own in alone.items()}
        step["pads"] = [v if i % rank == axis else 0 for i, v in enumerate(pads)]
        steps.append({**step, "ceil_mode": writer.attribute("ceil_mode", 0)})
    return steps if 2 * compared <= math.prod(kernel) * math.prod(counts) else []


def _window(writer: Writer) -> tuple[list[int], list[int], list[int], list[int]]:
    if writer.attribute("auto_pad", "NOTSET") != "NOTSET":
        raise Kept("its pads are not known")
    kernel = list(writer.attribute("kernel_shape", []))
    ones = [1] * len(kernel)
    strides, dilations = writer.attribute("strides", ones), writer.attribute("dilations", ones)
    return kernel, list(strides), list(dilations), list(writer.attribute("pads", [0, 0] * len(kernel)))


def _counts(writer: Writer) -> list[int]:
    """Number of windows on each axis; with `ceil_mode` the last may hang over the end.

    Raises:
        Kept: it would start behind the data, where runtimes disagree on whether there is one.
    """
    kernel, strides, dilations, pads = _window(writer)
    counts = []
    for axis, size in enumerate(writer.shape(writer.node.input[0])[2:]):
        reach = size + pads[axis]
        left = reach + pads[len(kernel) + axis] - (kernel[axis] - 1) * dilations[axis] - 1
        count = left // strides[axis] + 1
        if writer.attribute("ceil_mode", 0) and left % strides[axis]:
            if count * strides[axis] >= reach:
                raise Kept("with ceil_mode, its last window starts behind the data")
            count += 1
        counts.append(count)
    return counts


def _pads_after(writer: Writer) -> list[int]:
    """Pads that the last window of each axis reaches; with `ceil_mode` more than the node has."""
    kernel, strides, dilations, pads = _window(writer)
    axes = zip(_counts(writer), strides, kernel, dilations, writer.shape(writer.node.input[0])[2:], strict=True)
    return [
        max((count - 1) * stride + (size - 1) * dilation + 1 - length - before, 0)
        for (count, stride, size, dilation, length), before in zip(axes, pads, strict=False)  # beginnings come first
    ]


def _summed(writer: Writer, tensor: str) -> str:
    """Sum over each window, pads being 0."""
    shape = writer.shape(writer.node.input[0])
    kernel, strides, dilations, pads = _window(writer)
    pads = pads[: len(kernel)] + _pads_after(writer)
    alone = writer.reshape(tensor, [shape[0] * shape[1], 1, *shape[2:]])
    ones = writer.store(np.ones((1, 1, *kernel), np.float32))
    pooled = writer.add("Conv", [alone, ones], strides=strides, dilations=dilations, pads=pads)
    return writer.reshape(pooled, [*shape[:2], *_counts(writer)])


def _window_sums(
    values: NDArray[np.float32],
    result: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
) -> NDArray[np.float32]:
    """Sum of `values` over each window, one axis at a time; nothing is counted outside of them."""
    for axis, count in enumerate(result):
        first = np.arange(count)[:, None] * strides[axis] - before[axis]
        places = first + np.arange(kernel[axis]) * dilations[axis]
        hit = (places[:, :, None] == np.arange(values.shape[axis])).sum(axis=1)
        values = np.moveaxis(np.tensordot(hit, values, (1, axis)), 0, axis)
    return values.astype(np.float32)
