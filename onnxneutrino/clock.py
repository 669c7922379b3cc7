"""Time, wherever it decides something: read once, recorded, and read from the record to repeat a run bit for bit.

All else in a run follows from its inputs and its seed. What is shown to the user alone is read from
`time.perf_counter` itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from onnxneutrino.errors import UsageError

DIGITS = 6


class Tape:
    """The readings of one run, in their order."""

    def __init__(self, recorded: Sequence[float] | None = None) -> None:
        """Record; or, given what was recorded, repeat it."""
        self.readings: list[float] = []
        self._recorded = recorded

    def note(self, value: float) -> float:
        """The value as it is recorded; in a repetition the recorded one in its place.

        Raises:
            UsageError: the repetition reads more often than the run did.
        """
        if self._recorded is None:
            value = round(value, DIGITS)
        elif len(self.readings) < len(self._recorded):
            value = self._recorded[len(self.readings)]
        else:
            raise UsageError(
                "the run goes another way than the one to be repeated; model, data, options and versions must be the "
                "same as in the report"
            )
        self.readings.append(value)
        return value


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextlib.contextmanager
def recording(recorded: Sequence[float] | None = None) -> Iterator[Tape]:
    """Record all readings within, or repeat those of `recorded`; threads started within are not part of it."""
    tape = Tape(recorded)
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)


def now() -> float:
    """Seconds from an unknown start."""
    return noted(time.perf_counter())


def noted(value: float) -> float:
    """A measured time that something depends on, as `now` is."""
    tape = _TAPE.get()
    return value if tape is None else tape.note(value)
