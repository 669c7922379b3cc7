"""The two stages of the search, pure: cost, training and evaluation come in as a `Bench`.

Stage 1 (exploration): a ladder of plans along the cost, refitted but untrained, shows how fast the network
gives way; one short fine-tune of a plan whose untrained drop is about three delta tells how much training
recovers. Stage 2 (annealing): from the trained weights, smaller plans are settled on the surrogate and by the
divergence from the original, and only those are trained. (Deeplite Neutrino, AAAI 2021, section 3.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onnxneutrino.allocate import Option, allocate
from onnxneutrino.anneal import anneal
from onnxneutrino.metrics import Drop

FIRST_RATIO = 1.5
LADDER_STEP = 1.5
LADDER_STEPS = 12
LADDER_END = 8.0
LADDER_SHARE = 0.1
EXPLORE_DROP = 3.0
LARGEST_STEP = 1.5
WEIGHTINGS = (0.0, 0.5, 1.0)
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

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        """Options of every layer, loss = relative output error, and the cost of all the rest.

        From the original for None, else from the trained chains of `source`, forms frozen.
        """

    def sensitivities(self, source: Candidate | None) -> Mapping[str, float]:
        """Divergence at the output per unit of a layer's relative error."""

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        """The refitted, untrained network of a plan."""

    def challenged(self, choices: Mapping[str, Option]) -> Mapping[str, Option]:
        """The same plan with layers swapped to a form of equal cost that is dear to compute, where better."""

    def measured(self, candidate: Candidate) -> Candidate:
        """With its drop on the deciding images."""

    def trained(self, candidate: Candidate, seconds: float, name: str) -> Candidate | None:
        """Fine-tuned for `seconds`; None when training failed."""


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
    drop = candidate.drop
    return drop is not None and drop.value + settings.z * drop.standard_error <= settings.delta


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

    ladder = _ladder(bench, settings, time_left, record)
    if settings.dry_run or not ladder:
        return tried
    if not settings.train:
        _narrow(bench, settings, time_left, record, ladder)
        return tried
    shares = SHARES[settings.stage]
    first = _proposal(bench, settings, _explore_cost(ladder, settings), None, "stage 1, plan")
    challenged = bench.challenged(first.choices)
    if challenged != first.choices:
        other = bench.realize(None, challenged, "stage 1, forms swapped")
        first = other if other.divergence < first.divergence else first
    _train(bench, first, shares[0] * settings.time_limit, time_left, record, "stage 1, first fine-tune", 1)
    _descend(bench, settings, shares[1:], time_left, record, tried, ladder)
    return tried


def _ladder(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
) -> list[Candidate]:
    """Untrained plans of falling cost, until one has lost far more than training could bring back."""
    ladder: list[Candidate] = []
    options, rest = bench.options(None)
    bench.sensitivities(None)
    allowed = time_left() - LADDER_SHARE * settings.time_limit
    floor = rest + sum(min(option.cost for option in own) for own in options.values())
    ratio = FIRST_RATIO
    for _ in range(LADDER_STEPS):
        cost = max(bench.full_cost / ratio, floor)
        name = f"stage 1, ladder {bench.full_cost / cost:.1f}x"
        plan = _proposal(bench, settings, cost, None, name, weightings=(0.5,))
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
        plan = _proposal(bench, settings, cost, None, f"stage 1, {bench.full_cost / cost:.1f}x")
        candidate = record(bench.measured(plan))
        if not bad < candidate.cost < good:
            break
        if accepted(candidate, settings):
            good = candidate.cost
        else:
            bad = candidate.cost


def _proposal(
    bench: Bench,
    settings: Settings,
    cost: float,
    source: Candidate | None,
    name: str,
    weightings: Sequence[float] = WEIGHTINGS,
) -> Candidate:
    """The plan of at most `cost` that diverges least from the original, among a few surrogates.

    No surrogate is calibrated, so plans from several weightings of the layers' relative errors (sensitivity to
    the power 0, 1/2, 1) are finished and scored by the whole network's divergence.
    """
    options, rest = bench.options(source)
    weights = bench.sensitivities(source)
    plans: list[Mapping[str, Option]] = []
    for power in weightings:
        weighted = {
            layer: [dataclasses.replace(o, loss=o.loss * weights[layer] ** power) for o in own]
            for layer, own in options.items()
        }
        chosen = allocate(weighted, cost - rest)
        if source is not None:
            chosen = anneal(weighted, chosen, cost - rest, settings.seed)
        if all({k: o.choice for k, o in chosen.items()} != {k: o.choice for k, o in p.items()} for p in plans):
            plans.append(chosen)
    made = [bench.realize(source, plan, name) for plan in plans]
    return min(made, key=lambda candidate: candidate.divergence)


def _train(
    bench: Bench,
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
    result = bench.trained(candidate, seconds, name)
    if result is None:
        return None
    return record(bench.measured(dataclasses.replace(result, stage=stage)))


def _explore_cost(ladder: Sequence[Candidate], settings: Settings) -> float:
    """Cost at which the untrained drop is about three delta, read off the ladder."""
    return _cost_at(_curve(ladder), EXPLORE_DROP * settings.delta, ladder[-1].cost)


def _curve(points: Sequence[Candidate]) -> list[tuple[float, float]]:
    """(log cost, drop), falling cost, the drop made monotone."""
    worst = -math.inf
    curve = []
    for candidate in sorted(points, key=lambda c: -c.cost):
        if candidate.drop is not None:
            worst = max(worst, candidate.drop.value)
            curve.append((math.log(candidate.cost), worst))
    return curve


def _cost_at(curve: Sequence[tuple[float, float]], drop: float, smallest: float) -> float:
    """Cost where the curve reaches `drop`, linear in log cost; its end where it never does."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 >= drop:
            share = 0.0 if y1 <= y0 else min(max((drop - y0) / (y1 - y0), 0.0), 1.0)
            return math.exp(x0 + share * (x1 - x0))
    return math.exp(curve[0][0]) if curve and curve[0][1] >= drop else smallest


def _descend(
    bench: Bench,
    settings: Settings,
    shares: Sequence[float],
    time_left: Callable[[], float],
    record: Callable[[Candidate], Candidate],
    tried: Sequence[Candidate],
    ladder: Sequence[Candidate],
) -> None:
    """Fine-tunes of falling cost; when the last one is refused, part of what it removed is given back."""
    for index, share in enumerate((*shares, GIVE_BACK_SHARE)):
        done = [candidate for candidate in tried if candidate.trained > 0]
        if not done:
            return
        if index == len(shares):
            if accepted(done[-1], settings):
                return
            share = max(share, time_left() / settings.time_limit)
        if time_left() < 0.5 * GIVE_BACK_SHARE * settings.time_limit:
            return
        cost = next_cost(done, ladder, settings)
        larger = [c for c in done if c.cost > cost]
        source = min(larger, key=lambda c: c.cost, default=None)
        name = f"stage {settings.stage}, {bench.full_cost / cost:.1f}x"
        plan = _proposal(bench, settings, cost, source, name)
        if _train(bench, plan, share * settings.time_limit, time_left, record, name, settings.stage) is None:
            return


def next_cost(done: Sequence[Candidate], ladder: Sequence[Candidate], settings: Settings) -> float:
    """Cost whose drop, trained, should just be accepted: a secant on log cost.

    With one trained candidate its drop scales the ladder's untrained drops; with more, the line through the
    two nearest to the goal is used. A step down is at most 1.5 times, and never below a refused cost.
    """
    newest = done[-1]
    assert newest.drop is not None
    goal = settings.delta - settings.z * newest.drop.standard_error
    smallest_good = min((c.cost for c in done if accepted(c, settings)), default=None)
    refused = max((c.cost for c in done if not accepted(c, settings)), default=0.0)
    if len(done) == 1 or smallest_good is None or refused == 0.0:
        curve = _curve(ladder)
        untrained = max(_drop_at(curve, math.log(newest.cost)), 1e-9)
        share = max(newest.drop.value, 0.1 * settings.delta) / untrained
        cost = _cost_at([(x, share * y) for x, y in curve], goal, newest.cost / LARGEST_STEP)
    else:
        good = min((c for c in done if accepted(c, settings)), key=lambda c: c.cost)
        bad = max((c for c in done if not accepted(c, settings)), key=lambda c: c.cost)
        cost = _between(good, bad, goal)
    if accepted(newest, settings):
        cost = min(max(cost, newest.cost / LARGEST_STEP), newest.cost / FINEST_RATIO)
    else:
        cost = max(cost, newest.cost * FINEST_RATIO)
    return cost


def _drop_at(curve: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x1 <= x <= x0:
            return y0 + (y1 - y0) * (x0 - x) / max(x0 - x1, 1e-12)
    return curve[-1][1] if x < curve[-1][0] else curve[0][1]


def _between(good: Candidate, bad: Candidate, goal: float) -> float:
    """Where the line through two candidates in (log cost, drop) meets `goal`, kept off both ends."""
    assert good.drop is not None
    assert bad.drop is not None
    x0, x1 = math.log(good.cost), math.log(bad.cost)
    rise = bad.drop.value - good.drop.value
    share = (goal - good.drop.value) / rise if rise > 0 else 0.5
    return math.exp(x0 + min(max(share, 0.1), 0.8) * (x1 - x0))
