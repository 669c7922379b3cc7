"""Training batches: augmented inputs, the original's tensors on them, and the labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.calibrate import Run
from onnxneutrino.data import Split
from onnxneutrino.finetune import Example
from onnxneutrino.losses import rows


class Lessons:
    """What is learned from the original, and what the blocks behind a cut are given.

    A block is given what the network in training computes there, as it was when it was last looked at: so a block
    learns to make up for what those before it lose (asymmetric reconstruction, Zhang et al. 2015).
    """

    def __init__(self, original: Run, student: Run | None) -> None:
        """Take the original's tensors to learn, and the network's tensors to be fed; None where nothing is fed."""
        self._original = original
        self.student = student

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The tensors in the order of `Loss.tensors`."""
        student = self.student
        return [*self._original(inputs), *(student(inputs) if student is not None else ())]


def examples(split: Split, batch: int, seed: int, teacher: Run, labels: bool) -> Iterator[Example]:
    """Endless batches of exactly `batch` examples, every epoch in a new order; short ones are left out.

    Args:
        split: at least `batch` examples.
        batch: examples in each.
        seed: of order and augmentation.
        teacher: gives the tensors that the loss is taken with.
        labels: hand integer labels on where the split has them.
    """
    epoch = 0
    while True:
        for drawn in split.batches(batch, seed=seed * 1009 + epoch, augment=True):
            if len(drawn) < batch:
                continue
            usable = labels and drawn.targets is not None and np.issubdtype(drawn.targets.dtype, np.integer)
            yield Example(drawn.inputs, teacher(drawn.inputs), drawn.targets if usable else None)
        epoch += 1


def teacher_error(drawn: Iterator[Example], batches: int) -> float | None:
    """Share of augmented training images on which the original is wrong; None without labels."""
    wrong = []
    for example in itertools.islice(drawn, batches):
        if example.labels is None:
            return None
        wrong.append(np.mean(rows(example.teacher[0]).argmax(axis=-1) != example.labels))
    return float(np.mean(wrong))
