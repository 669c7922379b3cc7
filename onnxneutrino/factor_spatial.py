"""One axis after the other: `kh×1 (I → r)`, then `1×kw (r → O)`, or the other way round; and no axis at all.

The first stage mixes the channels and one axis, alike at every position of the other axis: with
`f = (i, a)`, `t = b` (`spatial_hv`) or `f = (i, b)`, `t = a` (`spatial_vh`) this is factor_shared.
Jaderberg, Vedaldi and Zisserman, Speeding up convolutional neural networks with low rank expansions, 2014,
scheme 2, here fitted to the outputs. `input` mixes the channels alone, `f = i`, `t = (a, b)`:
`1×1 (I → r)`, then `kh×kw (r → O)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxneutrino.factor_fit import Problem, check_ranks, stage
from onnxneutrino.factor_shared import SharedFeatures
from onnxneutrino.factors import Factors
from onnxneutrino.plan import Form


def channel_features(problem: Problem) -> SharedFeatures:
    """Features `1×1 (I → r)`, for `input`, `tucker2` and `cp`."""
    return SharedFeatures(problem, math.prod(problem.weight.shape[2:]))


class SharedFirst:
    """The forms `input`, `spatial_hv` and `spatial_vh` of one layer."""

    def __init__(self, form: Form, problem: Problem, features: SharedFeatures | None = None) -> None:
        self.form = form
        self.problem = problem
        if form == "spatial_hv":
            features = SharedFeatures(problem, problem.weight.shape[3])
        elif form == "spatial_vh":
            _, inputs, kh, kw = problem.weight.shape
            order = np.arange(inputs * kh * kw).reshape(inputs, kh, kw).transpose(0, 2, 1).ravel()
            features = SharedFeatures(problem, kh, order)
        self.features = features if features is not None else channel_features(problem)

    @property
    def limit(self) -> tuple[int, ...]:
        """`min(F, O·T)`."""
        return (self.features.limit,)

    def errors(self, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """Relative squared output error at each rank of `grid`."""
        return [self.problem.relative(error) for error in self.features.errors([rank for (rank,) in grid])]

    def release(self) -> None:
        """Forget the features' fit; see `SharedFeatures`."""
        self.features.release()

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The chain at `ranks`: `V` and `G^-½P`."""
        check_ranks(self.form, ranks, self.limit)
        (rank,) = ranks
        outputs, inputs, *kernel = self.problem.weight.shape
        nested = self.features.nested(rank)
        # The first stage covers the axes that it mixes, the last stage the others.
        mixed = {"input": (), "spatial_hv": (0,), "spatial_vh": (1,)}[self.form]
        kernels = [[k if (axis in mixed) == covers else 1 for axis, k in enumerate(kernel)] for covers in (True, False)]
        first = nested.first[:rank].reshape(rank, inputs, *kernels[0])
        last = self.problem.unweighted(nested.last(rank * self.features.taps))
        stages = (stage(first), stage(last.reshape(outputs, rank, *kernels[1])))
        return self.problem.chain(self.form, ranks, stages, self.features.errors([rank])[0])
