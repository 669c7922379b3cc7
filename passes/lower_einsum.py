"""Training copy: Einsum becomes Transpose, Reshape, MatMul and ReduceSum.

Operands are taken in one by one. Of a pair, the axes of both that are still needed are the batch, the other shared
ones are contracted: `(batch, left, contracted) @ (batch, contracted, right)`. An axis of one operand that nothing else
needs is summed first; of two axes with the same letter the diagonal is taken, through a product with the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from onnxneutrino.reductions import float_shape
from onnxneutrino.rewrite import Kept, Writer, rewritten

ELLIPSIS = "..."


@dataclass(frozen=True)
class Operand:
    """A tensor, the label of each of its axes and their sizes; an axis of an ellipsis is labelled `.1` from the end."""

    name: str
    labels: tuple[str, ...]
    shape: tuple[int, ...]


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Einsum of float32 tensors of known shapes."""
    return rewritten(model, {"Einsum": _einsum})


def _einsum(writer: Writer) -> None:
    float_shape(writer)
    inputs, _, result = writer.attribute("equation", "").replace(" ", "").partition("->")
    terms = inputs.split(",")
    shapes = [writer.shape(name) for name in writer.node.input]
    if len(terms) != len(shapes):
        raise Kept("its equation does not fit its inputs")
    labels = [_labels(term, len(shape)) for term, shape in zip(terms, shapes, strict=True)]
    hidden = sorted({label for own in labels for label in own if label.startswith(".")}, reverse=True)
    if "->" in writer.attribute("equation", ""):
        wanted = _labels(result, len(result.replace(ELLIPSIS, "")) + len(hidden) * (ELLIPSIS in result))
    else:
        letters = [label for own in labels for label in own if not label.startswith(".")]
        wanted = (*hidden, *sorted(label for label in set(letters) if letters.count(label) == 1))
    sizes: dict[str, int] = {}
    for own, shape in zip(labels, shapes, strict=True):
        for label, size in zip(own, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    operands = [
        _narrowed(writer, _diagonal(writer, Operand(*operand)), sizes)
        for operand in zip(writer.node.input, labels, shapes, strict=True)
    ]
    value = operands[0]
    for index, operand in enumerate(operands[1:], 2):
        needed = set(wanted).union(*(later.labels for later in operands[index:]))
        value = _contracted(writer, value, operand, needed)
    value = _summed(writer, value, set(wanted))
    if value.labels == wanted:
        writer.add("Identity", [value.name], writer.node.output[0])
    else:
        writer.add(
            "Transpose", [value.name], writer.node.output[0], perm=[value.labels.index(label) for label in wanted]
        )


def _labels(term: str, rank: int) -> tuple[str, ...]:
    before, dots, after = term.partition(ELLIPSIS)
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not dots):
        raise Kept(f"'{term}' does not fit a tensor of rank {rank}")
    return (*before, *(f".{hidden - axis:02d}" for axis in range(hidden)), *after)


def _diagonal(writer: Writer, operand: Operand) -> Operand:
    name, labels, shape = operand.name, list(operand.labels), list(operand.shape)
    while len(set(labels)) < len(labels):
        second = next(axis for axis, label in enumerate(labels) if label in labels[:axis])
        first = labels.index(labels[second])
        form = [size if axis in (first, second) else 1 for axis, size in enumerate(shape)]
        mask = writer.store(np.eye(shape[first], dtype=np.float32).reshape(form))
        name = writer.reduce("ReduceSum", writer.add("Mul", [name, mask]), [second], keepdims=0)
        del labels[second], shape[second]
    return Operand(name, tuple(labels), tuple(shape))


def _narrowed(writer: Writer, operand: Operand, sizes: dict[str, int]) -> Operand:
    """Without the axes of size one that another operand stretches."""
    kept = [axis for axis, label in enumerate(operand.labels) if operand.shape[axis] == sizes[label]]
    if len(kept) == len(operand.labels):
        return operand
    shape = tuple(operand.shape[axis] for axis in kept)
    return Operand(writer.reshape(operand.name, shape), tuple(operand.labels[axis] for axis in kept), shape)


def _summed(writer: Writer, operand: Operand, needed: set[str]) -> Operand:
    axes = [axis for axis, label in enumerate(operand.labels) if label not in needed]
    if not axes:
        return operand
    kept = [axis for axis in range(len(operand.labels)) if axis not in axes]
    name = writer.reduce("ReduceSum", operand.name, axes, keepdims=0)
    return Operand(name, tuple(operand.labels[axis] for axis in kept), tuple(operand.shape[axis] for axis in kept))


def _contracted(writer: Writer, left: Operand, right: Operand, needed: set[str]) -> Operand:
    left = _summed(writer, left, needed | set(right.labels))
    right = _summed(writer, right, needed | set(left.labels))
    shared = [label for label in left.labels if label in right.labels]
    batch = [label for label in shared if label in needed]
    inner = [label for label in shared if label not in needed]
    rows = [label for label in left.labels if label not in shared]
    columns = [label for label in right.labels if label not in shared]
    sizes = dict(zip((*left.labels, *right.labels), (*left.shape, *right.shape), strict=True))
    a = _grouped(writer, left, sizes, batch, rows, inner)
    b = _grouped(writer, right, sizes, batch, inner, columns)
    labels = (*batch, *rows, *columns)
    shape = tuple(sizes[label] for label in labels)
    return Operand(writer.reshape(writer.add("MatMul", [a, b]), shape), labels, shape)


def _grouped(writer: Writer, operand: Operand, sizes: dict[str, int], *groups: Sequence[str]) -> str:
    """The operand with the axes of each group as one; without a batch, a matrix."""
    order = [operand.labels.index(label) for group in groups for label in group]
    name = operand.name
    if order != list(range(len(order))):
        name = writer.add("Transpose", [name], perm=order)
    lengths = [math.prod(sizes[label] for label in group) for group in groups]
    return writer.reshape(name, lengths if groups[0] else lengths[1:])
