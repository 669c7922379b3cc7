"""Checks that every source of data shares; each raises a DataError that begins with `where`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.data_values import InputSpec
from onnxneutrino.errors import DataError

IGNORED_LABEL = 255
_CHUNK_BYTES = 1 << 26


def check_finite(array: NDArray[Any], where: str) -> None:
    """Refuse NaN and infinity; reads in chunks, so that a memory map stays on disk.

    Raises:
        DataError: naming the first example that is not finite.
    """
    if array.dtype == object:
        for number, own in enumerate(array):
            if isinstance(own, np.ndarray) and own.dtype.kind in "fc" and not np.isfinite(own).all():
                raise DataError(f"{where}: NaN or infinity in example {number}; remove it")
    if array.dtype.kind not in "fc":
        return
    for start, chunk in _chunks(array):
        finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not finite.all():
            raise DataError(f"{where}: NaN or infinity in example {start + int(np.argmin(finite))}; remove it")


def check_dtype(dtype: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """Refuse values that the input's type cannot hold in kind (float for an integer input, text, objects).

    Raises:
        DataError: naming both types.
    """
    numeric = dtype.kind in "fiub" and spec.dtype.kind in "fiub"
    if not numeric or (dtype.kind == "f" and spec.dtype.kind != "f"):
        raise DataError(f"{where}: dtype {dtype} does not fit the input '{spec.name}' of type {spec.dtype}; convert it")


def check_range(array: NDArray[Any], spec: InputSpec, where: str) -> None:
    """Refuse integers that the input's integer type cannot hold.

    Raises:
        DataError: naming the value.
    """
    if spec.dtype.kind not in "iu" or array.dtype.kind not in "iu" or np.can_cast(array.dtype, spec.dtype):
        return
    limits = np.iinfo(spec.dtype)
    for _, chunk in _chunks(array):
        for value in (int(chunk.min()), int(chunk.max())):
            if not limits.min <= value <= limits.max:
                raise DataError(f"{where}: value {value} does not fit the input '{spec.name}' of type {spec.dtype}")


def check_labels(labels: NDArray[Any], classes: int | None, where: str, start: int = 0) -> NDArray[Any]:
    """Return the targets as metrics take them: class indices `(N,)` int64, or maps `(N, ...)` as they are.

    Args:
        labels: `(N,)`, `(N, 1)` or, one label per position, `(N, ...)` where 255 is ignored.
        classes: number of classes, or None for targets that are not classes (checked for NaN only).
        where: file and array.
        start: index of the first example, for the message.

    Raises:
        DataError: labels that are not integers, are one-hot, or lie outside 0 to `classes - 1`.
    """
    if classes is None:
        check_finite(labels, where)
        return labels
    if labels.dtype.kind not in "iub":
        raise DataError(f"{where}: labels have dtype {labels.dtype}; classification needs integers (int64)")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and classes > 1 and labels.shape[1] == classes and bool((labels.sum(axis=1) == 1).all()):
        raise DataError(f"{where}: labels are one-hot, shape {labels.shape}; give class indices (argmax)")
    if labels.ndim == 1:
        labels = labels.astype(np.int64)
    for offset, chunk in _chunks(labels):
        wrong = (chunk < 0) | (chunk >= classes)
        if labels.ndim > 1:
            wrong &= chunk != IGNORED_LABEL
        if wrong.any():
            first = tuple(np.argwhere(wrong)[0])
            raise DataError(
                f"{where}: label {chunk[first]} at index {start + offset + int(first[0])} is out of range; "
                f"the model has {classes} classes, labels are 0 to {classes - 1}"
            )
    return labels


def fitted_shape(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> tuple[int, ...] | None:
    """Return the shape an example is reshaped to for an input that takes `wanted`, or None: it does not fit.

    A free dimension takes any size. With as many axes on both sides only axes of size 1 may move, for
    anything else would be a wrong layout; with another number of axes the element counts must agree.
    """
    if len(shape) == len(wanted):
        if all(w is None or w == s for s, w in zip(shape, wanted, strict=True)):
            return shape
        known = [w for w in wanted if w is not None]
        same = len(known) == len(wanted) and [s for s in shape if s != 1] == [w for w in known if w != 1]
        return tuple(known) if same else None
    free = wanted.count(None)
    count, rest = math.prod(shape), math.prod(w for w in wanted if w is not None)
    if free > 1 or rest == 0 or count % rest or (free == 0 and count != rest):
        return None
    return tuple(count // rest if w is None else w for w in wanted)


def stacked(targets: Sequence[Any]) -> NDArray[Any]:
    """One array of the targets of examples; of objects where they differ in shape (boxes of an image)."""
    if len({np.shape(target) for target in targets}) == 1:
        return np.stack(targets)
    ragged = np.empty(len(targets), dtype=object)
    for index, target in enumerate(targets):
        ragged[index] = target
    return ragged


def shape_text(shape: tuple[int | None, ...]) -> str:
    """Write a shape as `3x32x32`, a free dimension as `?`."""
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def _chunks(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    step = max(1, _CHUNK_BYTES // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]
