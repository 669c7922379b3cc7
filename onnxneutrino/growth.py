"""A trained chain that grows back toward its layer: components of what it lacks are appended to it."""

from __future__ import annotations

from dataclasses import replace

from onnxneutrino.candidates import Point, crossed, point, rank_axes, whole_point
from onnxneutrino.factor_fit import Problem
from onnxneutrino.factors import Factors, Moments, joined
from onnxneutrino.layer_options import LayerOptions, Objective
from onnxneutrino.plan import Choice, Layer

GROWTH_STEPS = {1: 24, 2: 12}  # by the number of ranks


class GrownOptions(LayerOptions):
    """A trained chain as it is, the same with more components, and the layer as the original has it.

    What the chain lacks is the difference of the original's weight and its product; that is factorized in the chain's
    own form and added to it. The bias goes the same way, so that all components together give the original layer.
    """

    def __init__(self, layer: Layer, moments: Moments, objective: Objective, current: Factors) -> None:
        """Prepare the fit.

        Args:
            layer: of the original.
            moments: of its input patches in the trained network.
            objective: what costs are counted in.
            current: the trained chain.
        """
        lacking = replace(layer, weight=layer.weight - current.product(), bias=layer.bias - current.bias)
        super().__init__(lacking, moments, objective, current)
        self._original = layer

    def _derived(self, current: Factors) -> list[Point]:
        form, ranks = current.form, current.ranks
        energies = [Problem(own.weight, own.bias, self._moments).energy for own in (self.layer, self._original)]
        share = energies[0] / max(energies[1], 1e-30)
        found = [whole_point(self.layer), point(self.layer, Choice(form, ranks), share)]
        if form == "cp":  # alternating least squares at every rank: too dear for a few components
            return found
        tops = [(axis or [0])[0] for axis in rank_axes(self.layer, form, lambda top, steps: [top])]
        rooms = [min(top, own + most) - own for top, own, most in zip(tops, ranks, self.fits[form].limit, strict=True)]
        steps = [max(1, room // GROWTH_STEPS[len(ranks)]) for room in rooms]
        axes = [range(own + step, own + room + 1, step) for own, room, step in zip(ranks, rooms, steps, strict=True)]
        grid = crossed(self.layer, axes)
        added = [tuple(a - b for a, b in zip(whole, ranks, strict=True)) for whole in grid]
        errors = self.fits[form].errors(added) if added else []
        found += [point(self.layer, Choice(form, r), share * error) for r, error in zip(grid, errors, strict=True)]
        return found

    def factors(self, choice: Choice) -> Factors:
        """The chain of an option: the trained one with what was added."""
        assert self.current is not None
        own = self.current
        if choice.ranks == own.ranks:
            return own
        added = tuple(a - b for a, b in zip(choice.ranks, own.ranks, strict=True))
        return joined(own, self._fitted(Choice(choice.form, added)))
