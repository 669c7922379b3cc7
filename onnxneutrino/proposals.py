"""Which network to try at a given cost: form and rank of all layers at once, re-scored by what the whole puts out.

The loss of a layer's option is predicted from its relative error and from the divergence at the output that this error
alone was measured to cause. Errors interact, so that no prediction is calibrated: plans from a few means of the two
are finished (factors and refit), and the one whose outputs diverge least from those of what it is made of is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from onnxneutrino.allocate import Option, allocate
from onnxneutrino.anneal import anneal
from onnxneutrino.bench import Candidate

POWERS = (0.5, 0.0, 1.0)
# Chooses one of the options of every layer so that the whole network costs at most so much.
Within = Callable[[Mapping[str, Sequence[Option]], float], Mapping[str, Option]]


class Planner(Protocol):
    """What a proposal needs to know about the network."""

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        """Options of every layer, loss = relative output error, and the cost of all the rest.

        From the original for None, else from the trained chains of `source`, forms frozen.
        """

    def sensitivities(self) -> Mapping[str, Callable[[float], float]]:
        """Divergence at the output over a layer's relative error."""

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        """The refitted, untrained network of a plan."""

    def challenged(self, choices: Mapping[str, Option]) -> Mapping[str, Option]:
        """The same plan with layers swapped to a form of equal cost that is dear to compute, where better."""


def least_cost(planner: Planner) -> float:
    """Cost of the smallest plan there is."""
    options, rest = planner.options(None)
    return rest + sum(min(option.cost for option in own) for own in options.values())


def predicted(error: float, curve: Callable[[float], float], power: float) -> float:
    """Loss of an option: geometric mean of its error and of the divergence this causes, the latter's weight `power`."""
    return error ** (1 - power) * curve(error) ** power if error > 0 else 0.0


def propose(
    planner: Planner,
    source: Candidate | None,
    cost: float,
    name: str,
    seconds: float,
    swap: bool,
    seed: int,
    within: Within | None = None,
) -> Candidate:
    """The plan of at most `cost` that diverges least from what it is made of, among a few surrogates.

    Args:
        planner: the network.
        source: trained candidate to start from; None for the original.
        cost: in the unit of the options, all the rest included.
        name: of the candidate.
        seconds: a further plan is finished while the one before took less than this; 0 for one plan alone.
        swap: consider forms that are dear to compute.
        seed: of the annealing.
        within: allocates under hard targets; None for one cost, which is the sum of the options' and the rest.
    """
    options, rest = planner.options(source)
    curves = planner.sensitivities()
    own_options = {layer: {option.choice: option for option in own} for layer, own in options.items()}
    plans: list[dict[str, Option]] = []
    for power in POWERS:
        weighted = {
            layer: [dataclasses.replace(o, loss=predicted(o.loss, curves[layer], power)) for o in own]
            for layer, own in options.items()
        }
        if within is not None:
            chosen = within(weighted, cost)
        else:
            chosen = allocate(weighted, cost - rest)
            if source is not None:
                chosen = anneal(weighted, chosen, cost - rest, seed)
        # The planner's own options again: a loss in a plan is an error, whatever weighed it here.
        plan = {layer: own_options[layer][option.choice] for layer, option in chosen.items()}
        if plan not in plans:
            plans.append(plan)
    made = [planner.realize(source, plans[0], name)]
    for plan in plans[1:]:
        if made[-1].seconds > seconds:
            break
        made.append(planner.realize(source, plan, name))
    best = min(made, key=lambda candidate: candidate.divergence)
    challenged = planner.challenged(best.choices) if swap else best.choices
    if challenged != best.choices:
        swapped = planner.realize(source, challenged, name)
        if within is None or swapped.cost <= max(cost, best.cost):
            best = min((best, swapped), key=lambda candidate: candidate.divergence)
    return best
