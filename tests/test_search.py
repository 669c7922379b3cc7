"""The two stages on a bench that is a formula: the drop follows from the costs, training recovers a share."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from onnxneutrino.allocate import Option
from onnxneutrino.bench import Bench, Candidate, Settings, accepted, drops_by_cost
from onnxneutrino.budgets import Values, allocate_measured
from onnxneutrino.ladder import NOISE, Ladder
from onnxneutrino.layer_options import GOAL
from onnxneutrino.metrics import Drop
from onnxneutrino.plan import Choice
from onnxneutrino.proposals import least_cost, propose
from onnxneutrino.search import LARGEST_STEP, LAST_AIM, PATIENCE, next_step, search
from onnxneutrino.spend import AIM, FINEST_RATIO, trim
from onnxneutrino.target_search import FIRST_STEP, search_targets

LIMIT = 900.0
Z = NormalDist().inv_cdf(0.8)


@dataclass(frozen=True)
class Net:
    """What a candidate's network is here: ranks by layer, and the share of the loss that training recovered."""

    ranks: Mapping[str, int]
    recovered: float = 0.0


def swapped(choices: Mapping[str, Option]) -> bool:
    return any(option.choice is not None and option.choice.form == "cp" for option in choices.values())


@dataclass
class FakeBench:
    """Layers of 40 ranks; the whole network's relative error is `Σ weight · exp(-decay · rank)`.

    The drop is `slope` times that error; training of `s` seconds leaves `(1 - recovery) · (LIMIT / s)^0.3` of it,
    as fine-tunes of real networks do, or `1 - recovery · (1 - exp(-s / 60))` where it `saturates`. A clock counts.
    """

    slope: float = 60.0
    recovery: float = 0.8
    error: float = 0.25
    layers: int = 6
    fail: Sequence[int] = ()
    swap: float | None = None
    saturates: bool = False
    clock: float = 0.0
    pace: float = 0.05
    trainings: list[tuple[str, float, float]] = field(default_factory=list)
    realized: list[tuple[Candidate | None, Mapping[str, Option]]] = field(default_factory=list)
    rest: float = 500.0

    def unit(self, layer: int) -> float:
        return 20.0 + 17.0 * layer

    def decay(self, layer: int) -> float:
        return 0.08 + 0.03 * layer

    def own_loss(self, layer: int, rank: int) -> float:
        return math.exp(-self.decay(layer) * rank) if rank <= 40 else 0.0

    def cost(self, name: str, rank: int) -> float:
        return self.unit(int(name[5:])) * (rank if rank <= 40 else 64)

    @property
    def full_cost(self) -> float:
        return self.rest + sum(self.cost(f"layer{layer}", 41) for layer in range(self.layers))

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        found = {}
        for layer in range(self.layers):
            name = f"layer{layer}"
            top = 40 if source is None or name not in source.network.ranks else source.network.ranks[name]
            own = [
                Option(Choice("svd", (r,)), self.unit(layer) * r, self.own_loss(layer, r)) for r in range(1, top + 1)
            ]
            if source is None:
                own.append(Option(None, self.cost(name, 41), 0.0))
            found[name] = own
        return found, self.rest

    @property
    def least_cost(self) -> float:
        return least_cost(self)

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        return propose(self, source, cost, name, seconds, swap, 0)

    def sensitivities(self) -> Mapping[str, Callable[[float], float]]:
        weights = {f"layer{layer}": self.weight(layer) for layer in range(self.layers)}
        return {name: lambda error, weight=weight: weight * error for name, weight in weights.items()}  # type: ignore[misc]

    def weight(self, layer: int) -> float:
        return 0.2 + 0.3 * layer

    def damage(self, ranks: Mapping[str, int]) -> float:
        return sum(self.weight(int(name[5:])) * self.own_loss(int(name[5:]), rank) for name, rank in ranks.items())

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        self.realized.append((source, dict(choices)))
        self.clock += 1.0
        ranks = {layer: option.choice.ranks[0] for layer, option in choices.items() if option.choice is not None}
        network = Net(ranks, 0.0 if source is None else source.network.recovered)
        return Candidate(
            name,
            network,
            choices,
            self.rest + sum(option.cost for option in choices.values()),
            divergence=self.damage(ranks) * (self.swap if self.swap is not None and swapped(choices) else 1.0),
            trained=0.0 if source is None else source.trained,
            seconds=1.0,
        )

    def challenged(self, choices: Mapping[str, Option]) -> Mapping[str, Option]:
        if self.swap is None:
            return choices
        return {
            name: option if option.choice is None else Option(Choice("cp", option.choice.ranks), option.cost, 0.0)
            for name, option in choices.items()
        }

    def step_seconds(self, candidate: Candidate) -> float:
        self.clock += 1.0
        return self.pace

    def drop_of(self, network: Net) -> float:
        return self.slope * self.damage(network.ranks) * (1 - network.recovered)

    def measured(self, candidate: Candidate) -> Candidate:
        self.clock += 1.0
        value = self.drop_of(candidate.network)
        return dataclasses.replace(
            candidate, drop=Drop(value, self.error, value - 1.96 * self.error, value + 1.96 * self.error)
        )

    def trained(self, candidate: Candidate, seconds: float, name: str, hopeless: float) -> Candidate | None:
        self.trainings.append((name, seconds, self.clock))
        self.clock += seconds
        if len(self.trainings) - 1 in self.fail:
            return None
        total = seconds + candidate.trained
        power = max(0.0, 1 - (1 - self.recovery) * (LIMIT / total) ** 0.3)
        gain = self.recovery * (1 - math.exp(-total / 60)) if self.saturates else power
        network = dataclasses.replace(candidate.network, recovered=gain)
        return dataclasses.replace(candidate, name=name, network=network, trained=candidate.trained + seconds)

    def best_cost(self, goal: float, recovered: float) -> float:
        """Least cost of any plan whose drop, `recovered` taken off, is `goal`: greedy over single ranks.

        Rank 41 stands for a layer as it is.
        """
        ranks = {f"layer{layer}": 41 for layer in range(self.layers)}
        allowed = goal / (self.slope * (1 - recovered))

        def price(name: str) -> float:
            lowered = self.own_loss(int(name[5:]), ranks[name] - 1) - self.own_loss(int(name[5:]), ranks[name])
            return (
                self.weight(int(name[5:])) * lowered / (self.cost(name, ranks[name]) - self.cost(name, ranks[name] - 1))
            )

        while True:
            names = [name for name in ranks if ranks[name] > 1]
            fits = [n for n in names if self.damage({**ranks, n: ranks[n] - 1}) <= allowed]
            if not fits:
                return self.rest + sum(self.cost(name, rank) for name, rank in ranks.items())
            ranks[min(fits, key=price)] -= 1


def wishes(**changes: Any) -> Settings:
    own = Settings(delta=1.0, z=Z, stage=2, time_limit=LIMIT, train=True, dry_run=False, seed=0)
    return dataclasses.replace(own, **changes)


def run(bench: FakeBench, own: Settings, limit: float = LIMIT) -> list[Candidate]:
    told: list[tuple[Candidate, bool]] = []
    tried = search(bench, own, lambda: limit - bench.clock, lambda candidate, ok: told.append((candidate, ok)))
    assert [candidate for candidate, _ in told] == tried
    assert all(ok is accepted(candidate, own) for candidate, ok in told)
    assert all(candidate.drop is not None for candidate in tried)
    return tried


def smallest(tried: Sequence[Candidate], own: Settings) -> Candidate:
    good = [candidate for candidate in tried if accepted(candidate, own)]
    assert good, "nothing was accepted"
    return min(good, key=lambda candidate: candidate.cost)


BENCHES: dict[str, dict[str, Any]] = {
    "usual": {},
    "gentle": {"slope": 8.0},
    "steep": {"slope": 300.0},
    "hardly smaller": {"slope": 5000.0, "error": 0.2},
    "little recovery": {"recovery": 0.3},
    "much recovery": {"recovery": 0.95},
    "sharp judge": {"error": 0.02},
    "two layers": {"layers": 2},
    "saturating": {"saturates": True},
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", BENCHES)
def test_it_ends_near_the_smallest_network_that_is_accepted(name: str, stage: int) -> None:
    bench = FakeBench(**BENCHES[name])
    own = wishes(stage=stage)
    tried = run(bench, own)
    last = smallest(tried, own)
    assert last.trained > 0 or name == "little recovery"  # nothing is left of what is trained there
    assert (tried[0].stage, max(candidate.stage for candidate in tried)) == (1, stage)
    best = bench.best_cost(own.delta - own.z * bench.error, bench.recovery)
    # Stage 1 has one step after its first fine-tune; a network that hardly recovers costs a fine-tune to find out.
    assert last.cost <= {1: 1.4, 2: 1.22}[stage] * best
    assert all(last.cost <= c.cost for c in tried if not c.trained and accepted(c, own))


def test_stage_two_gains_on_stage_one_and_starts_from_its_weights() -> None:
    bench, own = FakeBench(), wishes()
    tried = run(bench, own)
    first = smallest([candidate for candidate in tried if candidate.stage == 1], own)
    second = smallest([candidate for candidate in tried if candidate.stage == 2], own)
    assert second.cost < first.cost
    sources = [source for source, _ in bench.realized if source is not None]
    assert sources
    assert all(source.trained > 0 for source in sources)


def test_plans_are_made_of_the_benchs_own_options() -> None:
    """A plan holds the bench's own options: their losses are what a challenger's error is compared with."""
    bench = FakeBench()
    run(bench, wishes())
    assert len(bench.realized) > 5
    for source, choices in bench.realized:
        options, _ = bench.options(source)
        assert all(option in options[name] for name, option in choices.items())


def test_a_step_from_trained_weights_is_at_most_half_as_small_again() -> None:
    bench = FakeBench()
    run(bench, wishes())
    for source, choices in bench.realized:
        if source is not None:
            cost = bench.rest + sum(option.cost for option in choices.values())
            assert source.cost / LARGEST_STEP * 0.97 <= cost <= source.cost


@pytest.mark.parametrize(("divergence", "taken"), [(0.5, True), (1.0, False), (2.0, False)])
def test_swapped_forms_are_trained_where_the_network_diverges_less(divergence: float, taken: bool) -> None:
    bench = FakeBench(swap=divergence)
    tried = run(bench, wishes(stage=1))
    assert sum(swapped(choices) for _, choices in bench.realized) == 1
    (first, *_) = (candidate for candidate in tried if candidate.trained)
    assert swapped(first.choices) is taken


def test_without_training_it_bisects_to_the_finest_step() -> None:
    bench, own = FakeBench(), wishes(train=False)
    tried = run(bench, own)
    assert not bench.trainings
    best = bench.best_cost(own.delta - own.z * bench.error, 0.0)
    assert smallest(tried, own).cost <= FINEST_RATIO * 1.02 * best


def test_without_training_nothing_good_is_still_an_end() -> None:
    bench = FakeBench(slope=1e6)
    own = wishes(train=False)
    tried = run(bench, own)
    assert tried
    assert not any(accepted(candidate, own) and candidate.cost < 0.9 * bench.full_cost for candidate in tried)
    assert len(tried) < 40


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_a_dry_run_trains_nothing(stage: int, train: bool) -> None:
    bench = FakeBench()
    tried = run(bench, wishes(stage=stage, train=train, dry_run=True))
    assert tried
    assert not bench.trainings
    assert len(tried) <= 12


@pytest.mark.parametrize("fail", [[0], [1], [2], [0, 1, 2, 3, 4]])
def test_a_training_that_fails_is_survived(fail: list[int]) -> None:
    bench, own = FakeBench(fail=fail), wishes()
    tried = run(bench, own)
    assert smallest(tried, own).cost < bench.full_cost
    learned = [c for c in tried if c.trained and not re.search("trimmed", c.name)]
    assert len(learned) <= len(bench.trainings) - len([i for i in fail if i < len(bench.trainings)])


@pytest.mark.parametrize("limit", [0.0, 3.0, 20.0, 100.0, 400.0])
def test_time_that_runs_out_is_kept_to(limit: float) -> None:
    """What is not training takes the bench a second a step, and no training starts after the end."""
    bench = FakeBench()
    tried = run(bench, wishes(time_limit=limit), limit)
    assert tried
    for _, seconds, start in bench.trainings:
        assert seconds > 0
        assert start + seconds <= limit + 1e-6
    assert bench.clock <= limit + 25


def test_shares_of_the_time_limit_are_not_exceeded() -> None:
    bench = FakeBench()
    run(bench, wishes())
    seconds = [seconds for _, seconds, _ in bench.trainings]
    assert seconds[0] == pytest.approx(0.25 * LIMIT)
    assert sum(seconds) <= 0.97 * LIMIT
    assert len(seconds) >= 3


def test_few_steps_are_not_divided_among_many_fine_tunes() -> None:
    bench = FakeBench(pace=0.5)
    run(bench, wishes())
    seconds = [seconds for name, seconds, _ in bench.trainings]
    assert seconds[0] == pytest.approx(0.25 * LIMIT)
    assert seconds[1] >= 0.6 * LIMIT
    assert len(seconds) == 2


def test_the_search_repeats_itself() -> None:
    first, second = (run(FakeBench(), wishes()) for _ in range(2))
    assert [(c.name, c.cost) for c in first] == [(c.name, c.cost) for c in second]


def test_a_network_that_cannot_get_smaller_ends_at_once() -> None:
    bench = FakeBench()
    bench.rest = 1e9
    tried = run(bench, wishes(train=False))
    assert 1 <= len(tried) <= 3


def candidate(cost: float, drop: float, error: float = 0.2, trained: float = 10.0) -> Candidate:
    return Candidate("c", None, {}, cost, 0.0, Drop(drop, error, drop - 1, drop + 1), trained)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Candidate], Ladder, Settings]:
    """A ladder, and fine-tunes as `search` makes them: each at the cost asked for, or up to 5 % below it."""
    own = wishes(delta=draw(st.floats(0.1, 5)))
    error = draw(st.floats(0.0, 1.0))
    steps = draw(st.integers(1, 8))
    lost = draw(st.lists(st.floats(-1, 30), min_size=steps, max_size=steps))
    plans = [candidate(1000 / 1.5 ** (i + 1), drop, error, 0.0) for i, drop in enumerate(lost)]
    ladder = Ladder.of(1000.0, drops_by_cost(plans), own.delta)
    done = [candidate(draw(st.floats(plans[-1].cost, plans[0].cost)), draw(st.floats(-1, 10)), error)]
    for _ in range(draw(st.integers(0, 3))):
        seconds = draw(st.floats(1.0, 100.0))
        cost, source = next_step(done, ladder, own, seconds)
        before = source.trained if source is not None else 0.0
        cost *= draw(st.floats(0.95, 1.0))
        done.append(candidate(cost, draw(st.floats(-1, 10)), error, before + seconds))
    return done, ladder, own


@examples(max_examples=300, deadline=None)
@given(history=histories(), seconds=st.floats(0.1, 500.0))
def test_next_step_stays_within_its_bounds(history: tuple[list[Candidate], Ladder, Settings], seconds: float) -> None:
    done, ladder, own = history
    cost, source = next_step(done, ladder, own, seconds)
    assert math.isfinite(cost)
    if source is None:
        assert not any(accepted(c, own) for c in done), "what was accepted is built upon"
        assert cost >= max(c.cost for c in done) * FINEST_RATIO - 1e-9
        return
    assert source in done
    assert source.cost / LARGEST_STEP - 1e-9 <= cost <= source.cost
    if accepted(source, own):
        assert cost <= source.cost / FINEST_RATIO + 1e-9, "an accepted network is not trained on as it is"
    smallest_good = min((c.cost for c in done if accepted(c, own)), default=math.inf)
    assert source.cost <= smallest_good, "nothing larger than what was accepted is tried"


def doubling() -> Ladder:
    """The drop is 4 at a cost of 400, and four times as much wherever the cost is half."""
    points = [candidate(cost, 4 * (400 / cost) ** 2, 0, 0.0) for cost in (800, 400, 200)]
    return Ladder.of(1600, drops_by_cost(points), 2.0)


def test_a_ladder_knows_its_points_between_them_and_beyond() -> None:
    ladder = doubling()
    for cost in (800, 600, 400, 250, 200, 100):
        assert ladder.drop(cost) == pytest.approx(4 * (400 / cost) ** 2)
        assert ladder.cost(ladder.drop(cost)) == pytest.approx(cost)
    assert ladder.drop(1600) == pytest.approx(NOISE * 2.0)


def test_next_step_scales_the_ladder_by_what_training_left() -> None:
    # At 400 training took a drop of 4 to 0.8; with no more of it aim · 2 is expected where the ladder has aim · 10.
    for patience, aim in ((1.0, LAST_AIM), (PATIENCE, AIM)):
        cost, source = next_step([candidate(400, 0.8, 0.0)], doubling(), wishes(delta=2.0), 1e-9, patience)
        assert cost == pytest.approx(400 / math.sqrt(aim * 2.5))
        assert source is not None


def test_one_candidate_alone_is_trusted_half_as_far_as_other_networks() -> None:
    alone, two = [candidate(400, 0.8, 0.0)], [candidate(450, 0.7, 0.0), candidate(400, 0.8, 0.0)]
    for done, meets in ((alone, True), (two, False)):
        hopeful, _ = next_step(done, doubling(), wishes(delta=2.0), 1e-9)
        cost, _ = next_step(done, doubling(), wishes(delta=2.0), 1e-9, 1.0, 380.0)
        assert hopeful < 380
        assert cost == pytest.approx(math.sqrt(hopeful * 380) if meets else hopeful)
    # Where the candidate promises less than others, it is believed.
    hopeful, _ = next_step(alone, doubling(), wishes(delta=2.0), 1e-9)
    assert next_step(alone, doubling(), wishes(delta=2.0), 1e-9, 1.0, 100.0)[0] == pytest.approx(hopeful)


def test_what_is_left_of_delta_is_spent_on_a_trained_network_though_an_untrained_one_is_smaller() -> None:
    class Cutting:
        full_cost = 1000.0

        def propose(self, source: Candidate, cost: float, *given: Any) -> Candidate:
            assert source is trained
            return candidate(cost, 0.5 if cost > 40 else 2.0, 0.1)

        def measured(self, own: Candidate) -> Candidate:
            return own

    trained, untrained = candidate(100, 0.1, 0.1), candidate(99, 0.8, 0.1, 0.0)
    recorded: list[Candidate] = []

    def record(own: Candidate) -> Candidate:
        recorded.append(own)
        return own

    trim(cast(Bench, Cutting()), wishes(delta=1.0), lambda: 1.0, record, [trained, untrained])
    assert 40 < min(own.cost for own in recorded if accepted(own, wishes(delta=1.0))) < 40 * FINEST_RATIO**2


def test_next_step_takes_a_drop_within_its_error_for_that_error() -> None:
    """What nothing is lost of on 5000 images may still have lost a fifth of a point."""
    sure, unsure = ([candidate(400, 0.001, error)] for error in (0.0, 0.3))
    wish = wishes(delta=2.0)
    least = candidate(400, 0.3, 0.3)
    assert next_step(unsure, doubling(), wish, 1e-9)[0] == next_step([least], doubling(), wish, 1e-9)[0]
    assert next_step(unsure, doubling(), wish, 1e-9)[0] > next_step(sure, doubling(), wish, 1e-9)[0]


def test_next_step_may_lose_again_what_labels_have_surely_gained() -> None:
    wish = wishes(delta=2.0)
    better, equal = candidate(400, -3.0, 1.0), candidate(400, 0.0, 1.0)
    cost, source = next_step([better], doubling(), wish, 1e-9)
    assert source is better
    # Two below the original are sure, and its error is what it counts as: 1 of the ladder's 4 at this cost.
    assert cost == pytest.approx(doubling().cost(4 * LAST_AIM * (2.0 + 2.0 - wish.z)))
    assert cost < next_step([equal], doubling(), wish, 1e-9)[0]


def test_next_step_trains_a_refused_candidate_on_where_time_should_do() -> None:
    refused = candidate(400, 2.1, 0.0, trained=10.0)
    # What is left of the drop falls by (10 / 30)^0.2 = 0.80, which is enough for AIM · 2 ...
    assert next_step([refused], doubling(), wishes(delta=2.0), 20.0, PATIENCE) == (400, refused)
    # ... but not for 1, nor where the same was tried before.
    for done, delta in (([refused], 1.0), ([refused, refused], 2.0)):
        cost, source = next_step(done, doubling(), wishes(delta=delta), 20.0)
        assert source is None
        assert cost > 400


class TargetBench(FakeBench):
    """The same layers under two hard targets: the costs as before, and one that layers pay for the other way round.

    True costs are what the options say, and two in a thousand of the first.
    """

    targets: tuple[float, float] = (6000.0, 6000.0)

    def costs(self, name: str, rank: int) -> tuple[float, float]:
        steps, layer = rank if rank <= 40 else 64, int(name[5:])
        mirrored = self.unit(self.layers - 1 - layer)
        return self.unit(layer) * steps / self.targets[0], mirrored * steps / self.targets[1]

    @property
    def rests(self) -> Values:
        return self.rest / np.array(self.targets)

    def figures(self, choices: Mapping[str, Option]) -> Values:
        found = self.rests + np.sum([own.costs for own in choices.values()], axis=0)
        return np.asarray(found + np.array([0.002, 0.0]))

    @property
    def full_cost(self) -> float:
        costs = [self.costs(f"layer{layer}", 41) for layer in range(self.layers)]
        return float(max(self.rests + np.sum(costs, axis=0)))

    @property
    def least_cost(self) -> float:
        return GOAL

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        plain, _ = super().options(source)
        return {
            name: [
                dataclasses.replace(o, costs=self.costs(name, 41 if o.choice is None else o.choice.ranks[0]))
                for o in own
            ]
            for name, own in plain.items()
        }, 0.0

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        def within(options: Mapping[str, Sequence[Option]], bound: float) -> Mapping[str, Option]:
            return allocate_measured(options, self.rests, bound, self.figures)

        return propose(self, source, cost, name, seconds, swap, 0, within)

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        made = super().realize(source, choices, name)
        return dataclasses.replace(made, cost=float(max(self.figures(choices))))


def towards(bench: FakeBench, limit: float = LIMIT, **changes: Any) -> tuple[list[Candidate], Settings]:
    own = wishes(**{"goal": GOAL, "delta": math.inf, "large_drop": 9.0, **changes})
    told: list[Candidate] = []
    tried = search_targets(bench, own, lambda: limit - bench.clock, lambda candidate, ok: told.append(candidate))
    assert told == tried
    assert all(candidate.drop is not None for candidate in tried)
    return tried, own


def test_hard_targets_are_met_with_nearly_all_the_time_spent_on_one_network() -> None:
    bench = TargetBench(slope=5.0)
    tried, _ = towards(bench)
    assert [c.trained > 0 for c in tried] == [False, True]
    assert 0.97 <= tried[-1].cost <= GOAL
    assert tried[-1].trained > 0.95 * LIMIT
    assert tried[-1].stage == 2


def test_a_network_within_delta_untrained_has_all_the_time_too() -> None:
    tried, own = towards(TargetBench(slope=5.0), delta=100.0)
    assert [accepted(c, own) for c in tried] == [True, True]
    assert tried[-1].trained > 0.95 * LIMIT


def test_where_much_is_lost_a_larger_network_is_trained_first() -> None:
    bench = TargetBench(slope=60.0)
    tried, own = towards(bench)
    first, last = (c for c in tried if c.trained)
    assert tried[0].drop is not None
    assert tried[0].drop.value > own.large_drop
    assert (first.stage, last.stage) == (1, 2)
    assert 0.97 * FIRST_STEP <= first.cost <= FIRST_STEP
    assert 0.97 <= last.cost <= GOAL
    assert last.trained > 0.9 * LIMIT, "what the first one learned is built upon"


def test_stage_one_alone_has_one_fine_tune_at_the_targets() -> None:
    tried, _ = towards(TargetBench(slope=60.0), stage=1)
    (last,) = (c for c in tried if c.trained)
    assert last.stage == 1
    assert last.cost <= GOAL


def test_a_network_at_the_targets_within_delta_ends_the_search() -> None:
    bench = TargetBench(slope=5.0)
    tried, own = towards(bench, delta=1.0)
    assert accepted(tried[-1], own)
    assert 0.97 <= tried[-1].cost <= GOAL
    assert all(c.cost <= GOAL for c in tried if c.trained)


@pytest.mark.parametrize("target", [1600.0, 4000.0, 6000.0])
@pytest.mark.parametrize("slope", [30.0, 60.0, 200.0])
def test_targets_out_of_deltas_reach_lead_to_a_small_network_within_delta(slope: float, target: float) -> None:
    bench = TargetBench(slope=slope)
    bench.targets = (target, target)
    tried, own = towards(bench, delta=1.0)
    assert any(c.trained and c.cost <= GOAL for c in tried)
    best = smallest(tried, own)
    assert GOAL < best.cost < 0.9 * bench.full_cost
    assert best.trained > 0
    assert all(c.cost >= 0.97 * GOAL for c in tried), "below the targets nothing is gained"
    assert bench.clock <= LIMIT + 25


@pytest.mark.parametrize("delta", [math.inf, 1.0])
def test_targets_that_no_plan_meets_give_the_nearest_plan(delta: float) -> None:
    bench = TargetBench(slope=60.0)
    bench.targets = (600.0, 1e6)
    tried, own = towards(bench, delta=delta)
    least = bench.figures({name: options[0] for name, options in bench.options(None)[0].items()})
    assert max(least) > GOAL
    assert tried[0].cost == pytest.approx(max(least))
    assert any(c.trained for c in tried)
    assert delta == math.inf or smallest(tried, own).cost > max(least)


@pytest.mark.parametrize("delta", [math.inf, 1.0])
def test_targets_without_training(delta: float) -> None:
    bench = TargetBench(slope=60.0)
    tried, own = towards(bench, train=False, delta=delta)
    assert not bench.trainings
    assert tried[0].cost <= GOAL
    if delta == math.inf:
        assert len(tried) == 1
    else:
        assert GOAL < smallest(tried, own).cost < bench.full_cost


def test_a_dry_run_makes_the_plan_for_the_targets_alone() -> None:
    bench = TargetBench(slope=60.0)
    tried, _ = towards(bench, dry_run=True, delta=1.0)
    assert len(tried) == 1
    assert not bench.trainings


@pytest.mark.parametrize("fail", [[0], [1], [0, 1], list(range(9))])
@pytest.mark.parametrize("delta", [math.inf, 1.0])
def test_a_training_that_fails_on_the_way_to_the_targets_is_survived(fail: list[int], delta: float) -> None:
    bench = TargetBench(slope=60.0, fail=fail)
    tried, own = towards(bench, delta=delta)
    assert tried[0].cost <= GOAL
    assert delta == math.inf or any(accepted(c, own) for c in tried)


@pytest.mark.parametrize("limit", [0.0, 3.0, 20.0, 100.0])
@pytest.mark.parametrize("delta", [math.inf, 1.0])
def test_the_way_to_the_targets_keeps_to_the_time(limit: float, delta: float) -> None:
    bench = TargetBench(slope=60.0)
    tried, _ = towards(bench, limit, time_limit=limit, delta=delta)
    assert tried
    assert all(start + seconds <= limit + 1e-6 for _, seconds, start in bench.trainings)
    assert bench.clock <= limit + 25
