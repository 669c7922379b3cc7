"""How much a network loses untrained, by its cost: what a few plans of falling cost have shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOISE = 0.05  # of delta; less cannot be told from nothing


@dataclass(frozen=True)
class Ladder:
    """The untrained drop at every cost: linear in the logarithms of both, and extended beyond the last points.

    Drops below a twentieth of delta are noise and count as that; a drop that falls with the cost counts as
    level, rising by a hair.
    """

    log_costs: tuple[float, ...]
    log_drops: tuple[float, ...]

    @classmethod
    def of(cls, full_cost: float, points: Iterable[tuple[float, float]], delta: float) -> Ladder:
        """From the original's cost and the `(cost, drop)` of untrained networks."""
        floor = math.log(max(NOISE * delta, 1e-6))
        costs, drops = [math.log(full_cost)], [floor]
        for cost, drop in sorted(points, reverse=True):
            if math.log(cost) < costs[-1]:
                costs.append(math.log(cost))
                drops.append(max(math.log(max(drop, 1e-9)), drops[-1] + 1e-3))
        return cls(tuple(costs), tuple(drops))

    def drop(self, cost: float) -> float:
        """The untrained drop at a cost."""
        return math.exp(_line(self.log_costs, self.log_drops, math.log(cost)))

    def cost(self, drop: float) -> float:
        """The cost at which the untrained drop is `drop`: at most the original's, at least half the smallest known."""
        found = _line(self.log_drops, self.log_costs, math.log(max(drop, 1e-9)))
        return math.exp(min(max(found, self.log_costs[-1] - math.log(2)), self.log_costs[0]))


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through strictly monotone points, the outer pieces extended."""
    if len(xs) == 1:
        return ys[0]
    rising = xs[1] > xs[0]
    place = next((i for i in range(1, len(xs) - 1) if (x <= xs[i]) == rising), len(xs) - 1)
    x0, x1, y0, y1 = xs[place - 1], xs[place], ys[place - 1], ys[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
