"""The two stages of the search, pure: cost, training and evaluation come in as a `Bench`.

Stage 1 (exploration): a ladder of plans along the cost, refitted but untrained, shows how fast the network
gives way; one short fine-tune of a plan whose untrained drop is about two delta tells how much training
recovers. Stage 2 (annealing): from the trained weights, smaller plans are settled on the surrogate and by the
divergence from the original, and only those are trained; what is then left of delta is spent on truncations.
(Deeplite Neutrino, AAAI 2021, section 3.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onnxneutrino.allocate import Option
from onnxneutrino.metrics import Drop

FIRST_RATIO = 1.5
LADDER_STEP = 1.5
LADDER_STEPS = 12
LADDER_END = 8.0
LADDER_SHARE = 0.1
EXPLORE_DROP = 2.0
NOISE = 0.05
RECOVERY = 0.3
AIM = 0.9
LARGEST_STEP = 2.5
KIND_STEP = 1.5
HOPELESS = 4.0
SPENT = 0.8
LARGEST_TRIM = 1.25
PLAN_SHARE = 0.05
SWAP_SHARE = 0.5
SHARES = {1: (0.15, 0.50), 2: (0.15, 0.23, 0.40)}
GIVE_BACK_SHARE = 0.06
FINEST_RATIO = 1.03


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network that was tried.

    Attributes:
        name: for the report.
        network: its factors and arrays, known to the bench alone.
        choices: the option of every layer.
        cost: of the whole network, in the unit of the objective.
        divergence: from the original's outputs on calibration inputs.
        drop: on the deciding images; None while not measured.
        trained: seconds of fine-tuning behind it, those of its predecessors included.
        stage: 1 or 2.
        seconds: wall time it took to make, train and measure.
    """

    name: str
    network: Any
    choices: Mapping[str, Option]
    cost: float
    divergence: float
    drop: Drop | None = None
    trained: float = 0.0
    stage: int = 1
    seconds: float = 0.0


class Bench(Protocol):
    """What the search needs to know about the network."""

    @property
    def full_cost(self) -> float:
        """Cost of the original network."""

    @property
    def least_cost(self) -> float:
        """Cost of the smallest network there is."""

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        """The refitted, untrained network of at most `cost`: see `proposals.propose`.

        From the original for None, else from the trained chains of `source`, forms frozen.
        """

    def measured(self, candidate: Candidate) -> Candidate:
        """With its drop on the deciding images."""

    def trained(self, candidate: Candidate, seconds: float, name: str, hopeless: float = math.inf) -> Candidate | None:
        """Fine-tuned for `seconds`; None when training failed.

        Half of the time will do where the drop is above `hopeless` by then.
        """


@dataclass(frozen=True)
class Settings:
    """How far a search may go.

    Attributes:
        delta: largest drop, in the metric's units.
        z: one-sided normal quantile of the confidence.
        stage: 1 or 2, the last stage to run.
        time_limit: of the whole run, in seconds; fine-tunes get shares of it.
        train: False compares untrained plans only.
        dry_run: stop before the first training step.
        seed: of the annealing.
    """

    delta: float
    z: float
    stage: int
    time_limit: float
    train: bool
    dry_run: bool
    seed: int


def accepted(candidate: Candidate, settings: Settings) -> bool:
    """`drop + z · standard error <= delta` on the deciding images (design 3.11)."""
    return upper(candidate, settings) <= settings.delta


def upper(candidate: Candidate, settings: Settings) -> float:
    """Upper bound of the drop on the deciding images, `drop + z · standard error`; infinite while not measured."""
    drop = candidate.drop
    return math.inf if drop is None else drop.value + settings.z * drop.standard_error


def search(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    tell: Callable[[Candidate, bool], None] = lambda candidate, ok: None,
) -> list[Candidate]:
    """Run stage 1 and, where asked for, stage 2.

    Args:
        bench: the network.
        settings: delta, confidence and time.
        time_left: seconds until the time limit, verification already taken off.
        tell: called with every measured candidate and whether it was accepted.

    Returns:
        Every measured candidate, in the order tried.
    """
    tried: list[Candidate] = []

    def record(candidate: Candidate) -> Candidate:
        tried.append(candidate)
        tell(candidate, accepted(candidate, settings))
        return candidate

    plans = _ladder(bench, settings, time_left, record)
    if settings.dry_run or not plans:
        return tried
    if not settings.train:
        _narrow(bench, settings, time_left, record, plans)
        return tried
    shares = SHARES[settings.stage]
    ladder = Ladder.of(bench.full_cost, plans, settings.delta)
    explore = min(max(ladder.cost(EXPLORE_DROP * settings.delta), plans[-1].cost), bench.full_cost / FINEST_RATIO)
    swap = time_left() > SWAP_SHARE * settings.time_limit
    first = bench.propose(None, explore, "stage 1, plan", PLAN_SHARE * time_left(), swap)
    first_share = shares[0] * settings.time_limit
    if _train(bench, settings, first, first_share, time_left, record, "stage 1, first fine-tune", 1) is None:
        _narrow(bench, settings, time_left, record, plans)
    _descend(bench, settings, shares[1:], time_left, record, tried, ladder)
    _trim(bench, settings, time_left, record, tried)
    return tried


def _ladder(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
) -> list[Candidate]:
    """Untrained plans of falling cost, until one has lost far more than training could bring back."""
    ladder: list[Candidate] = []
    floor = bench.least_cost
    allowed = time_left() - LADDER_SHARE * settings.time_limit
    ratio = FIRST_RATIO
    for _ in range(LADDER_STEPS):
        cost = max(bench.full_cost / ratio, floor)
        name = f"stage 1, ladder {bench.full_cost / cost:.1f}x"
        plan = bench.propose(None, cost, name)
        if ladder and plan.cost >= ladder[-1].cost:
            break
        candidate = record(bench.measured(plan))
        ladder.append(candidate)
        lost = candidate.drop.value if candidate.drop is not None else math.inf
        if lost > LADDER_END * max(settings.delta, 0.1) or time_left() < allowed or cost <= floor:
            break
        ratio *= LADDER_STEP
    return ladder


def _narrow(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    ladder: Sequence[Candidate],
) -> None:
    """Without training: bisect between the smallest accepted and the largest refused plan."""
    good = min((c.cost for c in ladder if accepted(c, settings)), default=bench.full_cost)
    bad = max((c.cost for c in ladder if not accepted(c, settings) and c.cost < good), default=None)
    while bad is not None and good / bad > FINEST_RATIO and time_left() > 0:
        cost = math.sqrt(good * bad)
        plan = bench.propose(None, cost, f"stage 1, {bench.full_cost / cost:.1f}x", PLAN_SHARE * time_left())
        candidate = record(bench.measured(plan))
        if not bad < candidate.cost < good:
            break
        if accepted(candidate, settings):
            good = candidate.cost
        else:
            bad = candidate.cost


def _train(
    bench: Bench,
    settings: Settings,
    candidate: Candidate,
    seconds: float,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    name: str,
    stage: int,
) -> Candidate | None:
    seconds = min(seconds, time_left())
    if seconds <= 0:
        return None
    result = bench.trained(candidate, seconds, name, HOPELESS * settings.delta)
    if result is None:
        return None
    return record(bench.measured(dataclasses.replace(result, stage=stage)))


@dataclass(frozen=True)
class Ladder:
    """The untrained drop at every cost: linear in the logarithms of both, and extended beyond the last points.

    Drops below a twentieth of delta are noise and count as that; a drop that falls with the cost counts as
    level, rising by a hair.
    """

    log_costs: tuple[float, ...]
    log_drops: tuple[float, ...]

    @classmethod
    def of(cls, full_cost: float, points: Sequence[Candidate], delta: float) -> Ladder:
        """From the original's cost and the untrained candidates."""
        floor = math.log(max(NOISE * delta, 1e-6))
        costs, drops = [math.log(full_cost)], [floor]
        for candidate in sorted(points, key=lambda c: -c.cost):
            if candidate.drop is not None and math.log(candidate.cost) < costs[-1]:
                costs.append(math.log(candidate.cost))
                drops.append(max(math.log(max(candidate.drop.value, 1e-9)), drops[-1] + 1e-3))
        return cls(tuple(costs), tuple(drops))

    def drop(self, cost: float) -> float:
        """The untrained drop at a cost."""
        return math.exp(_line(self.log_costs, self.log_drops, math.log(cost)))

    def cost(self, drop: float) -> float:
        """The cost at which the untrained drop is `drop`: at most the original's, at least half the smallest known."""
        found = _line(self.log_drops, self.log_costs, math.log(max(drop, 1e-9)))
        return math.exp(min(max(found, self.log_costs[-1] - math.log(2)), self.log_costs[0]))


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through strictly monotone points, the outer pieces extended."""
    if len(xs) == 1:
        return ys[0]
    rising = xs[1] > xs[0]
    place = next((i for i in range(1, len(xs) - 1) if (x <= xs[i]) == rising), len(xs) - 1)
    x0, x1, y0, y1 = xs[place - 1], xs[place], ys[place - 1], ys[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _descend(
    bench: Bench,
    settings: Settings,
    shares: Sequence[float],
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    tried: Sequence[Candidate],
    ladder: Ladder,
) -> None:
    """Fine-tunes of falling cost; when the last one is refused, part of what it removed is given back."""
    for index, share in enumerate((*shares, GIVE_BACK_SHARE)):
        done = [candidate for candidate in tried if candidate.trained > 0]
        if not done:
            return
        if index == len(shares) and accepted(done[-1], settings):
            return
        if index >= len(shares) - 1:
            share = max(share, time_left() / settings.time_limit - (index < len(shares)) * GIVE_BACK_SHARE)
        if time_left() < 0.5 * GIVE_BACK_SHARE * settings.time_limit:
            return
        seconds = min(share * settings.time_limit, time_left())
        cost, source = next_step(done, ladder, settings, seconds)
        name = f"stage {settings.stage}, {bench.full_cost / cost:.1f}x"
        if source is not None and cost >= source.cost:
            plan = source
        else:
            plan = bench.propose(source, cost, name, PLAN_SHARE * time_left())
            if source is not None and source.cost > KIND_STEP * cost:
                # So large a step loses much of what training gave: the original may be the better start.
                afresh = bench.propose(None, cost, name, PLAN_SHARE * time_left())
                plan = min(plan, afresh, key=lambda candidate: candidate.divergence)
        if _train(bench, settings, plan, seconds, time_left, record, name, settings.stage) is None:
            return


def _trim(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    tried: Sequence[Candidate],
) -> None:
    """Spend what is left of delta without training: truncate the smallest accepted network, bisecting the cost."""
    source = min((c for c in tried if accepted(c, settings)), key=lambda c: c.cost, default=None)
    if source is None or not source.trained:
        return
    good, bad = source, source.cost / LARGEST_TRIM
    while upper(good, settings) < SPENT * settings.delta and good.cost > FINEST_RATIO * bad and time_left() > 0:
        cost = max(math.sqrt(good.cost * bad), good.cost / LARGEST_TRIM)
        name = f"stage {settings.stage}, trimmed to {bench.full_cost / cost:.1f}x"
        candidate = bench.propose(source, cost, name, 0.0)
        if not bad < candidate.cost < good.cost:
            return
        candidate = record(bench.measured(dataclasses.replace(candidate, stage=settings.stage)))
        if accepted(candidate, settings):
            good = candidate
        else:
            bad = candidate.cost


def next_step(
    done: Sequence[Candidate], ladder: Ladder, settings: Settings, seconds: float
) -> tuple[float, Candidate | None]:
    """Cost that should just be accepted after `seconds` more of training, and what to start from.

    Training leaves a share of the untrained drop, which the ladder knows for every cost: the share that the
    newest candidate shows, falling with the time trained to the power -0.3; a refused candidate that was trained
    on once and refused again shows that time alone does not do. The start is a trained candidate of
    at least that cost (of that very cost: it is trained on), from which a step down is at most 2.5 times; or
    the original, where only a larger network than the trained ones will do.

    Args:
        done: trained candidates, in the order trained.
        ladder: untrained drops.
        settings: delta and confidence.
        seconds: of the next fine-tune.
    """
    newest = done[-1]
    assert newest.drop is not None
    goal = AIM * (settings.delta - settings.z * newest.drop.standard_error)
    left = max(newest.drop.value, NOISE * settings.delta) / ladder.drop(newest.cost)

    def reachable(source: Candidate | None) -> float:
        trained = seconds + (0.0 if source is None else source.trained)
        share = left * (newest.trained / max(trained, 1e-9)) ** RECOVERY
        return ladder.cost(goal / share) if goal > 0 and share > 0 else math.inf

    for source in sorted(done, key=lambda c: (c.cost, -c.trained)):
        cost = max(reachable(source), source.cost / LARGEST_STEP)
        if accepted(source, settings):
            return min(cost, source.cost / FINEST_RATIO), source
        stuck = sum(c.cost == source.cost for c in done) > 1
        if cost <= source.cost and not stuck:
            return source.cost, source
    largest = max(c.cost for c in done)
    return max(min(reachable(None), math.exp(ladder.log_costs[0])), largest * FINEST_RATIO), None
