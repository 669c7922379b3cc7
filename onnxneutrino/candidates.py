"""From a layer's decompositions to what can become of it: forms, ranks, costs and errors.

Costs come from the shapes of the chain alone (`forms.skeleton`); a chain's weights are made only for the
plan that is chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxneutrino.allocate import Option, ladder
from onnxneutrino.factor_fit import Decomposition
from onnxneutrino.factors import Stage, chain_macs
from onnxneutrino.forms import full_ranks, skeleton
from onnxneutrino.plan import Choice, Form, Layer

STEPS = 24
PAIR_STEPS = 12
CP_GAIN = 0.5
LEAST_GAIN = 0.75
MEASURED_GAIN = 0.9
INTERPOLATIVE_GAIN = 0.1
MOST_INTERPOLATED = 0.92  # of the layer: near full rank such a chain loses next to nothing
BLOCK = 16


@dataclass(frozen=True)
class Point:
    """One way to write a layer: `choice` None as it is; `error` relative, as in `Factors.error`."""

    choice: Choice | None
    params: int
    macs: int
    error: float


Cost = Callable[[Point], float]


def candidates(
    layer: Layer,
    decompositions: Mapping[Form, Decomposition],
    measured: Cost | None = None,
    counted: bool = False,
) -> tuple[Point, ...]:
    """The layer as it is, then every form but `cp` on a grid of ranks.

    Chains that save less than a quarter of the layer, in params and in MACs, are left out; `interpolative` ones that
    save less than a twelfth.

    Args:
        layer: the layer.
        decompositions: its fits.
        measured: the time of every point where time is what counts: ranks are then those at which the runtime is
            fast, and chains that save less than a tenth of the layer's time are left out.
        counted: time is not all that counts: chains that save a quarter in params or MACs stay, whatever time they
            take, where it is known.
    """
    whole = whole_point(layer)
    points = [whole]

    def gains(tried: Point) -> bool:
        if measured is None:
            return _gains(tried, whole)
        time = measured(tried)
        return time <= MEASURED_GAIN * measured(whole) or (counted and math.isfinite(time) and _gains(tried, whole))

    for form, decomposition in decompositions.items():
        if form == "cp":
            continue
        steps = spread if measured is None else fast_ranks
        grid = [ranks for ranks in rank_grid(layer, form, steps) if gains(point(layer, Choice(form, ranks)))]
        errors = decomposition.errors(grid) if grid else []
        for ranks, error in zip(grid, errors, strict=True):
            points.append(point(layer, Choice(form, ranks), error))
    return tuple(points)


def options(
    points: tuple[Point, ...], cost: Cost, sensitivity: float = 1.0, parts: Sequence[Cost] = ()
) -> list[Option]:
    """Options for `allocate`: cost by the caller's measure, loss `sensitivity · error`; no dominated ones.

    With `parts`, the costs that have budgets of their own, an option is dominated only where all of them are.
    """
    found = [Option(p.choice, cost(p), sensitivity * p.error, tuple(part(p) for part in parts)) for p in points]
    if len(parts) < 2:
        return ladder(found)
    kept: list[Option] = []
    for own in sorted(found, key=lambda option: (option.loss, option.cost)):
        if not any(all(a <= b for a, b in zip(other.costs, own.costs, strict=True)) for other in kept):
            kept.append(own)
    return sorted(kept, key=lambda option: (option.cost, option.loss))


def cp_challenger(layer: Layer, chosen: Option, cp: Decomposition, cost: Cost, sensitivity: float = 1.0) -> Option:
    """CP at the largest rank that costs no more than `chosen`, where its loss is at most half; else `chosen`.

    Dear (alternating least squares at one rank), so meant for the few options an allocation chose, and for
    ranks up to I + O. Depthwise stages train and run at a fraction of a dense one's speed, which a little
    less loss does not pay for.
    """
    if chosen.choice is None:
        return chosen

    def fits(rank: int) -> bool:
        return cost(point(layer, Choice("cp", (rank,)))) <= chosen.cost

    outputs, inputs = layer.weight.shape[:2]
    limit = min(cp.limit[0], outputs + inputs)
    rank = _largest(fits, limit)
    if rank == 0 or (rank == limit and rank < cp.limit[0]):
        return chosen
    choice = Choice("cp", (rank,))
    (error,) = cp.errors([choice.ranks])
    challenger = Option(choice, cost(point(layer, choice, error)), sensitivity * error)
    return challenger if challenger.loss <= CP_GAIN * chosen.loss else chosen


def whole_point(layer: Layer) -> Point:
    """Params and MACs of `layer` as it is."""
    return Point(None, layer.params, layer.macs, 0.0)


def point(layer: Layer, choice: Choice, error: float = float("nan")) -> Point:
    """Params and MACs of `layer` written as `choice`, from shapes alone."""
    stages = skeleton(choice.form, layer.weight.shape, choice.ranks)
    return Point(choice, params_of(layer, stages), macs_of(layer, stages), error)


def params_of(layer: Layer, stages: tuple[Stage, ...]) -> int:
    """Elements of a chain and its bias: `Factors.params`."""
    return sum(stage.weight.size for stage in stages) + layer.bias.size


def macs_of(layer: Layer, stages: tuple[Stage, ...]) -> int:
    """Multiply-accumulates of a chain for one example, in all places of the layer.

    A MatMul's map is `1 × 1`; its `positions` multiply what one position costs.
    """
    total = 0
    for use in layer.uses:
        size = use.geometry.output_size(*use.input_size)
        total += chain_macs(stages, use.geometry, use.input_size) * (use.positions // math.prod(size))
    return total


def rank_grid(layer: Layer, form: Form, steps: Callable[[int, int], list[int]] | None = None) -> list[tuple[int, ...]]:
    """Ranks to try: about 24, or 12 × 12 for `tucker2`, denser where they are small.

    Up to the rank at which the chain costs as much as the layer; for `tucker2` r1 up to that of `input`, r2
    up to that of `channel`. `steps` makes ranks of the largest one and a number: `spread` or `fast_ranks`.
    """
    return crossed(layer, rank_axes(layer, form, steps or spread))


def crossed(layer: Layer, axes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """All ranks of these axes; of two those that a core can have."""
    taps = math.prod(layer.weight.shape[2:])
    return [ranks for ranks in itertools.product(*axes) if len(ranks) < 2 or ranks[1] <= ranks[0] * taps]


def rank_axes(layer: Layer, form: Form, steps: Callable[[int, int], list[int]]) -> tuple[list[int], ...]:
    """The ranks of `rank_grid` on each axis: one, or two for `tucker2`; empty where no rank gains anything."""
    if form == "tucker2":
        return steps(_useful(layer, "input"), PAIR_STEPS), steps(_useful(layer, "channel"), PAIR_STEPS)
    ranks = steps(_useful(layer, form), STEPS)
    if form == "interpolative":
        # It saves r² of the chain's r·(O + D); for less its additional nodes are not worth it.
        outputs, size = len(layer.weight), layer.patch
        ranks = [rank for rank in ranks if rank >= INTERPOLATIVE_GAIN * (outputs + size)]
    return (ranks,)


def _useful(layer: Layer, form: Form) -> int:
    """The largest rank at which a form of one rank gains anything; 0 for none."""
    whole = whole_point(layer)
    limit = full_ranks(form, layer.weight.shape)[0]
    return _largest(lambda rank: _gains(point(layer, Choice(form, (rank,))), whole), limit)


def _gains(tried: Point, whole: Point) -> bool:
    """Whether a chain saves enough to be worth its additional nodes, in params or in MACs."""
    interpolative = tried.choice is not None and tried.choice.form == "interpolative"
    most = MOST_INTERPOLATED if interpolative else LEAST_GAIN
    return tried.params <= most * whole.params or tried.macs <= most * whole.macs


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest rank up to `limit` for which `holds`, which fails from some rank on; 0 for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def spread(top: int, steps: int) -> list[int]:
    """About `steps` ranks from 1 to `top`, in even steps of their square root.

    Multiples of 4, of 8 from 64 on, below 8 of 2; every rank where there are no more than `steps`.
    """
    if top <= steps:
        return list(range(1, top + 1))
    ranks = {1}
    for index in range(1, steps + 1):
        rank = top * index * index / (steps * steps)
        multiple = 2 if rank < 8 else 4 if rank < 64 else 8
        ranks.add(max(1, int(rank) // multiple * multiple))
    return sorted(ranks)


def fast_ranks(top: int, steps: int) -> list[int]:
    """About `steps` ranks up to `top` at which the runtime is fast: multiples of 16, and 4, 8, 12 below.

    The runtime computes convolutions in blocks of 16 output channels (8 without AVX-512) and pads the last one:
    64 → 64 channels on 32×32, 3×1 and 1×3: 115 µs at rank 16, 218 at 17, 225 at 32. Below one block it works
    without blocks, at a cost that grows with the rank. Where `top` is below two blocks, multiples of 4 up to it.
    """
    if top < 2 * BLOCK:
        return list(range(4, top + 1, 4)) or list(range(1, top + 1))
    blocks = top // BLOCK
    kept = {max(1, round(blocks * index * index / (steps * steps))) for index in range(1, steps + 1)}
    return [4, 8, *(BLOCK * block for block in (sorted(kept) if blocks > steps else range(1, blocks + 1)))]


def next_fast(rank: int) -> int:
    """The smallest multiple of 4 up to 16, of 16 above, that is at least `rank`: what a rank takes time like."""
    multiple = 4 if rank <= BLOCK else BLOCK
    return -(-rank // multiple) * multiple
