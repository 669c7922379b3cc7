"""The search under hard targets: the cost is known, so all that is left to find is the network that loses least.

A cost is the largest share of a target's limit: a network of at most 1 meets all. One network at the targets is
trained with nearly all the time; where its untrained drop is large, a larger one is trained first and then cut. Where
it is not within delta untrained, it has a part of the time; if it is not then either, the rest goes to the smallest
network within delta.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxneutrino.bench import Bench, Candidate, Settings, Tell, accepted, drops_by_cost, lost, recorder
from onnxneutrino.ladder import Ladder
from onnxneutrino.layer_options import GOAL
from onnxneutrino.search import FIRST, LEAST_SHARE, PLAN_SHARE, descend, fine_tune, narrow, walk_ladder
from onnxneutrino.spend import FINEST_RATIO, trim

FIRST_STEP = 1.5
FIRST_SHARE = 0.35
TARGET_SHARE = 0.6  # of the time, where delta may send the search on
REST_SHARE = 0.45  # of what is then left, for the first step


def search_targets(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    tell: Tell = lambda candidate, ok: None,
) -> list[Candidate]:
    """Make the network that meets the targets, and where it is not within delta the smallest that is.

    Args:
        bench: the network, its costs in shares of the targets.
        settings: `goal` is 1; `delta` is infinite where any drop will do.
        time_left: seconds until the time limit, verification already taken off.
        tell: called with every measured candidate and whether it is accepted; False refuses it.

    Returns:
        Every measured candidate, in the order tried.
    """
    tried, record = recorder(settings, tell)

    def untrained(cost: float, name: str, swap: bool = False) -> Candidate:
        return record(bench.measured(bench.propose(None, cost, name, PLAN_SHARE * time_left(), swap)))

    plan = untrained(GOAL, "stage 1, plan at the targets", settings.train)
    if settings.dry_run:
        return tried
    if not settings.train:
        if not accepted(plan, settings):
            narrow(bench, settings, time_left, record, [plan])
        return tried
    end = 0.0 if accepted(plan, settings) else (1 - TARGET_SHARE) * time_left()
    last = _at_targets(bench, settings, plan, lambda: time_left() - end, record, untrained)
    if (last is not None and accepted(last, settings)) or time_left() < LEAST_SHARE * settings.time_limit:
        return tried
    walk_ladder(bench, settings, time_left, record)
    plans = [candidate for candidate in tried if not candidate.trained]
    if len(plans) == len(tried):
        narrow(bench, settings, time_left, record, plans)
        return tried
    ladder = Ladder.of(bench.full_cost, drops_by_cost(plans), settings.delta)
    # Of two that were refused the larger one tells more of what is still far above it.
    trained = [candidate for candidate in tried if candidate.trained]
    known = trained if any(accepted(candidate, settings) for candidate in trained) else trained[:1]

    def learned(candidate: Candidate) -> Candidate:
        known.append(record(candidate))
        return known[-1]

    shares = (REST_SHARE * time_left() / settings.time_limit, 0.0)  # the last step has what is left
    descend(bench, settings, shares, time_left, learned, known, ladder)
    if not any(accepted(candidate, settings) for candidate in known):
        narrow(bench, settings, time_left, record, plans)
    trim(bench, settings, time_left, record, tried)
    return tried


def _at_targets(
    bench: Bench,
    settings: Settings,
    plan: Candidate,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    untrained: Callable[[float, str], Candidate],
) -> Candidate | None:
    """The trained network at the targets; None where training failed or there was no time."""
    larger = min(FIRST_STEP * plan.cost, bench.full_cost / FINEST_RATIO)
    if settings.stage == 2 and lost(plan) > settings.large_drop and larger > plan.cost * FINEST_RATIO:
        start = untrained(larger, "stage 1, larger plan")
        seconds = FIRST_SHARE * time_left()
        first = fine_tune(bench, settings, start, seconds, time_left, record, FIRST, 1)
        if first is not None:
            cut = bench.measured(bench.propose(first, GOAL, "stage 2, plan at the targets", PLAN_SHARE * time_left()))
            plan = min((cut, plan), key=lambda own: (max(own.cost, GOAL), lost(own)))
    name = f"stage {settings.stage}, at the targets"
    return fine_tune(bench, settings, plan, time_left(), time_left, record, name, settings.stage)
