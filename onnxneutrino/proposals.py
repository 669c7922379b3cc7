"""Which network to try at a given cost: form and rank of all layers at once, re-scored by what the whole puts out.

No surrogate is calibrated, so plans from several weightings of the layers' errors are finished (factors and refit)
and the one whose outputs diverge least from the original's is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from onnxneutrino.allocate import Option, allocate
from onnxneutrino.anneal import anneal
from onnxneutrino.search import Candidate

WEIGHTINGS = (0.5, 0.0, 1.0)


class Planner(Protocol):
    """What a proposal needs to know about the network."""

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        """Options of every layer, loss = relative output error, and the cost of all the rest.

        From the original for None, else from the trained chains of `source`, forms frozen.
        """

    def sensitivities(self) -> Mapping[str, float]:
        """Divergence at the output per unit of a layer's relative error."""

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        """The refitted, untrained network of a plan."""

    def challenged(self, choices: Mapping[str, Option]) -> Mapping[str, Option]:
        """The same plan with layers swapped to a form of equal cost that is dear to compute, where better."""


def least_cost(planner: Planner) -> float:
    """Cost of the smallest plan there is."""
    options, rest = planner.options(None)
    return rest + sum(min(option.cost for option in own) for own in options.values())


def propose(
    planner: Planner, source: Candidate | None, cost: float, name: str, seconds: float, swap: bool, seed: int
) -> Candidate:
    """The plan of at most `cost` that diverges least from the original, among a few surrogates.

    Args:
        planner: the network.
        source: trained candidate to start from; None for the original.
        cost: in the unit of the options, all the rest included.
        name: of the candidate.
        seconds: a further plan is finished while the one before took less than this; 0 for one plan alone.
        swap: consider forms that are dear to compute.
        seed: of the annealing.
    """
    options, rest = planner.options(source)
    weights = planner.sensitivities()
    own_options = {layer: {option.choice: option for option in own} for layer, own in options.items()}
    plans: list[dict[str, Option]] = []
    for power in WEIGHTINGS:
        weighted = {
            layer: [dataclasses.replace(o, loss=o.loss * weights[layer] ** power) for o in own]
            for layer, own in options.items()
        }
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
        best = min((best, planner.realize(source, challenged, name)), key=lambda candidate: candidate.divergence)
    return best
