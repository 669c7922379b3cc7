"""Training copy: operators that choose or move elements, in the forms whose gradients are right.

Slice with a negative step   a Gather per axis; its gradient has no kernel
Split                        a Slice per output; its gradient is wrong where an output does not reach the loss
Transpose without perm       with the perm it means; the gradient builder fails without
ReverseSequence, Compress    a Gather by constant indices; they have no gradient
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite these operators where shapes are known and what chooses the elements is constant."""
    rewrites = {"Split": _split, "ReverseSequence": _reverse_sequence, "Compress": _compress}
    model, notes = rewritten(model, rewrites)
    # What is right as it stands makes no notes.
    if any(node.op_type == "Slice" and len(node.input) > 4 for node in model.graph.node):
        model, found = rewritten(model, {"Slice": _slice})
        notes += found
    if any(node.op_type == "Transpose" and not node.attribute for node in model.graph.node):
        model, found = rewritten(model, {"Transpose": _transpose})
        notes += found
    return model, notes


def _gathered(writer: Writer, tensor: str, indices: Sequence[tuple[int, np.ndarray]]) -> None:
    for axis, taken in indices:
        tensor = writer.add("Gather", [tensor, writer.store(taken, np.int64)], axis=axis)
    writer.add("Identity", [tensor], writer.node.output[0])


def _slice(writer: Writer) -> None:
    if writer.input(4) is None:
        raise Kept("the gradient of its form is right")
    starts, ends, axes, steps = (writer.constant(index) for index in (1, 2, 3, 4))
    if starts is None or ends is None or steps is None or min(steps) > 0:
        raise Kept("the gradient of its form is right")
    shape = writer.shape(writer.node.input[0])
    chosen = range(len(starts)) if axes is None else [int(axis) % len(shape) for axis in axes]
    taken = [
        (axis, _taken(shape[axis], int(start), int(end), int(step)))
        for axis, start, end, step in zip(chosen, starts, ends, steps, strict=True)
    ]
    _gathered(writer, writer.node.input[0], taken)


def _taken(size: int, start: int, end: int, step: int) -> np.ndarray:
    """What a Slice takes: its bounds count from the end where negative, then stop at the edges."""
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    if step > 0:
        return np.arange(min(max(start, 0), size), min(max(end, 0), size), step)
    return np.arange(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def _split(writer: Writer) -> None:
    shape, outputs = writer.shape(writer.node.input[0]), list(writer.node.output)
    axis = writer.attribute("axis", 0) % len(shape)
    given = writer.constant(1)
    part = math.ceil(shape[axis] / len(outputs))
    sizes = [part] * len(outputs) if given is None else [int(size) for size in given]
    ends = np.minimum(np.cumsum(sizes), shape[axis])
    starts = [0, *ends[:-1]]
    own = writer.store([axis], np.int64)
    for output, start, end in zip(outputs, starts, ends, strict=True):
        if output:
            bounds = [writer.store([value], np.int64) for value in (start, end)]
            writer.add("Slice", [writer.node.input[0], *bounds, own], output)


def _transpose(writer: Writer) -> None:
    if writer.attribute("perm", None) is not None:
        raise Kept("it has its perm")
    rank = len(writer.shape(writer.node.input[0]))
    writer.add("Transpose", [writer.node.input[0]], writer.node.output[0], perm=list(range(rank))[::-1])


def _reverse_sequence(writer: Writer) -> None:
    shape, lengths = writer.shape(writer.node.input[0]), writer.constant(1)
    if lengths is None:
        raise Kept("it has no lengths")
    batch, time = writer.attribute("batch_axis", 1), writer.attribute("time_axis", 0)
    steps = np.arange(shape[time])
    own = [np.where(steps < length, length - 1 - steps, steps) for length in lengths.astype(np.int64)]
    source = np.stack(own, axis=1 if time == 0 else 0)  # time index of every element of the first two axes
    members = np.arange(shape[batch])
    taken = source * shape[1] + members if time == 0 else members[:, None] * shape[1] + source
    flat = writer.reshape(writer.node.input[0], [shape[0] * shape[1], *shape[2:]])
    moved = writer.add("Gather", [flat, writer.store(taken.reshape(-1), np.int64)], axis=0)
    writer.reshape(moved, shape, writer.node.output[0])


def _compress(writer: Writer) -> None:
    condition, axis = writer.constant(1), writer.attribute("axis", None)
    if condition is None:
        raise Kept("it has no condition")
    taken, tensor = np.flatnonzero(condition), writer.node.input[0]
    shape = writer.shape(tensor)
    if not taken.size:
        raise Kept("nothing is left of it")
    if axis is None:
        tensor, axis = writer.reshape(tensor, [-1]), 0
    _gathered(writer, tensor, [(axis % max(1, len(shape)), taken)])
