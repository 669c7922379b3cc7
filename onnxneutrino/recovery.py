"""What training brings back: before anything was trained as other networks have recovered, then by the secant.

The share of an untrained drop that is left after a time of training:

    left(t) = 1 / (1 + (t / half)^1.3)

Power and half time were read off fine-tunes of 400 to 3000 steps on four CIFAR-10 networks. What training leaves
forever is a matter of the network's capacity, which no short fine-tune shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

POWER = 1.3
HALF_STEPS = 1500
LARGEST_LOG = 50.0


def left(seconds: float, half: float) -> float:
    """Share of the untrained drop that is left after `seconds` of training; `half` 0 for a time that is not known."""
    return 1 / (1 + math.pow(seconds / half, POWER)) if half else 0.0


def secant(trained: Sequence[tuple[float, float]], goal: float) -> float:
    """The cost at which the line through the last two drops over log cost has `goal`; 0 where it does not fall.

    Args:
        trained: cost and drop of trained networks, in the order trained.
        goal: a drop.
    """
    if len(trained) < 2:
        return 0.0
    (larger, before), (cost, drop) = trained[-2:]
    steps, rise = math.log(larger / cost), drop - before
    if steps * rise <= 0:
        return 0.0
    return cost * math.exp(max(min((drop - goal) * steps / rise, LARGEST_LOG), -LARGEST_LOG))
