"""One option for every layer, all at once: the least loss within a budget.

A multiple-choice knapsack. Dominated options are dropped; the lower convex hulls of the rest with one
Lagrange multiplier give a start (Everett, 1963); dynamic programming over a grid of costs, rounded up so that
the budget holds, gives another; what either leaves of the budget goes to single upgrades, and the better of
the two is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.plan import Choice

CELLS = 2048


@dataclass(frozen=True)
class Option:
    """What can become of one layer: `choice` None keeps it; `cost` in any unit, losses add up.

    `costs` holds a number for every budget where there are several, see `budgets`.
    """

    choice: Choice | None
    cost: float
    loss: float
    costs: tuple[float, ...] = ()


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Choose one option a layer so that the summed cost is at most `budget` and the summed loss least.

    Args:
        options: at least one for every layer.
        budget: in the unit of the costs.

    Returns:
        One option a layer. Where not even the cheapest ones fit in the budget, the cheapest everywhere: the
        one case in which the summed cost is above `budget`.

    Raises:
        ValueError: a layer without options, or a cost or loss that is not finite.
    """
    ladders = {name: ladder(own) for name, own in options.items()}
    cheapest = {name: own[0] for name, own in ladders.items()}
    if total_cost(cheapest) > budget:
        return cheapest
    starts = (_multiplier(ladders, budget), _dynamic(ladders, budget))
    filled = [_fill(ladders, start, budget) for start in starts]
    return min(filled, key=lambda plan: (total_loss(plan), total_cost(plan)))


def ladder(options: Sequence[Option]) -> list[Option]:
    """The options no other one beats, cheapest and worst first: costs rise, losses fall.

    Raises:
        ValueError: no option at all, or a cost or loss that is not finite.
    """
    if not options:
        raise ValueError("a layer needs at least one option")
    for option in options:
        if not (math.isfinite(option.cost) and math.isfinite(option.loss)):
            raise ValueError(f"option {option.choice}: cost {option.cost}, loss {option.loss}")
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def total_cost(plan: Mapping[str, Option]) -> float:
    """Summed cost of a plan, free of rounding order."""
    return math.fsum(option.cost for option in plan.values())


def total_loss(plan: Mapping[str, Option]) -> float:
    """Summed loss of a plan."""
    return math.fsum(option.loss for option in plan.values())


def hull(steps: Sequence[Option]) -> list[Option]:
    """Lower convex hull of a ladder: each step saves less loss per cost than the one before."""
    kept: list[Option] = []
    for option in steps:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(cheap: Option, dear: Option) -> float:
    """Loss saved per cost, from one option to a dearer one."""
    return (cheap.loss - dear.loss) / (dear.cost - cheap.cost)


def _multiplier(ladders: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """The hulls' steps in the order of loss saved per cost, up to the first that does not fit."""
    plan = {name: own[0] for name, own in ladders.items()}
    steps = [
        (_slope(cheap, dear), name, dear)
        for name, own in ladders.items()
        for corners in (hull(own),)
        for cheap, dear in itertools.pairwise(corners)
    ]
    for _, name, dear in sorted(steps, key=lambda step: -step[0]):
        upgraded = {**plan, name: dear}
        if total_cost(upgraded) > budget:
            break
        plan = upgraded
    return plan


def _dynamic(ladders: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Dynamic programming on costs above each layer's cheapest option, in cells, rounded up."""
    spare = budget - math.fsum(own[0].cost for own in ladders.values())
    best = np.zeros(CELLS + 1)
    taken: list[NDArray[np.int32]] = []
    shifts: list[list[int]] = []
    for own in ladders.values():
        cells = [_cells(option.cost - own[0].cost, spare) for option in own]
        following = best + own[0].loss
        which: NDArray[np.int32] = np.zeros(CELLS + 1, np.int32)
        for index, (option, shift) in enumerate(zip(own, cells, strict=True)):
            if index == 0 or shift > CELLS:
                continue
            tried = best[: CELLS + 1 - shift] + option.loss
            better = tried < following[shift:]
            following[shift:][better] = tried[better]
            which[shift:][better] = index
        best = following
        taken.append(which)
        shifts.append(cells)
    plan: dict[str, Option] = {}
    place = int(np.argmin(best))
    for name, which, cells in list(zip(ladders, taken, shifts, strict=True))[::-1]:
        index = int(which[place])
        plan[name] = ladders[name][index]
        place -= cells[index]
    # The sum of the costs as they are can exceed the budget by rounding alone, where cells fit exactly.
    return plan if total_cost(plan) <= budget else {name: own[0] for name, own in ladders.items()}


def _cells(extra: float, spare: float) -> int:
    """Cells that an option takes up; more than there are where it cannot fit."""
    if extra <= 0:
        return 0
    return math.ceil(extra / spare * CELLS) if extra <= spare else CELLS + 1


def _fill(ladders: Mapping[str, Sequence[Option]], start: Mapping[str, Option], budget: float) -> dict[str, Option]:
    """Spend what is left: of the single upgrades that fit, always the one that saves most loss."""
    plan = dict(start)
    while True:
        spent = total_cost(plan)
        upgrades = [
            (plan[name].loss - option.loss, name, option)
            for name, own in ladders.items()
            for option in own
            if option.loss < plan[name].loss and spent - plan[name].cost + option.cost <= budget
        ]
        upgrades.sort(key=lambda upgrade: -upgrade[0])
        for _, name, option in upgrades:
            if total_cost({**plan, name: option}) <= budget:
                plan[name] = option
                break
        else:
            return plan
