"""After the last fine-tune: what is left of delta is spent, or what was taken too much is given back, untrained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnxneutrino.bench import Bench, Candidate, Record, Settings, accepted, upper

AIM = 0.9  # of what delta allows
SPENT = 0.8  # of delta, with the upper bound of the drop: nothing is left to spend
FIRST_TRIM = 1.12  # while none was refused
FINEST_RATIO = 1.03


def trim(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Record,
    tried: Sequence[Candidate],
) -> None:
    """Spend what is left of delta without training: truncate the smallest trained network, then bisect the cost."""
    # Not the smallest of all: an untrained one may be a hair smaller and has nothing left to spend.
    source = min((c for c in tried if c.trained and accepted(c, settings)), key=lambda c: c.cost, default=None)
    if source is None:
        return
    good, bad = source, settings.goal / FINEST_RATIO
    while upper(good, settings) < SPENT * settings.delta and good.cost > FINEST_RATIO * bad and time_left() > 0:
        cost = max(math.sqrt(good.cost * bad), good.cost / FIRST_TRIM, settings.goal)
        name = f"stage {settings.stage}, trimmed to {bench.full_cost / cost:.1f}x"
        candidate = bench.propose(source, cost, name, 0.0)
        if not bad < candidate.cost < good.cost:
            return
        candidate = record(bench.measured(dataclasses.replace(candidate, stage=settings.stage)))
        if accepted(candidate, settings):
            good = candidate
        else:
            bad = candidate.cost
