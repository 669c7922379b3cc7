"""Simulated annealing of ranks on the surrogate (Metropolis et al. 1953, Kirkpatrick et al. 1983).

The state is one option a layer; a proposal moves one layer up or down its list of options by cost and, where
that breaks the budget, another layer down until the budget holds. The energy is the predicted loss, a sum over
layers, so a proposal costs microseconds and thousands are cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxneutrino.allocate import Option

PROPOSALS_PER_LAYER = 600
FIRST_ACCEPTANCE = 0.3
LAST_TEMPERATURE = 1e-3


def anneal(
    options: Mapping[str, Sequence[Option]], start: Mapping[str, Option], budget: float, seed: int
) -> dict[str, Option]:
    """The best plan met while annealing from `start` under `budget`.

    Args:
        options: the choices of every layer.
        start: one option a layer; if it costs more than `budget`, layers are lowered first.
        budget: upper bound of the summed cost.
        seed: of the proposals.

    Returns:
        One option a layer. It costs more than `budget` only where the cheapest options together do.
    """
    generator = np.random.default_rng(seed)
    names = list(options)
    ladders = {name: sorted(options[name], key=lambda option: option.cost) for name in names}
    place = {name: _nearest(ladder, start[name]) for name, ladder in ladders.items()}
    place = _within(ladders, place, budget, generator)
    energy = _energy(ladders, place)
    best, best_energy = dict(place), energy
    proposals = PROPOSALS_PER_LAYER * len(names)
    rises = [_energy(ladders, _proposal(ladders, place, budget, generator)) - energy for _ in range(20)]
    typical = float(np.mean([rise for rise in rises if rise > 0] or [abs(energy) * 0.01 + 1e-12]))
    hot = -typical / math.log(FIRST_ACCEPTANCE)
    for step in range(proposals):
        temperature = hot * LAST_TEMPERATURE ** (step / proposals)
        moved = _proposal(ladders, place, budget, generator)
        change = _energy(ladders, moved) - energy
        if change <= 0 or generator.random() < math.exp(-change / temperature):
            place, energy = moved, energy + change
            if energy < best_energy and _cost(ladders, place) <= budget:
                best, best_energy = dict(place), energy
    return {name: ladders[name][index] for name, index in best.items()}


def _nearest(ladder: Sequence[Option], option: Option) -> int:
    """The place of an option, or of that nearest by cost; of several of one cost the one nearest by loss."""
    return min(range(len(ladder)), key=lambda i: (abs(ladder[i].cost - option.cost), abs(ladder[i].loss - option.loss)))


def _energy(ladders: Mapping[str, Sequence[Option]], place: Mapping[str, int]) -> float:
    return sum(ladders[name][index].loss for name, index in place.items())


def _cost(ladders: Mapping[str, Sequence[Option]], place: Mapping[str, int]) -> float:
    return sum(ladders[name][index].cost for name, index in place.items())


def _proposal(
    ladders: Mapping[str, Sequence[Option]],
    place: Mapping[str, int],
    budget: float,
    generator: np.random.Generator,
) -> dict[str, int]:
    moved = dict(place)
    name = list(ladders)[generator.integers(len(ladders))]
    stride = int(generator.integers(1, 4)) * (1 if generator.random() < 0.5 else -1)
    moved[name] = min(max(moved[name] + stride, 0), len(ladders[name]) - 1)
    return _within(ladders, moved, budget, generator)


def _within(
    ladders: Mapping[str, Sequence[Option]],
    place: dict[str, int],
    budget: float,
    generator: np.random.Generator,
) -> dict[str, int]:
    """Lower layers drawn at random until the budget holds or nothing can be lowered."""
    cost = _cost(ladders, place)
    while cost > budget:
        lowerable = [name for name, index in place.items() if index > 0]
        if not lowerable:
            break
        name = lowerable[generator.integers(len(lowerable))]
        cost -= ladders[name][place[name]].cost - ladders[name][place[name] - 1].cost
        place[name] -= 1
    return place
