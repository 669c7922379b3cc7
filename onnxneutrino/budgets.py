"""One option for every layer under several budgets at once, such as params and multiply-accumulates.

The budgets are put into one: the sum of all costs, each in shares of its budget and weighted; the weights of budgets
that the best plan breaks are raised until all hold (surrogate constraints, Glover 1968). What is still too dear is
lowered layer by layer, what is left of the budgets goes to single upgrades, and the best plan met is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.allocate import Option, allocate

Values: TypeAlias = NDArray[np.float64]
Pick: TypeAlias = NDArray[np.intp]
ROUNDS = 8
SHARPNESS = 2.0  # weights are multiplied by the share of the budget that is used, to this power
CORRECTIONS = 5
ROUNDING = 1e-12
CORRECT = 1e-3  # of the budget: what an estimate may be off


def allocate_within(options: Mapping[str, Sequence[Option]], budgets: Sequence[float] | Values) -> dict[str, Option]:
    """Choose one option a layer so that every summed cost is within its budget and the summed loss small.

    Args:
        options: at least one for every layer; `costs` of each holds a number for every budget.
        budgets: in the units of these costs, in which their excesses are compared.

    Returns:
        One option a layer. Where no plan within all budgets is found, the one whose largest excess is smallest.
    """
    problem = _Problem.of(options)
    limits = np.asarray(budgets, np.float64)
    # A budget that no plan can keep counts as the least that one can reach.
    reachable = np.maximum(limits, problem.least)
    scales = np.maximum(reachable, ROUNDING)
    weights = np.ones(len(limits))
    made: list[tuple[float, float, Pick]] = []
    for _ in range(ROUNDS):
        combined = problem.costs @ (weights / scales)
        picked = problem.allocated(combined, float(weights @ (reachable / scales)))
        used = problem.spent(picked) / scales
        finished = problem.filled(problem.lowered(picked, reachable, scales), reachable)
        excess = float(np.max(problem.spent(finished) - limits))
        made.append((max(excess, ROUNDING), float(np.sum(problem.losses[finished])), finished))
        if len(limits) == 1 or np.all(used <= 1 + ROUNDING):
            break
        weights = weights * used**SHARPNESS
        weights /= np.max(weights)
    _, _, best = min(made, key=lambda own: own[:2])
    return problem.plan(best)


def allocate_measured(
    options: Mapping[str, Sequence[Option]],
    rests: Values,
    bound: float,
    figures: Callable[[Mapping[str, Option]], Values],
) -> dict[str, Option]:
    """The same where a plan's true costs are known only once it stands: what the estimate was off is taken off next.

    Args:
        options: see `allocate_within`.
        rests: estimated costs of all that is not a layer, one for every budget.
        bound: on every one of the true costs, which are in the same units.
        figures: the true costs of a plan.

    Returns:
        Of the plans met the one within the bound that loses least; without one that which exceeds it least.
    """
    off = np.zeros(len(rests))
    made: list[tuple[float, float, dict[str, Option]]] = []
    for _ in range(CORRECTIONS):
        plan = allocate_within(options, bound - rests - off)
        truth = figures(plan)
        made.append((max(float(np.max(truth)) - bound, 0.0), sum(own.loss for own in plan.values()), plan))
        error = truth - rests - np.sum([own.costs for own in plan.values()], axis=0)
        if np.all(np.abs(error - off) <= CORRECT * bound) and np.all((truth <= bound) | (error <= off)):
            break
        off = np.where(truth > bound, np.maximum(error, off + truth - bound), error)
    return min(made, key=lambda own: own[:2])[2]


@dataclass(frozen=True, eq=False)
class _Problem:
    """All options of all layers in arrays: costs `(N, budgets)`, losses `(N,)`, the layer of each and where it begins.

    A pick holds the place of the option of every layer, `(layers,)`.
    """

    options: Mapping[str, Sequence[Option]]
    costs: Values
    losses: Values
    owner: Pick
    starts: Pick

    @classmethod
    def of(cls, options: Mapping[str, Sequence[Option]]) -> _Problem:
        counts = [len(own) for own in options.values()]
        every = [option for own in options.values() for option in own]
        return cls(
            options,
            np.array([option.costs for option in every], np.float64),
            np.array([option.loss for option in every], np.float64),
            np.repeat(np.arange(len(counts)), counts),
            np.cumsum([0, *counts[:-1]]),
        )

    @property
    def least(self) -> Values:
        """The least that each summed cost can be."""
        found: Values = np.minimum.reduceat(self.costs, self.starts, axis=0).sum(axis=0)
        return found

    def plan(self, pick: Pick) -> dict[str, Option]:
        """The options of a pick."""
        places = pick - self.starts
        return {name: own[place] for (name, own), place in zip(self.options.items(), places, strict=True)}

    def spent(self, pick: Pick) -> Values:
        """Summed costs."""
        found: Values = self.costs[pick].sum(axis=0)
        return found

    def allocated(self, combined: Values, budget: float) -> Pick:
        """The pick that `allocate` makes of one cost."""
        ends = [*self.starts[1:], len(combined)]
        problem, places = {}, {}
        for name, start, end in zip(self.options, self.starts, ends, strict=True):
            own = [
                Option(option.choice, float(cost), option.loss)
                for option, cost in zip(self.options[name], combined[start:end], strict=True)
            ]
            problem[name] = own
            places.update({id(option): start + index for index, option in enumerate(own)})
        found = allocate(problem, budget)
        return np.array([places[id(found[name])] for name in self.options])

    def _changed(self, pick: Pick) -> tuple[Values, Values]:
        """Summed costs, and the change of the summed loss, were any one option taken instead of its layer's."""
        before = pick[self.owner]
        return self.spent(pick) - self.costs[before] + self.costs, self.losses - self.losses[before]

    def lowered(self, pick: Pick, budgets: Values, scales: Values) -> Pick:
        """Single changes, each taking off most excess for the loss it adds, until no budget is exceeded."""
        picked: Pick = pick.copy()
        while True:
            excess = float(np.sum(np.maximum(self.spent(picked) - budgets, 0) / scales))
            if excess <= ROUNDING:
                return picked
            costs, added = self._changed(picked)
            taken = excess - np.sum(np.maximum(costs - budgets, 0) / scales, axis=1)
            worth = np.where(taken > ROUNDING, taken / np.maximum(added, ROUNDING), -1.0)
            best = int(np.argmax(worth))
            if worth[best] < 0:
                return picked
            picked[self.owner[best]] = best

    def filled(self, pick: Pick, budgets: Values) -> Pick:
        """Single upgrades, each saving most loss of those that fit, until none does."""
        picked: Pick = pick.copy()
        while True:
            costs, added = self._changed(picked)
            fits = np.all(costs <= np.maximum(budgets, self.spent(picked)) * (1 + ROUNDING), axis=1)
            change = np.where(fits, added, 0.0)
            best = int(np.argmin(change))
            if change[best] >= 0:
                return picked
            picked[self.owner[best]] = best
