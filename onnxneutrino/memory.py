"""Batches that memory has room for: half as large where it has not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from onnxneutrino import clock
from onnxneutrino.errors import TrainingError

Made = TypeVar("Made")


@contextlib.contextmanager
def needed_for(batch: int) -> Iterator[None]:
    """Give the runtime's errors for want of memory the type that Python's have.

    Raises:
        MemoryError: names the batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "Failed to allocate memory" in str(error) or "bad_alloc" in str(error):
            raise MemoryError(f"for a training step of {batch}") from error
        raise


def fitting(
    made: Callable[[int], Made], batch: int, told: list[str] | None = None, forget: Callable[[], None] = lambda: None
) -> tuple[Made, int]:
    """Make something with batches of `batch` examples, or of half as many, and so on, where memory is short.

    What was read from the clock in vain is taken back, and the size of the batch is read like a time: a run that is
    repeated tries only what was enough.

    Args:
        made: makes it with batches of a size; MemoryError where that is too much.
        batch: the size to begin with.
        told: takes a line for every size that was too much.
        forget: what `made` left behind.

    Returns:
        What was made, and the size.

    Raises:
        TrainingError: there is not enough memory for a single example.
    """
    mark = len(clock.current().readings)
    while True:
        batch = int(clock.noted(float(batch)))
        try:
            return made(batch), batch
        except MemoryError:
            if batch == 1:
                raise TrainingError("there is not enough memory for a training step of one example") from None
        if told is not None:
            told.append(f"there is not enough memory for a training step of {batch} examples; {batch // 2} from now on")
        clock.current().rewind(mark)
        forget()
        batch //= 2
