"""The two stages of the search, pure: cost, training and evaluation come in as a `Bench`.

Stage 1 (exploration): a ladder of plans along the cost, refitted but untrained, shows how fast the network
gives way; a fine-tune of a plan that a quarter of the time should make acceptable tells how much training
recovers. Stage 2 (annealing): from the trained weights, smaller plans are settled on the surrogate and by the
divergence from the trained network, and only those are trained; what is then left of delta is spent on truncations.
(Deeplite Neutrino, AAAI 2021, section 3.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnxneutrino.bench import Bench, Candidate, Record, Settings, Tell, accepted, drops_by_cost, lost, recorder
from onnxneutrino.ladder import NOISE, Ladder
from onnxneutrino.recovery import HALF_STEPS, left, secant
from onnxneutrino.spend import AIM, FINEST_RATIO, trim

FIRST = "stage 1, first fine-tune"
FIRST_RATIO = 1.5
LADDER_STEP = 1.5
LADDER_STEPS = 12
EARLY = 0.25  # of delta: below it the ladder takes two steps at once
LADDER_END = 8.0  # times delta
LADDER_SHARE = 0.1  # of the time limit
FIRST_LEFT = 0.25  # the least share of an untrained drop that the first network counts on
SAFE_AIM = 0.65  # of what delta allows: the first network is what stands where all others fail
# Trained on from 960 to 2660 steps a VGG-like network lost 1.14 instead of 1.22, ResNet-20 from 273 to 1324 steps 1.00
# instead of 1.24, biasfield from 2000 to 4300 steps 1.32 instead of 1.48: powers of 0.07, 0.14 and 0.15.
RECOVERY = 0.2
PATIENCE = 1.1
LARGEST_STEP = 2.5
KIND_STEP = 1.5
HOPELESS = 4.0  # times delta
PLAN_SHARE = 0.05  # of the time left, for one more plan to choose from
SWAP_SHARE = 0.5  # of the time limit that must be left for forms that are dear to fit
SHARES: dict[int, tuple[float, ...]] = {
    1: (0.25, 1.0),
    2: (0.25, 0.25, 1.0),
}  # of the time limit, for the fine-tunes of a stage; the last has what is left
# With fewer steps, one long fine-tune is worth more than two, for each begins with large steps anew: VGG-like, 19.8x,
# lost 1.22 after 960 steps and 1.14 after 1700 more; 13.9x lost 0.08 after 3100 at once. A smaller network gains
# nothing beyond some 3000: biasfield, 3.0x, lost 0.71 then and 0.86 after 4000.
FEW_STEPS = 5_000
LEAST_SHARE = 0.03  # of the time limit: no fine-tune is shorter
TRIM_SHARE = 0.03  # of the time limit, for truncations after the last fine-tune
SPARE_TRIM_SHARE = 0.08  # where a refusal of the last fine-tune would leave these alone to spend delta
# Aimed at 0.9, eight of the last fine-tunes of twelve runs on four CIFAR-10 networks were refused. What a lower aim
# leaves of delta goes to truncations; what a refusal costs is the whole fine-tune.
LAST_AIM = 0.7


def search(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    tell: Tell = lambda candidate, ok: None,
) -> list[Candidate]:
    """Run stage 1 and, where asked for, stage 2.

    Args:
        bench: the network.
        settings: delta, confidence and time.
        time_left: seconds until the time limit, verification already taken off.
        tell: called with every measured candidate and whether it is accepted; False refuses it.

    Returns:
        Every measured candidate, in the order tried.
    """
    tried, record = recorder(settings, tell)
    plans = walk_ladder(bench, settings, time_left, record)
    if settings.dry_run or not plans:
        return tried
    if not settings.train:
        narrow(bench, settings, time_left, record, plans)
        return tried
    if not any(accepted(plan, settings) for plan in plans) and time_left() > 0:
        # Should all training fail, there is at least this.
        cost = bench.full_cost / math.sqrt(FIRST_RATIO)
        plans.insert(0, record(bench.measured(bench.propose(None, cost, f"stage 1, {math.sqrt(FIRST_RATIO):.1f}x"))))
    ladder = Ladder.of(bench.full_cost, drops_by_cost(plans), settings.delta)
    like = min(plans, key=lambda plan: abs(lost(plan) - settings.delta))
    pace = bench.step_seconds(like) if time_left() > 0 else math.inf
    shares = SHARES[settings.stage]
    shares = shares if pace * FEW_STEPS <= time_left() else (shares[0], shares[-1])
    first_seconds = min(shares[0] * settings.time_limit, max(time_left(), 0.0))
    explore = first_cost(settings, like, ladder, pace, first_seconds)
    expected = first_cost(settings, like, ladder, pace, max(time_left(), 0.0), AIM)
    explore = min(max(explore, plans[-1].cost), bench.full_cost / FINEST_RATIO)
    swap = time_left() > SWAP_SHARE * settings.time_limit
    first = bench.propose(None, explore, "stage 1, plan", PLAN_SHARE * time_left(), swap)
    fine_tune(bench, settings, first, first_seconds, time_left, record, FIRST, 1, ladder.drop(first.cost))
    descend(bench, settings, shares[1:], time_left, record, tried, ladder, expected)
    if any(candidate.trained and accepted(candidate, settings) for candidate in tried):
        trim(bench, settings, time_left, record, tried)
    else:
        narrow(bench, settings, time_left, record, plans)
    return tried


def first_cost(
    settings: Settings, like: Candidate, ladder: Ladder, pace: float, seconds: float, aim: float = SAFE_AIM
) -> float:
    """The cost at which `aim` of what delta allows should be lost after `seconds` of training, as by other networks.

    `like` is an untrained network that loses about delta, for its standard error; `pace` are the seconds of a training
    step, 0 where they are not known.
    """
    error = 0.0 if like.drop is None else like.drop.standard_error
    goal = max(aim * (settings.delta - settings.z * error), NOISE * settings.delta)
    share = left(seconds, HALF_STEPS * pace)
    return ladder.cost(goal / max(share, FIRST_LEFT))


def walk_ladder(bench: Bench, settings: Settings, time_left: Callable[[], float], record: Record) -> list[Candidate]:
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
        drop = lost(candidate)
        if drop > LADDER_END * max(settings.delta, settings.least_delta) or time_left() < allowed or cost <= floor:
            break
        ratio = max(ratio, bench.full_cost / plan.cost)  # without its spare channels a network may be far below
        ratio *= LADDER_STEP if drop > EARLY * settings.delta else LADDER_STEP**2
    return ladder


def narrow(
    bench: Bench,
    settings: Settings,
    time_left: Callable[[], float],
    record: Record,
    ladder: Sequence[Candidate],
) -> None:
    """Without training: bisect between the smallest accepted and the largest refused plan."""
    good = min((c.cost for c in ladder if accepted(c, settings)), default=bench.full_cost)
    bad = max((c.cost for c in ladder if not accepted(c, settings) and c.cost < good), default=None)
    while bad is not None and good / bad > FINEST_RATIO and time_left() > 0:
        cost = math.sqrt(good * bad)
        plan = bench.propose(None, cost, f"stage 1, {bench.full_cost / cost:.1f}x", PLAN_SHARE * time_left())
        if plan.cost >= good:
            break
        if plan.cost <= bad:  # there is none between that and what was asked for
            bad = cost
        elif accepted(record(bench.measured(plan)), settings):
            good = plan.cost
        else:
            bad = plan.cost


def fine_tune(
    bench: Bench,
    settings: Settings,
    candidate: Candidate,
    seconds: float,
    time_left: Callable[[], float],
    record: Record,
    name: str,
    stage: int,
    untrained: float = 0.0,
) -> Candidate | None:
    """The candidate trained and measured; None where there is no time or training failed.

    It is given up above four delta at half time, or above its `untrained` drop where that is more.
    """
    seconds = min(seconds, time_left())
    if seconds <= 0:
        return None
    candidate = dataclasses.replace(candidate, stage=stage)
    result = bench.trained(candidate, seconds, name, max(HOPELESS * settings.delta, untrained) or math.inf)
    return None if result is None else record(bench.measured(dataclasses.replace(result, stage=stage)))


def descend(
    bench: Bench,
    settings: Settings,
    shares: Sequence[float],
    time_left: Callable[[], float],
    record: Record,
    tried: Sequence[Candidate],
    ladder: Ladder,
    expected: float = 0.0,
) -> None:
    """Fine-tunes of falling cost, each from the one before; the last has all the time but what spending delta takes."""
    for index, share in enumerate(shares):
        done = [candidate for candidate in tried if candidate.trained > 0]
        if not done or any(candidate.cost <= settings.goal and accepted(candidate, settings) for candidate in done):
            return
        last = index == len(shares) - 1
        spare = last and any(accepted(candidate, settings) for candidate in done)
        most = time_left() - (SPARE_TRIM_SHARE if spare else TRIM_SHARE) * settings.time_limit
        seconds = most if last else min(share * settings.time_limit, most)
        if seconds < LEAST_SHARE * settings.time_limit:
            return
        # What is not accepted now may be by all the training that is still to come.
        cost, source = next_step(done, ladder, settings, most, 1.0 if last else PATIENCE, expected)
        cost = max(cost, settings.goal)
        name = f"stage {settings.stage}, {bench.full_cost / cost:.1f}x"
        if source is not None and cost >= source.cost:
            plan = source
        else:
            plan = bench.propose(source, cost, name, PLAN_SHARE * time_left())
            if source is not None and source.cost > KIND_STEP * cost:
                # So large a step loses much of what training gave: the original may be the better start.
                afresh = bench.propose(None, cost, name, PLAN_SHARE * time_left())
                plan = min(map(bench.measured, (plan, afresh)), key=lost)
        untrained = ladder.drop(plan.cost)
        if fine_tune(bench, settings, plan, seconds, time_left, record, name, settings.stage, untrained) is None:
            return


def next_step(
    done: Sequence[Candidate],
    ladder: Ladder,
    settings: Settings,
    seconds: float,
    patience: float = 1.0,
    expected: float = 0.0,
) -> tuple[float, Candidate | None]:
    """Cost that should just be accepted after `seconds` more of training, and what to start from.

    Training leaves a share of the untrained drop, which the ladder knows for every cost: the share that the newest
    candidate shows, falling with the time trained to the power -0.2. Where that is too hopeful, for the share grows
    with what is taken away, the secant through the last two candidates bounds the step; where there is one alone, the
    mean (of logarithms) with what other networks come to. Where labels have made a network better than the original,
    drops count from there. A refused candidate is trained on where that would do at up to `patience` times its cost,
    for a larger one starts anew; that it was trained on once and refused again shows that time alone does not do. The
    start is a trained candidate of at least that cost (of that very cost: it is trained on), from which a step down is
    at most 2.5 times; or the original, where only a larger network than the trained ones will do.

    Args:
        done: trained candidates, in the order trained.
        ladder: untrained drops.
        settings: delta and confidence.
        seconds: of training to come.
        patience: 1 where no further fine-tune would mend a refusal, so that less is aimed at.
        expected: the cost that other networks come to in all the time, see `first_cost`; 0 for none.
    """
    newest = done[-1]
    assert newest.drop is not None
    aim = AIM if patience > 1 else LAST_AIM
    # What labels have surely made better than the original can be lost as well.
    gained = max(0.0, *(-own.drop.value - own.drop.standard_error for own in done if own.drop is not None))
    goal = aim * (settings.delta + gained - settings.z * newest.drop.standard_error)
    # A drop within its standard error may be as much as that.
    least = max(newest.drop.standard_error, NOISE * settings.delta)
    share = max(newest.drop.value + gained, least) / ladder.drop(newest.cost)
    known = [(cost, drop + gained) for cost, drop in drops_by_cost(done)]

    def reachable(source: Candidate | None) -> float:
        if goal <= 0:
            return math.inf
        trained = seconds + (0.0 if source is None else source.trained)
        kept = (newest.trained / max(trained, 1e-9)) ** RECOVERY
        cost = max(ladder.cost(goal / (share * kept)), secant(known, goal / kept))
        if len(done) > 1 or cost >= expected:
            return cost
        return math.sqrt(max(cost, newest.cost / LARGEST_STEP) * expected)

    for source in sorted(done, key=lambda c: (c.cost, -c.trained)):
        cost = max(reachable(source), source.cost / LARGEST_STEP)
        if accepted(source, settings):
            return min(cost, source.cost / FINEST_RATIO), source
        stuck = sum(c.cost == source.cost for c in done) > 1
        if cost <= patience * source.cost and not stuck:
            return source.cost, source
    largest = max(c.cost for c in done)
    return max(min(reachable(None), math.exp(ladder.log_costs[0])), largest * FINEST_RATIO), None
