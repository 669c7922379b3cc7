"""CP: `1×1 (I → r)`, depthwise `kh×1`, depthwise `1×kw`, `1×1 (r → O)`.

Deeplite Neutrino (Sankaran et al., AAAI 2021), equations 2 and 3; Lebedev et al., Speeding-up convolutional
neural networks using fine-tuned CP-decomposition, 2015. Plain CP degenerates: components of growing norm
cancel each other, and fine-tuning fails. Phan et al. (Stable low-rank tensor decomposition for compression of
convolutional neural network, ECCV 2020) start from Tucker-2 and bound the norm of the components. Here:

1. The core of Tucker-2 at `min(I, r), min(O, r)`, in coordinates where the features are white and the outputs
   orthonormal, so that the plain distance of tensors is close to the error of the outputs.
2. Alternating least squares on this core with a penalty on the squared norm of its factors. The factors'
   start are the largest terms of the core's own expansion in terms of rank one.
3. The last stage fitted to the data: features `z = Bx`, row j of `B` = `a_j ⊗ h_j ⊗ w_j`, scaled to variance
   one, `P = WΣBᵀ(BΣBᵀ + ρI)⁻¹`; ρ again bounds the norm.

A kernel of 1 on an axis leaves the stage of that axis out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxneutrino.factor_fit import Double, check_ranks, cholesky, stage, top_eigenvectors
from onnxneutrino.factor_shared import SharedFeatures
from onnxneutrino.factors import Factors
from onnxneutrino.plan import Array

SWEEPS = 100
TOLERANCE = 1e-4
PENALTY = 1e-4
RIDGE = 1e-6
MAX_CORE = 256


@dataclass(frozen=True, eq=False)
class Components:
    """The first stages of a CP chain, `first` `(r, I)`, `rows` `(r, kh)`, `columns` `(r, kw)`, and the last.

    `last` is `G^½P`, `(O, r)`; `error` the absolute error of the chain.
    """

    first: Double
    rows: Double
    columns: Double
    last: Double
    error: float


class Cp:
    """The form `cp` of one layer: one run of alternating least squares for each rank that is asked for."""

    def __init__(self, features: SharedFeatures) -> None:
        self.features = features
        self.problem = features.problem
        self._solved: dict[int, Components] = {}

    @property
    def limit(self) -> tuple[int, ...]:
        """`D = I·kh·kw`: as many features as the patch has elements."""
        return (self.problem.target.shape[1],)

    def errors(self, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """Relative squared output error at each rank of `grid`; dear, seconds a rank for a large layer."""
        return [self.problem.relative(self._components(rank).error) for (rank,) in grid]

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The chain at `ranks`, its depthwise stages with `groups = r`."""
        check_ranks("cp", ranks, self.limit)
        (rank,) = ranks
        _, _, kh, kw = self.problem.weight.shape
        found = self._components(rank)
        stages = [stage(found.first[:, :, None, None])]
        if kh > 1:
            stages.append(stage(found.rows[:, None, :, None], groups=rank))
        if kw > 1:
            stages.append(stage(found.columns[:, None, None, :], groups=rank))
        stages.append(stage(self.problem.unweighted(found.last)[:, :, None, None]))
        return self.problem.chain("cp", ranks, stages, found.error)

    def release(self) -> None:
        """Forget the features' fit; see `SharedFeatures`."""
        self.features.release()

    def _components(self, rank: int) -> Components:
        if rank not in self._solved:
            self._solved[rank] = self._fit_last(*self._from_core(rank))
        return self._solved[rank]

    def _from_core(self, rank: int) -> tuple[Double, Double, Double]:
        """Channel, row and column factors `(r, I)`, `(r, kh)`, `(r, kw)` of the Tucker-2 core."""
        _, _, kh, kw = self.problem.weight.shape
        r1 = min(self.features.limit, rank, MAX_CORE)
        first, block = self.features.nested(r1).first[:r1], r1 * self.features.taps
        last = self.features.nested(r1).last(block)
        whitened = self.features.nested(r1).whitened[:, :block]
        _, vectors = top_eigenvectors(whitened @ whitened.T, min(len(whitened), rank, block, MAX_CORE))
        root = cholesky(first @ self.features.tap_moment() @ first.T)
        core = np.einsum("pft,fg->pgt", (vectors.T @ last).reshape(-1, r1, kh * kw), root, optimize=True)
        found = _alternate((core / np.linalg.norm(core)).reshape(-1, r1, kh, kw), rank)
        for axis in (2, 3):
            if len(found[axis]) == 1:  # no stage for this axis: its factor goes to the inputs'
                found[1], found[axis] = found[1] * found[axis], np.ones((1, rank))
        mixed = scipy.linalg.solve_triangular(root, found[1], trans="T", lower=True).T @ first
        return mixed, found[2].T, found[3].T

    def _fit_last(self, first: Double, rows: Double, columns: Double) -> Components:
        """The best last stage on the features of the first ones, and its error on Σ."""
        problem = self.problem
        features = np.einsum("ri,ra,rb->riab", first, rows, columns, optimize=True).reshape(len(first), -1)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        single = features.astype(np.float32)
        moved = problem.moments.times(single).astype(np.float64)
        inner = moved @ features.T
        inner = (inner + inner.T) / 2
        penalised = inner + problem.ridge * (features @ features.T)
        scale = 1 / np.sqrt(np.diag(penalised))
        target = problem.target.astype(np.float64)
        outer = target @ moved.T
        wanted = (outer + problem.ridge * (target @ features.T)) * scale
        white = scale[:, None] * penalised * scale + RIDGE * np.eye(len(scale))
        last = np.ascontiguousarray(scipy.linalg.cho_solve((cholesky(white), True), wanted.T).T) * scale
        error = problem.energy - 2 * float(np.vdot(last, outer)) + float(np.vdot(last @ inner, last))
        lengths = np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=1)
        norms = np.linalg.norm(first, axis=1) * lengths[0] * lengths[1]
        return Components(
            first * (lengths[0] * lengths[1] / norms)[:, None],
            rows / lengths[0][:, None],
            columns / lengths[1][:, None],
            last,
            error,
        )


def _alternate(core: Double, rank: int) -> list[Double]:
    """CP factors `(side, r)` of the core `(O', I', kh, kw)`, of bounded norm; the same for the same core.

    Components that the penalty shrinks to nothing are drawn afresh: the fit to the data can use them.
    """
    factors = _expansion(core, rank)
    outputs, inputs, kh, kw = core.shape
    single = core.reshape(outputs, inputs, kh * kw).astype(np.float32)
    turned = np.ascontiguousarray(single.swapaxes(0, 1)).reshape(inputs, -1)
    total, before = float(np.vdot(core, core)), np.inf
    for _ in range(SWEEPS):
        taps = _khatri_rao(factors[2], factors[3])
        factors[0] = _solve(single.reshape(outputs, -1) @ _single(_khatri_rao(factors[1], taps)), factors, 0)
        factors[1] = _solve(turned @ _single(_khatri_rao(factors[0], taps)), factors, 1)
        mixed = (_single(factors[0]).T @ single.reshape(outputs, -1)).reshape(rank, inputs, -1)
        planes = np.einsum("rit,ir->rt", mixed, _single(factors[1]), optimize=True).reshape(rank, kh, kw)
        factors[2] = _solve(np.einsum("rab,br->ar", planes, factors[3]), factors, 2)
        seen = np.einsum("rab,ar->br", planes, factors[2])
        factors[3] = _solve(seen, factors, 3)
        missed = total - 2 * float(np.vdot(seen, factors[3])) + float(_gram(factors).sum())
        if before - missed < TOLERANCE * missed:
            break
        before = missed
    sizes = np.prod([np.linalg.norm(factor, axis=0) for factor in factors], axis=0)
    dead = sizes <= 1e-6 * sizes.max()
    generator = np.random.default_rng(0)
    for factor in factors:
        factor[:, dead] = generator.standard_normal((len(factor), int(dead.sum())))
    return factors


def _solve(products: NDArray[Any], factors: Sequence[Double], axis: int) -> Double:
    """The factor `(side, r)` of `axis` that is best with the others as they are, from `core · others`."""
    gram = _gram([factor for index, factor in enumerate(factors) if index != axis])
    gram[np.diag_indices_from(gram)] += PENALTY
    return np.asarray(scipy.linalg.solve(gram, products.T.astype(np.float64), assume_a="pos").T)


def _gram(factors: Sequence[Double]) -> Double:
    """Inner products of the components, `(r, r)`."""
    return np.asarray(np.prod([factor.T @ factor for factor in factors], axis=0))


def _khatri_rao(first: Double, second: Double) -> Double:
    """Column-wise Kronecker product, `(m·n, r)`."""
    return (first[:, None, :] * second[None, :, :]).reshape(-1, first.shape[1])


def _single(matrix: Double) -> Array:
    return matrix.astype(np.float32)


def _expansion(core: Double, rank: int) -> list[Double]:
    """The `rank` largest terms of the core written as a sum of rank-one terms, `(side, r)` for each axis.

    The slice of each output is an SVD of inputs against taps, and each tap vector one of rows against
    columns. Zeros where there are not so many terms.
    """
    outputs, inputs, kh, kw = core.shape
    left, middle, right = np.linalg.svd(core.reshape(outputs, inputs, kh * kw), full_matrices=False)
    rows, inner, columns = np.linalg.svd(right.reshape(outputs, -1, kh, kw), full_matrices=False)
    sizes = middle[:, :, None] * inner
    order = np.argsort(-sizes, axis=None, kind="stable")[:rank]
    out, term, part = np.unravel_index(order, sizes.shape)
    scale = sizes[out, term, part] ** 0.25
    start = [np.zeros((side, rank)) for side in core.shape]
    used = slice(0, len(order))
    start[0][out, np.arange(len(order))] = scale
    start[1][:, used] = left[out, :, term].T * scale
    start[2][:, used] = rows[out, term, :, part].T * scale
    start[3][:, used] = columns[out, term, part].T * scale
    return start
