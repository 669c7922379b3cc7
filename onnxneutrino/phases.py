"""The time of a run and what it tells: its phases, what is left of the limit, how far training is."""

from __future__ import annotations

from collections.abc import Callable

from onnxneutrino.clock import now, shown
from onnxneutrino.events import Event, TrainingStatus

Tell = Callable[[Event], None]
JOURNAL = "journal"


class Phases:
    """The phases of a run, one after the other."""

    def __init__(self, limit: float, tell: Tell, aside: Callable[[], float] = lambda: 0.0) -> None:
        """Start now; `limit` is in seconds, as what `aside` gives: the time of a phase of its own, within others."""
        self._begun = now()
        self._start = shown()
        self._aside = aside
        self._aside_start = aside()
        self._limit = limit
        self._tell = tell
        self._phase = ""
        self._phase_start = self._start
        self._best = ""
        self.seconds: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return shown() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit, a reading that decides."""
        return self._limit - (now() - self._begun)

    def phase(self, name: str) -> None:
        """Close the current phase and begin `name`."""
        time_now, aside = shown(), self._aside()
        if self._phase:
            spent = aside - self._aside_start
            own = {self._phase: time_now - self._phase_start - spent, **({JOURNAL: spent} if spent else {})}
            for phase, seconds in own.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self._phase, self._phase_start, self._aside_start = name, time_now, aside
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
