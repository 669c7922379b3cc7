"""Several budgets at once, against enumeration; and true costs that an estimate knows only roughly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxneutrino.allocate import Option, allocate, total_loss
from onnxneutrino.budgets import Values, allocate_measured, allocate_within
from onnxneutrino.plan import Choice

Problem = dict[str, list[Option]]


def option(place: int, costs: Sequence[float], loss: float) -> Option:
    return Option(Choice("svd", (place + 1,)), sum(costs), loss, tuple(costs))


def spent(plan: Mapping[str, Option]) -> Values:
    return np.sum([own.costs for own in plan.values()], axis=0)


def best_loss(problem: Problem, budgets: Sequence[float]) -> float:
    """Least summed loss within all budgets, by enumeration; infinite where no plan is."""
    return min(
        (
            sum(own.loss for own in pick)
            for pick in itertools.product(*problem.values())
            if np.all(np.sum([own.costs for own in pick], axis=0) <= np.array(budgets))
        ),
        default=math.inf,
    )


def layers(count: int, seed: int, kinds: int = 2, steps: int = 12) -> Problem:
    """Layers with losses that fall with every one of their costs, which differ from option to option."""
    generator = np.random.default_rng(seed)
    problem: Problem = {}
    for index in range(count):
        sizes = np.exp(generator.uniform(0, 2, kinds))
        weight = math.exp(generator.uniform(-2, 2))
        own = []
        for place in range(steps):
            shares = (place + generator.random(kinds)) / steps
            own.append(option(place, sizes * shares, weight * math.exp(-4 * float(np.prod(shares) ** (1 / kinds)))))
        problem[f"layer{index}"] = own
    return problem


@pytest.mark.parametrize("kinds", [2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_every_budget_holds_and_the_loss_is_near_the_least(seed: int, kinds: int) -> None:
    problem = layers(4, seed, kinds, steps=8)
    generator = np.random.default_rng(seed)
    low = np.sum([np.min([own.costs for own in options], axis=0) for options in problem.values()], axis=0)
    high = np.sum([np.max([own.costs for own in options], axis=0) for options in problem.values()], axis=0)
    budgets = low + (high - low) * generator.uniform(0.3, 0.7, kinds)
    plan = allocate_within(problem, budgets)
    assert list(plan) == list(problem)
    assert all(own in problem[name] for name, own in plan.items())
    assert np.all(spent(plan) <= budgets * (1 + 1e-9))
    assert total_loss(plan) <= 1.15 * best_loss(problem, budgets)


def test_on_the_whole_the_loss_is_within_two_per_cent_of_the_least() -> None:
    found, least = 0.0, 0.0
    for seed in range(40):
        problem = layers(4, seed, steps=8)
        high = np.sum([np.max([own.costs for own in options], axis=0) for options in problem.values()], axis=0)
        budgets = high * np.random.default_rng(seed).uniform(0.35, 0.8, 2)
        found += total_loss(allocate_within(problem, budgets))
        least += best_loss(problem, budgets)
    assert least <= found <= 1.02 * least


@pytest.mark.parametrize("seed", range(4))
def test_one_budget_is_what_allocate_does(seed: int) -> None:
    problem = layers(10, seed, kinds=1)
    budget = 0.4 * sum(own[-1].cost for own in problem.values())
    assert total_loss(allocate_within(problem, [budget])) == pytest.approx(total_loss(allocate(problem, budget)))


def test_a_budget_that_does_not_bind_changes_nothing() -> None:
    problem = layers(6, 3)
    tight = 0.4 * sum(own[-1].costs[0] for own in problem.values())
    alone = {name: [Option(own.choice, own.costs[0], own.loss) for own in group] for name, group in problem.items()}
    both = allocate_within(problem, [tight, 1e6])
    assert total_loss(both) <= 1.02 * total_loss(allocate(alone, tight))
    assert spent(both)[0] <= tight


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), shares=st.tuples(st.floats(-0.5, 1.0), st.floats(-0.5, 1.0)))
def test_where_nothing_fits_the_excess_is_small(seed: int, shares: tuple[float, float]) -> None:
    problem = layers(3, seed, steps=6)
    high = np.sum([np.max([own.costs for own in options], axis=0) for options in problem.values()], axis=0)
    budgets = high * shares
    plan = allocate_within(problem, budgets)
    least = min(
        float(np.max(np.sum([own.costs for own in pick], axis=0) - budgets))
        for pick in itertools.product(*problem.values())
    )
    excess = float(np.max(spent(plan) - budgets))
    if least > 0:
        assert excess <= least + 0.1 * float(np.max(high))
    elif min(shares) > 0.4:
        assert excess <= 1e-9


@pytest.mark.parametrize("error", [-0.2, 0.0, 0.15])
def test_true_costs_hold_whatever_the_estimate_was_off(error: float) -> None:
    """The second cost has a part that the options do not know, and that grows with the number of chains."""
    problem = layers(8, 1, steps=40)
    rests = np.array([0.1, 0.2])
    asked: list[Mapping[str, Option]] = []
    scale = 1.0 / (0.5 * np.sum([own[-1].costs for own in problem.values()], axis=0))
    shares = {
        name: [option(place, np.array(own.costs) * scale, own.loss) for place, own in enumerate(group)]
        for name, group in problem.items()
    }

    def figures(plan: Mapping[str, Option]) -> Values:
        asked.append(plan)
        ranks = [own.choice.ranks[0] for own in plan.values() if own.choice is not None]
        return rests + spent(plan) + np.array([0.0, error * (1 - 0.005 * sum(ranks) / 8)])

    plan = allocate_measured(shares, rests, 1.0, figures)
    assert np.all(figures(plan) <= 1.0)
    assert np.max(figures(plan)) > 0.97, "what the estimate was too high by is used"
    assert len(asked) <= 7
