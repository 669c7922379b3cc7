"""How far a run is, on standard error: one live view on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from onnxneutrino.console import short_metric
from onnxneutrino.events import Event, TrainingStatus
from onnxneutrino.formats import format_metric, format_seconds

WIDTH = 80
BAR = 24
PAUSE = 10.0


class Progress:
    """What the conductor is given to tell.

    On a terminal a view of at most four lines lives below the messages: the phase and the time, the fine-tune with its
    epoch and loss, the metric against what delta allows, and the best network so far. Without a terminal a line is
    written when the phase changes and then at most every ten seconds. `quiet` writes nothing at all, `verbose` also
    the messages that are asides.
    """

    def __init__(
        self,
        quiet: bool,
        terminal: bool,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        verbose: bool = False,
    ) -> None:
        """Write to `file`, standard error for None; `clock` gives seconds."""
        self._quiet = quiet
        self._verbose = verbose
        self._clock = clock
        self._console = Console(
            file=file or sys.stderr, force_terminal=terminal, highlight=False, soft_wrap=not terminal
        )
        self._event = Event("")
        self._seen = self._written = clock()
        live = terminal and not quiet
        # Standard output may carry JSON, so rich must not take it over while the view is live.
        self._live = (
            Live(
                get_renderable=self._view,
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            if live
            else None
        )

    def __enter__(self) -> Progress:
        """Start the live view."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live view away."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.message and (self._verbose or not event.aside):
            self.message(event.message)
        now = self._clock()
        changed = event.phase != self._event.phase
        self._event, self._seen = event, now
        if self._quiet or self._live is not None or not (changed or now - self._written >= PAUSE):
            return
        self._written = now
        self._console.print(self._line())

    def message(self, text: str) -> None:
        """Write one line that stays, above the live view."""
        if not self._quiet:
            self._console.print(Text(text))

    def _view(self) -> RenderableType:
        event = self._event
        lines: list[RenderableType] = [self._line(training=False)]
        if event.training is not None:
            lines += _training_lines(event.training)
        if event.best:
            lines.append(_cut(f"  best so far: {event.best}"))
        return Group(*lines)

    def _line(self, training: bool = True) -> Text:
        event = self._event
        elapsed = event.elapsed + (self._clock() - self._seen)
        times = format_seconds(elapsed)
        if event.time_left is not None:
            left = max(event.time_left - (self._clock() - self._seen), 0.0)
            times += f", about {format_seconds(left)} left"
        own = event.training
        start = ": ".join(part for part in (event.phase, event.detail) if part)
        if training and own is not None:
            start = f"{event.detail}, step {own.step} of {own.steps}"
        room = WIDTH - 1 - len(times) - 3
        start = start if len(start) <= room else f"{start[: room - 1]}…"
        return Text(f"{start} ({times})" if start else "", no_wrap=True, overflow="ellipsis")


def _training_lines(own: TrainingStatus) -> list[RenderableType]:
    """Bar, epoch and loss; then the metric and what it must reach."""
    told = f"step {own.step} of {own.steps}, epoch {own.epoch:.1f}, loss {own.loss:.4f}"
    bar = ProgressBar(total=max(own.steps, 1), completed=min(own.step, own.steps), width=BAR)
    row = Table.grid(padding=(0, 1))
    row.add_row(Text(" "), bar, _cut(told, WIDTH - BAR - 3))
    lines: list[RenderableType] = [row]
    if own.metric is not None:
        needed = "" if own.floor is None else f", {format_metric(own.floor)} needed"
        lines.append(_cut(f"  {short_metric(own.metric_name)} {format_metric(own.metric)} on the way{needed}"))
    return lines


def _cut(text: str, width: int = WIDTH) -> Text:
    return Text(text if len(text) < width else f"{text[: width - 2]}…", no_wrap=True)
