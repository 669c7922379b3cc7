"""Training copy: Pad that mirrors, repeats or wraps the data becomes a Gather along each axis, which has a gradient.

    reflect    c b | a b c | b a        edge    a a | a b c | c c        wrap    b c | a b c | a b

Pad with a constant keeps its operator; its `axes` input (opset 18) is written out in the pads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten

COPIES = ("reflect", "edge", "wrap")
AXES = 3


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Pad with constant pads that copies elements or names its axes."""
    return rewritten(model, {"Pad": _rewrite})


def _rewrite(writer: Writer) -> None:
    mode = writer.attribute("mode", "constant")
    if mode == "constant" and writer.input(AXES) is None:
        raise Kept("the gradient of its form is right")
    shape = writer.shape(writer.node.input[0])
    begins, ends = _pads(writer, len(shape))
    source, target = writer.node.input[0], writer.node.output[0]
    if mode == "constant":
        value = writer.input(2)
        writer.add("Pad", [source, writer.store(begins + ends, np.int64), *([value] if value else [])], target)
        return
    if mode not in COPIES:
        raise Kept(f"unknown mode {mode}")
    for axis, size in enumerate(shape):
        if begins[axis] or ends[axis]:
            taken = _indices(size, begins[axis], ends[axis], mode)
            source = writer.add("Gather", [source, writer.store(taken, np.int64)], axis=axis)
    writer.add("Identity", [source], target)


def _pads(writer: Writer, rank: int) -> tuple[list[int], list[int]]:
    pads, axes = writer.constant(1), writer.constant(AXES)
    if pads is None:
        raise Kept("it has no pads")
    half = len(pads) // 2
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    begins, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(chosen):
        begins[axis], ends[axis] = int(pads[place]), int(pads[place + half])
    return begins, ends


def _indices(size: int, begin: int, end: int, mode: str) -> NDArray[np.int64]:
    """Which element every padded one is; negative pads cut off first."""
    kept = np.arange(max(0, -begin), size - max(0, -end))
    added = (max(0, begin), max(0, end))
    if not kept.size:
        raise Kept("nothing is left of an axis")
    if mode == "reflect":
        if max(added) >= kept.size:
            raise Kept("it mirrors more than the axis holds")
        return np.pad(kept, added, mode="reflect")
    if mode == "edge":
        return np.pad(kept, added, mode="edge")
    if max(added) > kept.size:  # where ONNX Runtime reads beyond the data
        raise Kept("it wraps more than the axis holds")
    return np.pad(kept, added, mode="wrap")
