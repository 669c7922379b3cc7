"""Training batches: augmented inputs, the original's tensors on them, and the labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.calibrate import Run
from onnxneutrino.data import IndexedSplit, Split
from onnxneutrino.finetune import Example
from onnxneutrino.losses import rows

TURNS = 3
MEMORY_BYTES = 256 << 20


class Memory:
    """The original's answers to batches that come again, up to a number of bytes."""

    def __init__(self, most: int = MEMORY_BYTES) -> None:
        """Start with none; keep at most `most` bytes."""
        self._answers: dict[Hashable, list[NDArray[Any]]] = {}
        self._left = most

    def __call__(self, key: Hashable, answer: Callable[[], list[NDArray[Any]]]) -> list[NDArray[Any]]:
        """The answer that is kept under `key`, or a new one."""
        found = self._answers.get(key)
        if found is None:
            found = answer()
            size = sum(array.nbytes for array in found)
            if size <= self._left:
                self._left -= size
                self._answers[key] = found
        return found


class Lessons:
    """What is learned from the original, and what the blocks behind a cut are given.

    A block is given what the network in training computes there, as it was when it was last looked at: so a block
    learns to make up for what those before it lose (asymmetric reconstruction, Zhang et al. 2015).
    """

    def __init__(self, original: Run, student: Run | None, memory: Memory | None = None) -> None:
        """Take the original's tensors to learn, and the network's tensors to be fed; None where nothing is fed."""
        self._original = original
        self._memory = memory
        self.student = student

    def __call__(self, inputs: Mapping[str, NDArray[Any]], key: Hashable = None) -> list[NDArray[Any]]:
        """The tensors in the order of `Loss.tensors`; inputs with the same `key` are the same."""
        if self._memory is None or key is None:
            learned = list(self._original(inputs))
        else:
            learned = self._memory(key, lambda: list(self._original(inputs)))
        student = self.student
        return [*learned, *(student(inputs) if student is not None else ())]


def examples(
    split: Split,
    batch: int,
    seed: int,
    lessons: Lessons,
    labels: bool,
    first: int = 0,
    kinds: str = "iu",
    skip: int = 0,
) -> Generator[Example, None, None]:
    """Endless batches of exactly `batch` examples; short ones are left out.

    The epochs of a split that is read by number take turns among three orders and augmentations, so that the
    original's answers can be kept; every epoch of another split has its own.

    Args:
        split: at least `batch` examples.
        batch: examples in each.
        seed: of order and augmentation.
        lessons: gives the tensors that the loss is taken with.
        labels: hand labels on where the split has them.
        first: number of the first epoch.
        kinds: of numpy types that count as labels; integers alone, unless a loss of the user's takes others.
        skip: batches to leave out before the first one that is given.
    """
    repeats = isinstance(split, IndexedSplit)
    if repeats:
        epochs, skip = divmod(skip, len(split) // batch)
        first += epochs
    for epoch in itertools.count(first):
        turn = epoch % TURNS if repeats else epoch
        for index, drawn in enumerate(split.batches(batch, seed=seed * 1009 + turn, augment=True)):
            if len(drawn) < batch:
                continue
            if skip > 0:
                skip -= 1
                continue
            usable = labels and drawn.targets is not None and drawn.targets.dtype.kind in kinds
            answers = lessons(drawn.inputs, (turn, index) if repeats else None)
            yield Example(drawn.inputs, answers, drawn.targets if usable else None)


def teacher_error(drawn: Iterator[Example], batches: int) -> float | None:
    """Share of augmented training images on which the original is wrong; None without labels."""
    wrong = []
    for example in itertools.islice(drawn, batches):
        if example.labels is None:
            return None
        wrong.append(np.mean(rows(example.teacher[0]).argmax(axis=-1) != example.labels))
    return float(np.mean(wrong))
