"""Training batches: what comes again is asked of the original once, and is still the original's answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxneutrino.data import Batch, IndexedSplit, Split
from onnxneutrino.data_values import Inputs, Rows
from onnxneutrino.teaching import TURNS, Lessons, Memory, examples, teacher_error

COUNT, BATCH = 22, 4
EPOCH = COUNT // BATCH


def read(rows: Rows, generator: np.random.Generator | None) -> Inputs:
    noise = 0.0 if generator is None else generator.standard_normal((len(rows), 3))
    return {"x": (rows[:, None] + noise).astype(np.float32)}


SPLIT = IndexedSplit(read, np.arange(COUNT) % 3, np.arange(COUNT))


class Stream:
    """The same examples from a loader: nobody knows whether its order can be repeated."""

    labelled = True

    def __len__(self) -> int:
        return COUNT

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        return SPLIT.batches(size, seed=seed, augment=augment)

    def subset(self, indices: Rows) -> Split:
        raise NotImplementedError


class Original:
    """Answers with twice the input, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self.asked += 1
        return [2 * inputs["x"]]


@pytest.mark.parametrize("first", [0, 2])
def test_epochs_take_turns_and_the_original_answers_once(first: int) -> None:
    original = Original()
    drawn = examples(SPLIT, BATCH, 7, Lessons(original, None, Memory()), True, first)
    epochs = [list(itertools.islice(drawn, EPOCH)) for _ in range(2 * TURNS)]
    assert original.asked == TURNS * EPOCH
    for epoch, again in zip(epochs, epochs[TURNS:], strict=False):
        for own, same in zip(epoch, again, strict=True):
            np.testing.assert_array_equal(own.inputs["x"], same.inputs["x"])
            np.testing.assert_array_equal(own.labels, same.labels)
            np.testing.assert_array_equal(own.teacher[0], 2 * own.inputs["x"])
    distinct = {own.inputs["x"].tobytes() for epoch in epochs for own in epoch}
    assert len(distinct) == TURNS * EPOCH


def test_a_stream_is_never_taken_to_repeat_itself() -> None:
    original = Original()
    drawn = examples(Stream(), BATCH, 7, Lessons(original, None, Memory()), False)
    seen = [next(drawn) for _ in range(2 * TURNS * EPOCH)]
    assert original.asked == len(seen)
    assert len({own.inputs["x"].tobytes() for own in seen}) == len(seen)
    assert all(own.labels is None for own in seen)


def test_memory_ends_where_it_was_told_to() -> None:
    memory = Memory(most=100)
    answers = itertools.count()
    size = np.zeros(20, np.float32)  # 80 bytes

    def ask(key: str) -> float:
        return float(memory(key, lambda: [size + next(answers)])[0][0])

    assert [ask(key) for key in ("a", "a", "b", "b", "a")] == [0, 0, 1, 2, 0]


def test_what_a_block_is_fed_is_not_remembered() -> None:
    lessons = Lessons(Original(), lambda inputs: [-inputs["x"]], Memory())
    x = {"x": np.ones((2, 3), np.float32)}
    assert [array[0, 0] for array in lessons(x, "key")] == [2, -1]
    lessons.student = lambda inputs: [-5 * inputs["x"]]
    assert [array[0, 0] for array in lessons(x, "key")] == [2, -5]


def test_teacher_error_counts_wrong_answers() -> None:
    right = Lessons(lambda inputs: [np.eye(3)[np.rint(inputs["x"][:, 0]).astype(int) % 3]], None)
    plain = IndexedSplit(lambda rows, generator: read(rows, None), SPLIT.targets, SPLIT.rows)
    assert teacher_error(examples(plain, BATCH, 0, right, True), 5) == 0.0
    shifted = IndexedSplit(plain.read, (np.arange(COUNT) + 1) % 3, SPLIT.rows)
    assert teacher_error(examples(shifted, BATCH, 0, right, True), 5) == 1.0
    assert teacher_error(examples(plain, BATCH, 0, right, False), 5) is None
