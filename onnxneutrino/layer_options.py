"""What can become of one layer, in the unit of the objective: from its fits to the allocation's options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from numpy.typing import NDArray

from onnxneutrino import weights
from onnxneutrino.allocate import Option
from onnxneutrino.candidates import (
    PAIR_STEPS,
    STEPS,
    Cost,
    Point,
    candidates,
    cp_challenger,
    crossed,
    fast_ranks,
    options,
    point,
    spread,
    whole_point,
)
from onnxneutrino.chain_latency import LatencyTable
from onnxneutrino.factor_channel import OutputProjection
from onnxneutrino.factor_fit import Decomposition
from onnxneutrino.factors import Factors, Moments
from onnxneutrino.forms import decompose, decompose_all
from onnxneutrino.passes.factorize import read_factors, stage_arrays
from onnxneutrino.plan import Array, Choice, Form, Layer

Keep = Callable[[NDArray[Any]], NDArray[Any]]
CP_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
GOAL = 1.0  # cost of a network that just meets its hard targets: the largest share of a limit


@dataclass(frozen=True, eq=False)
class Target:
    """An upper bound on one cost of the whole network.

    Attributes:
        name: of the cost, one of the objectives.
        limit: in elements, multiply-accumulates, bytes or ms.
        unit: what layers are counted in: the name, or for `latency` the times themselves.
        rest: estimated cost of everything that is not a marked layer, in the unit of the limit.
    """

    name: str
    limit: float
    unit: str | LatencyTable
    rest: float


# For `latency` the times themselves; for hard targets these, each cost counted in shares of its limit.
Objective: TypeAlias = str | LatencyTable | tuple[Target, ...]


def cost_parts(layer: Layer, targets: tuple[Target, ...]) -> tuple[Cost, ...]:
    """How every target counts a layer, in shares of its limit."""

    def part(target: Target) -> Cost:
        unit = cost_unit(layer, target.unit)
        return lambda own: unit(own) / target.limit

    return tuple(map(part, targets))


def cost_unit(layer: Layer, objective: Objective) -> Cost:
    """How the objective counts a layer: elements, bytes, multiply-accumulates, or the ms that were measured.

    `size` and `memory` count bytes of weights, hard targets the sum of their shares.
    """
    if isinstance(objective, tuple):
        parts = cost_parts(layer, objective)
        return lambda own: math.fsum(part(own) for part in parts)
    if isinstance(objective, LatencyTable):
        times = objective.layers[layer.name]
        return lambda own: times.ms(own.choice)
    if objective in ("size", "memory"):
        width = 2 if layer.half else 4
        return lambda own: float(width * own.params)
    if objective == "macs":
        return lambda own: float(own.macs)
    return lambda own: float(own.params)


class LayerOptions:
    """The fits of one layer: on the original in every form, or on a trained chain in its own form."""

    def __init__(
        self,
        layer: Layer,
        moments: Moments,
        objective: Objective,
        current: Factors | None = None,
        weighting: Array | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Prepare the fits; the expensive part runs when options or factors are asked for.

        Args:
            layer: with the weight to fit.
            moments: of its input patches.
            objective: what costs are counted in.
            current: the trained chain whose product the weight is; the form is then frozen.
            weighting: of the outputs, `(O, O)`, see `curvature`; None where all matter alike.
            keep: puts an array where it may stay, for a model whose fits cannot be in memory all at once: they are
                then forgotten after every use. None keeps them.
        """
        self.layer = layer
        self.current = current
        self._unit = cost_unit(layer, objective)
        self._parts = cost_parts(layer, objective) if isinstance(objective, tuple) else ()
        units = [target.unit for target in objective] if isinstance(objective, tuple) else [objective]
        table = next((unit for unit in units if isinstance(unit, LatencyTable)), None)
        self._measured = None if table is None else cost_unit(layer, table)
        self._counted = len(units) > 1
        self._moments = moments
        self._weighting = weighting
        self._keep = keep
        self._fits: dict[Form, Decomposition] | None = None
        self._highest = 0
        self._spilled: dict[Form, Decomposition] = {}

    @property
    def fits(self) -> Mapping[Form, Decomposition]:
        """The fit of every form."""
        if self._fits is None:
            given = (self.layer.weight, self.layer.bias, self._moments, self._weighting)
            made = (
                decompose_all(*given)
                if self.current is None
                else {self.current.form: decompose(self.current.form, *given)}
            )
            self._fits = {**made, **self._spilled}
        return self._fits

    @cached_property
    def whole(self) -> Option:
        """The layer as it is in the original."""
        return Option(None, self._unit(whole_point(self.layer)), 0.0)

    @cached_property
    def options(self) -> list[Option]:
        """Options, cheapest and worst first; the loss is the relative output error."""
        points = (
            candidates(self.layer, self.fits, self._measured, self._counted)
            if self.current is None
            else self._smaller(self.current)
        )
        self._highest = max((own.choice.ranks[0] for own in points if own.choice is not None), default=0)
        self._release()
        return options(tuple(points), self._unit, parts=self._parts)

    def _release(self) -> None:
        """Keep of the fits what every plan needs: a network's layers are all in memory at once."""
        for fit in self.fits.values():
            fit.release()
        if self._keep is None:
            return
        for form, fit in self.fits.items():
            if isinstance(fit, OutputProjection) and self._highest:
                fit.spectrum.spill(self._highest, self._keep)
                self._spilled[form] = fit
        self._fits = None
        weights.let_go()

    def _smaller(self, current: Factors) -> list[Point]:
        """The trained chain as it is, and truncations of its product."""
        form = current.form
        grid: list[tuple[int, ...]]
        steps = spread if self._measured is None else fast_ranks
        if form == "cp":
            grid = [(max(1, int(share * current.ranks[0])),) for share in CP_SHARES]
        else:
            count = STEPS if len(current.ranks) == 1 else PAIR_STEPS
            grid = crossed(self.layer, [steps(rank, count) for rank in current.ranks])
        limit = self.fits[form].limit
        grid = [
            ranks
            for ranks in dict.fromkeys(grid)
            if ranks != current.ranks and all(r <= top for r, top in zip(ranks, limit, strict=True))
        ]
        errors = self.fits[form].errors(grid) if grid else []
        points = [point(self.layer, Choice(form, r), e) for r, e in zip(grid, errors, strict=True)]
        return [*points, point(self.layer, Choice(form, current.ranks), 0.0)]

    def factors(self, choice: Choice) -> Factors:
        """The fitted chain of an option."""
        if self.current is not None and choice.ranks == self.current.ranks:
            return self.current
        found = self.fits[choice.form].factors(choice.ranks)
        self._release()
        return found if self._keep is None else kept_factors(self.layer, found, self._keep)

    def challenger(self, option: Option) -> Option:
        """CP at equal cost where its error is lower, else the option itself."""
        if "cp" not in self.fits:
            return option
        found = cp_challenger(self.layer, option, self.fits["cp"], self._unit)
        self._release()
        return found


def kept_factors(layer: Layer, own: Factors, keep: Keep) -> Factors:
    """The same factors with their arrays where `keep` puts them, stored as the graph holds them.

    The pages of all that lies in files are given back. Float16 layers are left as they are: their graph holds other
    numbers than their factors.
    """
    if layer.half:
        return own
    arrays = {name: keep(array) for name, array in stage_arrays(layer, own).items()}
    weights.let_go()
    kept: Factors = read_factors(layer, own, arrays)
    return replace(kept, error=own.error)


def chains(fitted: Mapping[str, LayerOptions], choices: Mapping[str, Option], threads: int) -> dict[str, Factors]:
    """The chains of a plan, layers side by side; layers that stay whole are left out."""
    plan = {name: option.choice for name, option in choices.items() if option.choice is not None}
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: fitted[name].factors(plan[name]), plan)
        return dict(zip(plan, found, strict=True))
