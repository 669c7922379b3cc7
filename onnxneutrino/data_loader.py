"""Data from the user's own loader: `file.py:function`, which returns `train`, `test` and perhaps `val`.

Each is an iterable of `(inputs, targets)` batches, already preprocessed, that can be iterated again.
Nothing is kept but the batches at hand: examples are counted once, cut into the asked batch size, and
shuffled within a buffer (a list or tuple of batches also in the order of its batches).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.data_checks import check_dtype, check_finite, check_labels, shape_text, stacked
from onnxneutrino.data_function import UserFunction
from onnxneutrino.data_values import Batch, Inputs, InputSpec, Rows, shuffler
from onnxneutrino.errors import DataError, MetricError

SHUFFLE_BYTES = 1 << 28
_MISSING = object()


@dataclass(frozen=True, eq=False)
class LoaderSplit:
    """The examples `rows` of a user's iterable of batches.

    Attributes:
        name: `train`, `val` or `test`.
        source: the iterable.
        function: where it comes from.
        inputs: the model's inputs.
        classes: number of classes, None for no check of the labels.
        starts: first row of each batch, and the number of all rows at the end.
        rows: the rows of this split, ascending.
        labelled: whether the batches have targets.
        example_bytes: size of one example, for the shuffle buffer.
    """

    name: str
    source: Iterable[Any]
    function: UserFunction
    inputs: tuple[InputSpec, ...]
    classes: int | None
    starts: Rows
    rows: Rows
    labelled: bool
    example_bytes: int

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """Stream every example once; `augment` changes nothing, the loader's batches are finished."""
        if seed is None:
            yield from _rebatched(self._pieces(None), size, self._where)
            return
        generator = shuffler(seed)
        buffer = max(4 * size, SHUFFLE_BYTES // self.example_bytes)
        chunks = _rebatched(self._pieces(generator), buffer, self._where)
        shuffled = (_taken(chunk, generator.permutation(len(chunk))) for chunk in chunks)
        yield from _rebatched(shuffled, size, self._where)

    def subset(self, indices: Rows) -> LoaderSplit:
        """Make a split of the examples at these positions, in this split's own order."""
        return replace(self, rows=self.rows[np.unique(indices)])

    @property
    def _where(self) -> str:
        return f"{self.function.place}: {self.name}"

    def _pieces(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Give the source's batches, cut down to `rows`, in random order where the source can be indexed."""
        numbers: Iterable[int] = range(len(self.starts) - 1)
        items: Iterable[Any] = self.source
        if generator is not None and isinstance(self.source, Sequence):
            numbers = [int(n) for n in generator.permutation(len(self.starts) - 1)]
            source = self.source
            items = (source[n] for n in numbers)
        given = _items(items, self.function)
        for number in numbers:
            item = next(given, _MISSING)
            start, end = int(self.starts[number]), int(self.starts[number + 1])
            batch = None if item is _MISSING else _batch(item, self.inputs, self.classes, self._where, start)
            if batch is None or len(batch) != end - start:
                found = "nothing" if batch is None else f"{len(batch)} examples"
                raise DataError(
                    f"{self._where}: batch {number} had {end - start} examples, the second time {found}; "
                    "return a list or an object that starts anew at each iteration"
                )
            low, high = np.searchsorted(self.rows, (start, end))
            if high > low:
                yield batch if high - low == len(batch) else _taken(batch, self.rows[low:high] - start)


class Loaded(NamedTuple):
    """What a loader function gave: its splits, `val` None where absent, its function `detections`, and warnings."""

    splits: dict[str, LoaderSplit | None]
    detections: UserFunction | None
    warnings: tuple[str, ...]


def open_loader(function: UserFunction, inputs: Sequence[InputSpec], classes: int | None) -> Loaded:
    """Call the loader function and open `train`, `val` and `test`; `detections` decodes a detector's outputs.

    Every batch is iterated and checked once. `val` and `test` must give the same examples in the same order
    each time, for drops are paired; a `train` that does not (own shuffling or augmentation) gets a warning.

    Raises:
        DataError: the function fails or returns something else, an iterator instead of an iterable, an empty
            split, or batches that do not fit the model.
    """
    result = function()
    if not isinstance(result, Mapping) and not all(hasattr(result, name) for name in ("train", "test")):
        raise function.returned(type(result).__name__, "return an object or dict with train and test")
    splits: dict[str, LoaderSplit | None] = {}
    warnings: list[str] = []
    for name in ("train", "val", "test"):
        source = _entry(result, name)
        if source is None and name != "val":
            raise function.returned(f"no '{name}'", "return train and test")
        splits[name] = None
        if source is not None:
            splits[name] = split = _opened(name, source, function, tuple(inputs), classes)
            if not _repeats(split):
                if name != "train":
                    raise DataError(
                        f"{function.place}: {name} gives other examples at each iteration; "
                        "turn its shuffling and augmentation off"
                    )
                warnings.append(
                    f"{function.place}: train gives other examples at each iteration; the share for early "
                    "stopping is not kept apart from the rest"
                )
    return Loaded(splits, _decoder(function, _entry(result, "detections")), tuple(warnings))


def _entry(result: Any, name: str) -> Any:
    return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)


def _decoder(function: UserFunction, given: Any) -> UserFunction | None:
    """The loader's `detections` as a function of the user, in the file where it is written."""
    if given is None:
        return None
    if not callable(given):
        expected = "give a function of the model's outputs"
        raise function.returned(f"{type(given).__name__} as 'detections'", expected)
    code = getattr(inspect.unwrap(given), "__code__", None)
    return UserFunction(function.path if code is None else Path(code.co_filename), "detections", given, MetricError)


def _opened(
    name: str, source: Any, function: UserFunction, inputs: tuple[InputSpec, ...], classes: int | None
) -> LoaderSplit:
    where = f"{function.place}: {name}"
    if not isinstance(source, Iterable):
        raise DataError(f"{where} is {type(source).__name__}; return an iterable of (inputs, targets) batches")
    if isinstance(source, Iterator):
        raise DataError(
            f"{where} is a {type(source).__name__}, which can be iterated only once; "
            "return a list or an object with __iter__"
        )
    starts, labelled, example_bytes = [0], None, 1
    for item in _items(source, function):
        batch = _batch(item, inputs, classes, where, starts[-1])
        if labelled not in (None, batch.targets is not None):
            raise DataError(f"{where}: some batches have targets and some have none; make them alike")
        labelled = batch.targets is not None
        starts.append(starts[-1] + len(batch))
        example_bytes = max(example_bytes, sum(a.nbytes for a in batch.inputs.values()) // len(batch))
    if len(starts) == 1:
        raise DataError(f"{where} has no batches; every split needs some")
    rows = np.arange(starts[-1])
    return LoaderSplit(name, source, function, inputs, classes, np.array(starts), rows, bool(labelled), example_bytes)


def _repeats(split: LoaderSplit) -> bool:
    """Whether a second and third iteration begin with the same batch."""
    size = int(split.starts[1])
    first, second = (next(split.batches(size)).inputs for _ in range(2))
    return all(np.array_equal(first[name], second[name]) for name in first)


def _items(source: Iterable[Any], function: UserFunction) -> Iterator[Any]:
    """Iterate the user's object; what it raises becomes one line."""
    try:
        yield from source
    except (Exception, SystemExit) as error:
        raise function.failure(error) from error


def _batch(item: Any, inputs: tuple[InputSpec, ...], classes: int | None, where: str, start: int) -> Batch:
    """Check one `(inputs, targets)` of the user; `start` is the index of its first example."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"{where}: a batch is {type(item).__name__}; give (inputs, targets), or (inputs, None)")
    given, targets = item
    if not isinstance(given, Mapping):
        if len(inputs) > 1:
            known = ", ".join(spec.name for spec in inputs)
            raise DataError(f"{where}: the model has {len(inputs)} inputs; give a dict with {known}")
        given = {inputs[0].name: given}
    names = [spec.name for spec in inputs]
    if set(given) != set(names):
        raise DataError(f"{where}: inputs are {', '.join(map(str, given))}; the model has {', '.join(names)}")
    arrays = {spec.name: _input(given[spec.name], spec, where) for spec in inputs}
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"{where}: inputs of one batch have {sorted(lengths)} examples; make them equal, above 0")
    if targets is None:
        return Batch(arrays, None)
    labels = _targets(targets, f"{where}: targets")
    if labels.ndim == 0 or len(labels) not in lengths:
        raise DataError(
            f"{where}: a batch has {lengths.pop()} examples and targets of shape {shape_text(labels.shape)}"
        )
    return Batch(arrays, check_labels(labels, classes, f"{where}: targets", start))


def _input(value: Any, spec: InputSpec, where: str) -> NDArray[Any]:
    array = _array(value, f"{where}: input '{spec.name}'")
    check_dtype(array.dtype, spec, where)
    shape, wanted = array.shape[1:], spec.example
    if array.ndim == 0 or not _matches(shape, wanted):
        hint = ""
        if len(shape) == 3 and _matches((shape[2], shape[0], shape[1]), wanted):
            hint = "; transposed to NCHW it would fit"
        elif len(shape) == 3 and _matches((shape[1], shape[2], shape[0]), wanted):
            hint = "; transposed to NHWC it would fit"
        raise DataError(
            f"{where}: examples of shape {shape_text(shape)} do not fit the input '{spec.name}' of shape "
            f"{shape_text(wanted)}{hint}"
        )
    check_finite(array, f"{where}: input '{spec.name}'")
    return array.astype(spec.dtype, copy=False)


def _matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def _array(value: Any, where: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: is not one array; pad what differs in length") from error


def _targets(value: Any, where: str) -> NDArray[Any]:
    """One array, or objects where each example has an array of its own shape (boxes of an image)."""
    if isinstance(value, (list, tuple)) and all(isinstance(own, np.ndarray) for own in value):
        return stacked(value)
    return _array(value, where)


def _taken(batch: Batch, rows: Rows) -> Batch:
    return Batch(_taken_inputs(batch.inputs, rows), None if batch.targets is None else batch.targets[rows])


def _taken_inputs(inputs: Inputs, rows: Rows) -> Inputs:
    return {name: array[rows] for name, array in inputs.items()}


def _rebatched(pieces: Iterator[Batch], size: int, where: str) -> Iterator[Batch]:
    """Cut a stream of batches into batches of `size`; the last may be short."""
    waiting: list[Batch] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count < size:
            continue
        merged = _merged(waiting, where)
        full = count - count % size
        for start in range(0, full, size):
            yield _taken(merged, np.arange(start, start + size))
        count -= full
        waiting = [_taken(merged, np.arange(full, full + count))] if count else []
    if waiting:
        yield _merged(waiting, where)


def _merged(batches: Sequence[Batch], where: str) -> Batch:
    if len(batches) == 1:
        return batches[0]
    targets = [batch.targets for batch in batches if batch.targets is not None]
    try:
        inputs = {name: np.concatenate([b.inputs[name] for b in batches]) for name in batches[0].inputs}
    except ValueError as error:
        raise DataError(f"{where}: batches differ in shape beyond the first axis; pad them alike") from error
    if len({own.shape[1:] for own in targets}) > 1:  # boxes, padded in each batch to a length of its own
        return Batch(inputs, stacked([own for part in targets for own in part]))
    return Batch(inputs, np.concatenate(targets) if targets else None)
