"""The time of a run and what it tells: its phases, what is left of the limit, how far training is."""

from __future__ import annotations

import time
from collections.abc import Callable

from onnxneutrino.clock import now
from onnxneutrino.events import Event, TrainingStatus

Tell = Callable[[Event], None]


class Phases:
    """The phases of a run, one after the other."""

    def __init__(self, limit: float, tell: Tell) -> None:
        """Start now; `limit` is in seconds."""
        self._start = time.perf_counter()
        self._begun = now()
        self._limit = limit
        self._tell = tell
        self._phase = ""
        self._phase_start = self._start
        self._best = ""
        self.seconds: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit, a reading that decides."""
        return self._limit - (now() - self._begun)

    def phase(self, name: str) -> None:
        """Close the current phase and begin `name`."""
        time_now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time_now - self._phase_start
        self._phase, self._phase_start = name, time_now
        self.tell("")

    def tell(self, detail: str) -> None:
        """Show what is being done."""
        self._tell(self._event(detail))

    def say(self, message: str, *, aside: bool = False, best: str = "") -> None:
        """A message that stays; `aside` for `--verbose` only. With `best`, that is the best network from now on."""
        self._best = best or self._best
        self._tell(self._event("", message=message, aside=aside))

    def watch(self, training: TrainingStatus) -> None:
        """Show how far a fine-tune is."""
        self._tell(self._event(training.candidate, training=training))

    def _event(
        self, detail: str, message: str = "", aside: bool = False, training: TrainingStatus | None = None
    ) -> Event:
        left = max(self._limit - self.elapsed, 0.0)
        return Event(self._phase, detail, self.elapsed, left, message, aside, training, self._best)
