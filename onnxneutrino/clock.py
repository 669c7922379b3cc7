"""Time, wherever it decides something: read once, recorded, and read from the record to repeat a run bit for bit.

All else in a run follows from its inputs and its seed. A run that was interrupted goes on from its record: it repeats
what was read, and then reads on, as if the time between had not been. What is shown to the user alone is read from
`shown`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from onnxneutrino import interrupts
from onnxneutrino.errors import UsageError

DIGITS = 6


class Tape:
    """The readings of one run, in their order."""

    def __init__(self, recorded: Sequence[float] | None = None, onward: bool = False) -> None:
        """Record; or, given what was recorded, repeat it, and `onward` record again."""
        self.readings: list[float] = []
        self._recorded = recorded or ()
        self._onward = onward or recorded is None
        self._shift = self._recorded[0] - time.perf_counter() if self._recorded and onward else 0.0

    def shown(self) -> float:
        """Seconds on the clock of the run; nothing is recorded."""
        return time.perf_counter() + self._shift

    def note(self, value: float) -> float:
        """The value as it is recorded; in a repetition the recorded one in its place.

        Raises:
            UsageError: the repetition reads more often than the run did.
        """
        if len(self.readings) < len(self._recorded):
            value = self._recorded[len(self.readings)]
        elif self._onward:
            value = round(value, DIGITS)
        else:
            raise UsageError(
                "the run goes another way than the one to be repeated; model, data, options and versions must be the "
                "same as in the report"
            )
        self.readings.append(value)
        return value

    def rewind(self, count: int) -> None:
        """Be where `count` readings were made; what was read, or is to be repeated, after them counts no more."""
        del self.readings[count:]
        self._recorded = self._recorded[:count]

    def jump(self, readings: Sequence[float], moment: float) -> None:
        """Be where the record of a step ends: `readings` since the start of the run, and what `shown` gave there."""
        self.readings = list(readings)
        self._shift = moment - time.perf_counter()


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextlib.contextmanager
def recording(recorded: Sequence[float] | None = None, onward: bool = False) -> Iterator[Tape]:
    """Record all readings within, or repeat those of `recorded`; threads started within are not part of it.

    `onward` records again after what was recorded; without it there must be no more.
    """
    tape = Tape(recorded, onward)
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)


def current() -> Tape:
    """The tape that records now; a new one where none does."""
    return _TAPE.get() or Tape()


def shown() -> float:
    """Seconds from an unknown start, for what is shown alone."""
    return current().shown()


def now() -> float:
    """Seconds from an unknown start."""
    interrupts.check()
    return noted(shown())


def noted(value: float) -> float:
    """A measured time that something depends on, as `now` is."""
    tape = _TAPE.get()
    return value if tape is None else tape.note(value)
