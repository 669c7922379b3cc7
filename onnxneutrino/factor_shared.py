"""A first stage that is the same at every tap, and the best last stage on its features.

Split the patch's axes into `f` (`F` values, which the first stage mixes) and `t` (`T` taps, at each of which
it is applied alike): `W[o, (f, t)]`, features `z = B x` with `B = V ⊗ I_T`, `V` of shape `(r, F)`. Then

    `S = mean over t of Σ[(f, t), (g, t)] = K Kᵀ`,   `N = Σ_t W_tᵀ G W_t`  (`F × F`),
    `E` = top r eigenvectors of `Kᵀ N K`,            `V = Eᵀ K⁻¹`,
    `R = B Σ Bᵀ = L Lᵀ`,  `Y = W Σ Bᵀ L⁻ᵀ`,          last stage `P = Y L⁻¹`,  error `tr G(WΣWᵀ - YYᵀ)`.

The Cholesky factor `K` stands for `S^½`: both give the same `V`. Its rows are then made orthonormal from the
first to the last, which changes no leading span, hence no fit, and makes `B Bᵀ = I`: float32 products are
accurate, and Σ's ridge is one on `R`. Leading rows are the lower ranks, so that leading blocks of one `L⁻¹` and
one `Y` serve every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxneutrino.factor_fit import Double, Problem, cholesky, top_eigenvectors
from onnxneutrino.plan import Array


@dataclass(frozen=True, eq=False)
class Nested:
    """The fit at all ranks up to `r`.

    Attributes:
        first: `V`, `(r, F)`, orthonormal rows, float32.
        inverse: `L⁻¹`, `(r·T, r·T)`, lower triangular.
        whitened: `Y`, `(O, r·T)`.
        direct: `G^½WBᵀ`, `(O, r·T)`.
    """

    first: Array
    inverse: Double
    whitened: Double
    direct: Array

    def last(self, block: int) -> Double:
        """`P` on the first `block` features, `(O, block)`."""
        return np.asarray(self.whitened[:, :block] @ self.inverse[:block, :block])

    def lasts(self, blocks: Sequence[int]) -> Iterator[Double]:
        """`P` at rising `blocks`, each the one before with more terms: a view that the next one overwrites."""
        total, done = np.zeros((len(self.whitened), blocks[-1])), 0
        for block in blocks:
            total[:, :block] += self.whitened[:, done:block] @ self.inverse[done:block, :block]
            done = block
            yield total[:, :block]


class SharedFeatures:
    """Fits of one layer with a first stage on the axes `f`; solved on first use, again for a higher rank.

    `L⁻¹` at the highest ranks takes far more memory than all else of a layer (137 MB for 512×512×3×3), and is
    needed only while its errors are asked for: `release` forgets it, and keeps `V`, from which a fit at the
    rank of a plan takes a moment.

    Args:
        problem: the layer.
        order: positions of the patch's elements in the order `(f, t)`; None where they are so already.
        taps: `T`.
    """

    def __init__(self, problem: Problem, taps: int, order: NDArray[np.int64] | None = None) -> None:
        self.problem = problem
        self.taps = taps
        self.order = order
        self._basis: Array | None = None
        self._nested: Nested | None = None

    @property
    def width(self) -> int:
        """`F`: how many values the first stage mixes."""
        return int(self.problem.target.shape[1]) // self.taps

    @property
    def limit(self) -> int:
        """`min(F, O·T)`: the rank that is exact."""
        return min(self.width, len(self.problem.target) * self.taps)

    def nested(self, rank: int) -> Nested:
        """The fit at ranks up to `rank` or above."""
        if self._nested is None or len(self._nested.first) < rank:
            self._nested = self._solve(rank)
        return self._nested

    def release(self) -> None:
        """Forget what is large and can be computed again from `V`."""
        self._nested = None

    def errors(self, ranks: Sequence[int]) -> list[float]:
        """`tr G (W - M)Σ(W - M)ᵀ` at each of `ranks`.

        The fit minimises it on `Σ' = Σ + ρI`: there it is `tr GWΣ'Wᵀ - |Y|²`, of which the ridge's share,
        `ρ|G^½W - PB|²`, is taken away.
        """
        nested, rising = self.nested(max(ranks)), sorted(set(ranks))
        gains = np.cumsum(np.einsum("ob,ob->b", nested.whitened, nested.whitened))
        found = {}
        for rank, last in zip(rising, nested.lasts([rank * self.taps for rank in rising]), strict=True):
            block = last.shape[1]
            shrunk = 2 * np.einsum("ob,ob->", last, nested.direct[:, :block]) - np.einsum("ob,ob->", last, last)
            found[rank] = float(self.problem.energy - gains[block - 1] + self.problem.ridge * shrunk)
        return [found[rank] for rank in ranks]

    def tap_moment(self) -> Double:
        """`S + ρI`, `(F, F)`."""
        moments, taps = self.problem.moments, self.taps
        if moments.sigma is not None:
            sigma = moments.sigma if self.order is None else moments.sigma[np.ix_(self.order, self.order)]
            blocks = sigma.reshape(self.width, taps, self.width, taps)
            total = np.einsum("ftgt->fg", blocks, dtype=np.float64) / taps
        else:
            columns = self._columns().reshape(self.width, -1)
            total = (columns @ columns.T).astype(np.float64) / (taps * moments.count)
        return np.asarray(total + self.problem.ridge * np.eye(self.width))

    def _columns(self) -> Array:
        """The rows of the moments as columns `(D, n)`, in the order `(f, t)`."""
        assert self.problem.moments.rows is not None
        return np.ascontiguousarray(self._ordered(self.problem.moments.rows).T)

    def _ordered(self, matrix: Array) -> Array:
        return matrix if self.order is None else matrix[:, self.order]

    def _first(self, rank: int) -> Array:
        """`V`, `(rank, F)`, orthonormal rows: computed once, and again only for a higher rank."""
        if self._basis is None or len(self._basis) < rank:
            self._basis = self._leading(rank)
        return self._basis[:rank]

    def _leading(self, rank: int) -> Array:
        target = self._ordered(self.problem.target).reshape(-1, self.width, self.taps)
        flat = np.ascontiguousarray(target.transpose(1, 0, 2)).reshape(self.width, -1)
        lower = cholesky(self.tap_moment())
        inner = lower.T @ (flat @ flat.T).astype(np.float64) @ lower
        _, vectors = top_eigenvectors(inner, rank)
        first = scipy.linalg.solve_triangular(lower, vectors, trans="T", lower=True)
        return np.ascontiguousarray(np.linalg.qr(first)[0].T, np.float32)

    def _solve(self, rank: int) -> Nested:
        moments, ridge = self.problem.moments, self.problem.ridge
        first = self._first(rank)

        def project(matrix: Array) -> Array:
            """`B · matrix` for a matrix `(D, n)` in the order `(f, t)`."""
            columns = np.ascontiguousarray(matrix).reshape(self.width, -1)
            return np.asarray((first @ columns).reshape(rank * self.taps, -1))

        if moments.sigma is not None:
            sigma = moments.sigma if self.order is None else moments.sigma[np.ix_(self.order, self.order)]
            inner = project(project(sigma).T).astype(np.float64)
        else:
            features = project(self._columns())
            product = features @ features.T
            del features
            inner = product.astype(np.float64)
            del product
            inner /= moments.count
        inner[np.diag_indices_from(inner)] += ridge
        direct = project(self._ordered(self.problem.target).T).T
        outer = project(self._ordered(self.problem.target_sigma).T).astype(np.float64) + ridge * direct.T
        inverse, _ = scipy.linalg.lapack.dtrtri(cholesky(inner), lower=1, overwrite_c=1)
        return Nested(first, inverse, outer.T @ inverse.T, np.ascontiguousarray(direct))
