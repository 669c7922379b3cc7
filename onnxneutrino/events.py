"""What a run tells while it goes on: values, which `console.py` shows and a caller's own function may."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingStatus:
    """How far a fine-tune is.

    Attributes:
        candidate: that is trained.
        step: steps done.
        steps: as planned now; the clock may change it.
        epoch: times that the training images were seen, a fraction.
        loss: mean of the last steps, less the teacher's own.
        metric_name: the user's metric.
        metric: on the first deciding images, when it was last looked at; None before.
        floor: what the metric must reach there, `delta` below the original; None without a delta.
    """

    candidate: str
    step: int
    steps: int
    epoch: float
    loss: float
    metric_name: str = ""
    metric: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Event:
    """One sign of progress.

    Attributes:
        phase: what the run is at.
        detail: what it is doing there.
        elapsed: seconds since the start.
        time_left: seconds to the end, None where that cannot be told yet.
        message: a result that should stay in sight; empty for none.
        aside: True for a message that only `--verbose` shows.
        training: during a fine-tune, how far it is.
        best: the smallest network that was accepted so far, in words; empty for none.
    """

    phase: str
    detail: str = ""
    elapsed: float = 0.0
    time_left: float | None = None
    message: str = ""
    aside: bool = False
    training: TrainingStatus | None = None
    best: str = ""
