"""Annealing: never over a budget that can be kept, never worse than where it began, near the best there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxneutrino.allocate import Option, allocate, total_cost, total_loss
from onnxneutrino.anneal import anneal
from onnxneutrino.plan import Choice

Options = dict[str, list[Option]]


def curves(layers: int, ranks: int, seed: int) -> Options:
    """Options whose cost rises by whole numbers and whose loss falls, as those of ranks do."""
    rng = np.random.default_rng(seed)
    found: Options = {}
    for layer in range(layers):
        unit, decay = int(rng.integers(5, 60)), rng.uniform(0.1, 0.8)
        found[f"layer{layer}"] = [
            Option(Choice("svd", (rank,)), float(unit * rank), float(rng.uniform(0.9, 1.1) * math.exp(-decay * rank)))
            for rank in range(1, ranks + 1)
        ] + [Option(None, float(unit * (ranks + 1)), 0.0)]
    return found


def cheapest(options: Options) -> dict[str, Option]:
    return {name: min(own, key=lambda option: option.cost) for name, own in options.items()}


def whole(options: Options) -> dict[str, Option]:
    return {name: max(own, key=lambda option: option.cost) for name, own in options.items()}


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Options, dict[str, Option], float]:
    options: Options = {}
    for layer in range(draw(st.integers(1, 4))):
        costs = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
        options[f"layer{layer}"] = [
            Option(Choice("svd", (index + 1,)), float(cost), draw(st.floats(0, 10))) for index, cost in enumerate(costs)
        ]
    start = {name: draw(st.sampled_from(own)) for name, own in options.items()}
    budget = float(draw(st.integers(0, 150)))
    return options, start, budget


@settings(max_examples=60, deadline=None)
@given(task=tasks(), seed=st.integers(0, 5))
def test_within_budget_and_no_worse_than_a_start_that_is(
    task: tuple[Options, dict[str, Option], float], seed: int
) -> None:
    options, start, budget = task
    found = anneal(options, start, budget, seed)
    assert list(found) == list(options)
    assert all(found[name] in options[name] for name in options)
    if total_cost(cheapest(options)) <= budget:
        assert total_cost(found) <= budget
    else:
        assert total_cost(found) == total_cost(cheapest(options))
    if total_cost(start) <= budget:
        assert total_loss(found) <= total_loss(start) + 1e-9


def test_of_options_of_one_cost_it_starts_from_that_of_the_start() -> None:
    known = ((2, 2), (1, 1), (1, 2), (2, 2), (2, 0), (2, 0))  # cost and loss
    options: Options = {
        "a": [Option(Choice("svd", (rank + 1,)), *own) for rank, own in enumerate(known)],
        "b": [Option(Choice("svd", (rank,)), 1, 0) for rank in (1, 2)],
    }
    start = {"a": options["a"][4], "b": options["b"][0]}
    assert total_loss(anneal(options, start, 3.0, seed=0)) == 0.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_near_the_best_plan_there_is(share: float, seed: int) -> None:
    options = curves(3, 8, seed)
    budget = share * total_cost(whole(options))
    plans = (dict(zip(options, plan, strict=True)) for plan in itertools.product(*options.values()))
    best = min(total_loss(plan) for plan in plans if total_cost(plan) <= budget)
    found = anneal(options, cheapest(options), budget, seed)
    assert total_loss(found) <= 1.1 * best + 1e-9


def test_a_bad_start_in_a_large_problem_comes_near_the_allocation() -> None:
    options = curves(25, 24, 7)
    budget = 0.4 * total_cost(whole(options))
    allocated = allocate(options, budget)
    from_cheapest = anneal(options, cheapest(options), budget, 0)
    assert total_loss(from_cheapest) < 0.2 * total_loss(cheapest(options))
    assert total_loss(from_cheapest) <= 1.5 * total_loss(allocated)
    assert total_loss(anneal(options, allocated, budget, 0)) <= total_loss(allocated) + 1e-12


def test_a_start_over_budget_is_lowered_into_it() -> None:
    options = curves(5, 10, 3)
    budget = 0.3 * total_cost(whole(options))
    found = anneal(options, whole(options), budget, 0)
    assert total_cost(found) <= budget
    assert total_loss(found) <= 1.3 * total_loss(allocate(options, budget))


def test_the_seed_decides() -> None:
    options = curves(12, 20, 1)
    start, budget = cheapest(options), 0.4 * total_cost(whole(options))
    assert anneal(options, start, budget, 3) == anneal(options, start, budget, 3)
    plans = [anneal(options, start, budget, seed) for seed in range(4)]
    assert any(plan != plans[0] for plan in plans[1:])


def test_a_budget_for_everything_keeps_everything() -> None:
    options = curves(6, 10, 2)
    assert anneal(options, whole(options), total_cost(whole(options)), 0) == whole(options)
