"""Training copy: ConvTranspose becomes a Conv of the stretched input, which has a kernel for its gradient.

On each axis, with input size `n`, stride `s`, kernel `k`, dilation `d`, output size `m` and `p` zeros before:

    1. stretch: `s - 1` zeros between neighbours, `(n - 1) s + 1` elements;
    2. pad (or crop) to `m + d (k - 1)` elements, `d (k - 1) - p` of them before;
    3. Conv with stride 1, dilation `d`, and the weight `[C, M/g, k...]` as `[M, C/g, k...]`, flipped.

The weight is transposed and flipped by operators of the graph, so that it can be trained itself.
(Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, chapter 4.)
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every ConvTranspose whose shapes are known."""
    return rewritten(model, {"ConvTranspose": _rewrite})


def _rewrite(writer: Writer) -> None:
    node = writer.node
    shape, weight = writer.shape(node.input[0]), writer.shape(node.input[1])
    kernel, space = weight[2:], shape[2:]
    ones = [1] * len(space)
    strides, dilations = writer.attribute("strides", ones), writer.attribute("dilations", ones)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before, lengths = _placed(writer, space, strides, reach)
    pads = []
    for n, s, r, p, m in zip(space, strides, reach, before, lengths, strict=True):
        pads.append((r - p, m + p - ((n - 1) * s + 1)))
    if any(length < 1 for length in lengths):
        raise Kept("its output is empty")
    stretched = _stretched(writer, node.input[0], shape, strides, pads)
    group = int(writer.attribute("group", 1))
    inputs = [stretched, _flipped(writer, node.input[1], weight, group)]
    if (bias := writer.input(2)) is not None:
        inputs.append(bias)
    writer.add("Conv", inputs, node.output[0], kernel_shape=list(kernel), dilations=list(dilations), group=group)


def _placed(
    writer: Writer, space: tuple[int, ...], strides: list[int], reach: list[int]
) -> tuple[list[int], list[int]]:
    """Elements cut off before the data, and output size, of each axis, as ONNX Runtime computes them."""
    rank = len(space)
    mode = writer.attribute("auto_pad", "NOTSET")
    extra = list(writer.attribute("output_padding", [])) or [0] * rank
    pads = list(writer.attribute("pads", [])) or [0] * (2 * rank)
    asked = list(writer.attribute("output_shape", []))[-rank:]
    full = [(n - 1) * s + r + 1 + e for n, s, r, e in zip(space, strides, reach, extra, strict=True)]
    if asked or mode in ("SAME_UPPER", "SAME_LOWER"):
        lengths = asked or [min(n * s, whole) for n, s, whole in zip(space, strides, full, strict=True)]
        total = [max(0, whole - length) for whole, length in zip(full, lengths, strict=True)]
        return [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total], lengths
    if mode == "VALID":
        return [0] * rank, full
    return pads[:rank], [whole - pads[i] - pads[i + rank] for i, whole in enumerate(full)]


def _stretched(
    writer: Writer, tensor: str, shape: tuple[int, ...], strides: list[int], pads: list[tuple[int, int]]
) -> str:
    """Zeros between the elements, then the pads, of which those after count from the last element on."""
    space = shape[2:]
    if any(s > 1 for s in strides):
        rank = 2 + 2 * len(space)
        apart = [*shape[:2], *(size for n in space for size in (n, 1))]
        zeros = [0] * (rank + 2) + [value for s in strides for value in (0, s - 1)]
        tensor = writer.reshape(tensor, apart)
        tensor = writer.add("Pad", [tensor, writer.store(zeros, np.int64)])
        tensor = writer.reshape(tensor, [*shape[:2], *(n * s for n, s in zip(space, strides, strict=True))])
    # The stretched axis ends with `s - 1` zeros of its own.
    around = [0, 0, *(start for start, _ in pads)]
    around += [0, 0, *(end - (s - 1) for (_, end), s in zip(pads, strides, strict=True))]
    if any(around):
        tensor = writer.add("Pad", [tensor, writer.store(around, np.int64)])
    return tensor


def _flipped(writer: Writer, weight: str, shape: tuple[int, ...], group: int) -> str:
    channels, per_group, *kernel = shape
    axes = list(range(len(kernel)))
    parts = writer.reshape(weight, [group, channels // group, per_group, *kernel])
    turned = writer.add("Transpose", [parts], perm=[0, 2, 1, *(axis + 3 for axis in axes)])
    whole = writer.reshape(turned, [group * per_group, channels // group, *kernel])
    if math.prod(kernel) == 1:
        return whole
    flat = writer.reshape(whole, [group * per_group * (channels // group), math.prod(kernel)])
    # Flipping every axis is reading the flattened kernel backwards.
    backwards = writer.store(np.arange(math.prod(kernel))[::-1], np.int64)
    mirrored = writer.add("Gather", [flat, backwards], axis=1)
    return writer.reshape(mirrored, [group * per_group, channels // group, *kernel])
