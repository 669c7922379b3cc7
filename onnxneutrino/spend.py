"""After the last fine-tune: what is left of delta is spent, or what was taken too much is given back, untrained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnxneutrino.bench import Bench, Candidate, Record, Settings, accepted, upper
from onnxneutrino.ladder import NOISE, Ladder

AIM = 0.9  # of what delta allows
SPENT = 0.8  # of delta, with the upper bound of the drop: nothing is left to spend
LARGEST_TRIM = 1.25
FINEST_RATIO = 1.03


def give_back(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Record,
    tried: Sequence[Candidate],
    ladder: Ladder,
) -> None:
    """Where the newest trained network was refused: let it grow toward the original, bisecting, until one will do."""
    source = next((candidate for candidate in reversed(tried) if candidate.trained), None)
    if source is None or source.drop is None or accepted(source, settings):
        return
    small = source.cost
    large = min((c.cost for c in tried if accepted(c, settings)), default=bench.full_cost)
    goal = max(AIM * (settings.delta - settings.z * source.drop.standard_error), NOISE * settings.delta)
    cost = ladder.cost(goal * ladder.drop(small) / max(source.drop.value, goal))
    while large > FINEST_RATIO * small and time_left() > 0:
        cost = min(max(cost, small * math.sqrt(FINEST_RATIO)), large / math.sqrt(FINEST_RATIO))
        name = f"stage {settings.stage}, given back to {bench.full_cost / cost:.1f}x"
        candidate = bench.propose(source, cost, name)
        if not small < candidate.cost < large:
            return
        candidate = record(bench.measured(dataclasses.replace(candidate, stage=settings.stage)))
        small, large = (small, candidate.cost) if accepted(candidate, settings) else (candidate.cost, large)
        cost = math.sqrt(small * large)


def trim(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Record,
    tried: Sequence[Candidate],
) -> None:
    """Spend what is left of delta without training: truncate the smallest accepted network, bisecting the cost."""
    source = min((c for c in tried if accepted(c, settings)), key=lambda c: c.cost, default=None)
    if source is None or not source.trained:
        return
    good, bad = source, max(source.cost / LARGEST_TRIM, settings.goal / FINEST_RATIO)
    while upper(good, settings) < SPENT * settings.delta and good.cost > FINEST_RATIO * bad and time_left() > 0:
        cost = max(math.sqrt(good.cost * bad), good.cost / LARGEST_TRIM, settings.goal)
        name = f"stage {settings.stage}, trimmed to {bench.full_cost / cost:.1f}x"
        candidate = bench.propose(source, cost, name, 0.0)
        if not bad < candidate.cost < good.cost:
            return
        candidate = record(bench.measured(dataclasses.replace(candidate, stage=settings.stage)))
        if accepted(candidate, settings):
            good = candidate
        else:
            bad = candidate.cost
