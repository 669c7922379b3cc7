"""Tucker-2: `1×1 (I → r1)`, `kh×kw (r1 → r2)`, `1×1 (r2 → O)`.

The first stage `A` and the best `P` on its features are those of `input` at r1 (factor_shared). Of `P`'s
output, whose second moment is `Q = PRPᵀ = YYᵀ`, the top r2 eigenvectors `F` of `G^½QG^½` are kept:
last stage `U = G^-½F`, core `FᵀG^½P`, error `tr G WΣWᵀ` less the kept eigenvalues. One eigendecomposition
per r1 gives every r2. Kim et al., Compression of deep convolutional neural networks for fast and low power
mobile applications, 2016, here fitted to the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxneutrino.factor_fit import Double, check_ranks, pointwise, stage, top_eigenvectors
from onnxneutrino.factor_shared import SharedFeatures
from onnxneutrino.factors import Factors


class Tucker2:
    """The form `tucker2` of one layer, on the features `1×1 (I → r1)`."""

    def __init__(self, features: SharedFeatures) -> None:
        self.features = features
        self.problem = features.problem

    @property
    def limit(self) -> tuple[int, ...]:
        """`min(I, O·kh·kw)` and `min(O, I·kh·kw)`; r2 is also at most `r1·kh·kw`."""
        r1 = self.features.limit
        return r1, min(len(self.problem.target), r1 * self.features.taps)

    def errors(self, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """Relative squared output error at each `(r1, r2)` of `grid`."""
        rising = sorted({r1 for r1, _ in grid})
        lasts = self.features.nested(rising[-1]).lasts([r1 * self.features.taps for r1 in rising])
        curves = {r1: self._truncated(r1, last)[0] for r1, last in zip(rising, lasts, strict=True)}
        return [self.problem.relative(float(curves[r1][r2])) for r1, r2 in grid]

    def release(self) -> None:
        """Forget the features' fit; see `SharedFeatures`."""
        self.features.release()

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The chain at `ranks`: `A`, `FᵀG^½P` and `G^-½F`."""
        r1, r2 = ranks
        check_ranks("tucker2", ranks, (self.limit[0], min(self.limit[1], r1 * self.features.taps)))
        kernel = self.problem.weight.shape[2:]
        last = self.features.nested(r1).last(r1 * self.features.taps)
        errors, vectors = self._truncated(r1, last)
        kept = vectors[:, :r2]
        stages = (
            pointwise(self.features.nested(r1).first[:r1], len(kernel)),
            stage((kept.T @ last).reshape(r2, r1, *kernel)),
            pointwise(self.problem.unweighted(kept), len(kernel)),
        )
        return self.problem.chain("tucker2", ranks, stages, float(errors[r2]))

    def _truncated(self, r1: int, last: Double) -> tuple[Double, Double]:
        """Errors at r2 = 0 to O and eigenvectors `F` `(O, O)`, at `r1` with `last` = `G^½P`, `(O, r1·T)`.

        As in `SharedFeatures.errors`, the ridge's share is taken away: each eigenvector's own.
        """
        nested, block = self.features.nested(r1), r1 * self.features.taps
        whitened, direct = nested.whitened[:, :block], nested.direct[:, :block].astype(np.float64)
        gains, vectors = top_eigenvectors(whitened @ whitened.T, len(whitened))
        turned = vectors.T @ last
        shrunk = np.einsum("rb,rb->r", turned, 2 * (vectors.T @ direct) - turned)
        gains = gains - self.problem.ridge * shrunk
        return self.problem.energy - np.concatenate([[0.0], np.cumsum(gains)]), vectors
