"""The least-squares problem that every form solves, each with its own kind of matrix of low rank.

A layer `y = W x + b`, `W` of shape `(O, D)`, `D = I·kh·kw`, is replaced by `M x + b'`, with `M` the product
of a chain. Wanted is the `M` of the form that minimises

    `tr G (W - M) Σ (W - M)ᵀ`,    `b' = b + (W - M) μ`

with `μ`, `Σ` mean and centred second moment of the patches `x` and `G` (`O × O`) a weighting of the outputs,
identity or K-FAC (Martens and Grosse, 2015). `Σ` is singular where the patches are few or some direction
never occurs; `Σ' = Σ + ε·tr(Σ)/D·I` stands in for it, which draws `M` to `W` where the data says nothing.
The errors reported are those on `Σ` itself.

Everything is computed on `G^½W`; a chain for that becomes one for `W` by `G^-½` on its last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxneutrino.factors import Factors, Moments, Stage, chain_product
from onnxneutrino.moments import total_variance
from onnxneutrino.plan import Array, Form

Double = NDArray[np.float64]
RIDGE = 1e-4
MAX_RIDGE = 1e-2


class Decomposition(Protocol):
    """One layer in one form: the expensive part is done once, on first use, and serves every rank."""

    @property
    def limit(self) -> tuple[int, ...]:
        """The largest ranks; with them the chain equals the layer."""

    def errors(self, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """Relative squared output error of the chain at each of `grid`'s ranks (`Factors.error`)."""

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The fitted chain at `ranks`.

        Raises:
            ValueError: ranks below 1 or above `limit`.
        """

    def release(self) -> None:
        """Forget what takes much memory and little time to compute again at the ranks of a plan."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer, the moments of its input and the weighting of its output.

    Attributes:
        weight: `(O, I, *kernel)`.
        bias: `(O,)`.
        moments: of the input patches.
        weighting: `G`, `(O, O)`, symmetric and positive semidefinite; None for the identity.
    """

    weight: Array
    bias: Array
    moments: Moments
    weighting: Array | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where the shapes do not agree."""
        outputs, size = self.weight.shape[0], self.weight[0].size
        if self.moments.mean.shape != (size,):
            raise ValueError(f"moments of dimension {self.moments.mean.shape[0]} for a weight {self.weight.shape}")
        if self.weighting is not None and self.weighting.shape != (outputs, outputs):
            raise ValueError(f"output weighting {self.weighting.shape} for {outputs} outputs")

    @cached_property
    def ridge(self) -> float:
        """What is added to the diagonal of Σ: `ε·tr(Σ)/D`, `ε` = 1e-4 for `n >= 5D` rows and in 1/n above.

        1 where the input never varies: the fit is then one to the weights.
        """
        size = self.moments.mean.size
        relative = min(MAX_RIDGE, RIDGE * max(1.0, 5 * size / self.moments.count))
        variance = total_variance(self.moments) / size
        return relative * variance if variance > 0 else 1.0

    @cached_property
    def _roots(self) -> tuple[Double, Double] | None:
        """`G^½` and `G^-½`, `G` with a relative ridge (K-FAC's has the rank of the classes)."""
        if self.weighting is None:
            return None
        outputs = len(self.weighting)
        values, vectors = np.linalg.eigh(np.asarray(self.weighting, np.float64))
        values = np.maximum(values, 0)
        mean = values.mean()
        roots = np.sqrt(values / mean + 1e-3) if mean > 0 else np.ones(outputs)
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T

    @cached_property
    def target(self) -> Array:
        """`G^½W`, `(O, D)`, with `G` scaled to mean eigenvalue 1."""
        flat = np.asarray(self.weight.reshape(len(self.weight), -1), np.float32)
        return flat if self._roots is None else np.asarray(self._roots[0] @ flat, np.float32)

    @cached_property
    def target_sigma(self) -> Array:
        """`G^½WΣ`, `(O, D)`."""
        return self.moments.times(self.target)

    @cached_property
    def energy(self) -> float:
        """`tr G WΣWᵀ`: what errors are relative to."""
        return float(np.einsum("od,od->", self.target, self.target_sigma, dtype=np.float64))

    def relative(self, error: float) -> float:
        """Error `tr G (W - M)Σ(W - M)ᵀ` as a share of `energy`; 0 for a layer whose output never varies."""
        return max(error, 0.0) / self.energy if self.energy > 0 else 0.0

    def unweighted(self, last: Double) -> Double:
        """`G^-½ last` for a last stage `(O, r)` fitted to `G^½W`."""
        return last if self._roots is None else self._roots[1] @ last

    def chain(self, form: Form, ranks: tuple[int, ...], stages: Sequence[Stage], error: float) -> Factors:
        """Factors of `stages`, balanced, with the bias `b + (W - M)μ` and the absolute `error`."""
        stages = balanced(stages)
        missing = (self.weight - chain_product(stages)).reshape(len(self.weight), -1)
        bias = np.asarray(self.bias + missing.astype(np.float64) @ self.moments.mean, np.float32)
        return Factors(form, ranks, tuple(stages), bias, self.relative(error))


def check_ranks(form: Form, ranks: tuple[int, ...], limit: tuple[int, ...]) -> None:
    """Raise ValueError unless `1 <= ranks <= limit`."""
    if len(ranks) != len(limit) or not all(1 <= r <= top for r, top in zip(ranks, limit, strict=False)):
        raise ValueError(f"{form}: ranks {ranks} are not within 1 and {limit}")


def balanced(stages: Sequence[Stage]) -> list[Stage]:
    """The same chain with each inner channel's norm shared evenly by the stage before and the stage after.

    The product stays as it is; gradients then have the same scale in all stages.
    """
    weights = [np.asarray(old.weight, np.float64) for old in stages]
    for index in range(len(stages) - 1):
        first, second = weights[index], weights[index + 1]
        depthwise = stages[index + 1].groups > 1
        reads = second if depthwise else second.swapaxes(0, 1)
        before = np.linalg.norm(first.reshape(len(first), -1), axis=1)
        after = np.linalg.norm(reads.reshape(len(reads), -1), axis=1)
        scale = np.ones(len(first))
        used = (before > 0) & (after > 0)
        scale[used] = np.sqrt(after[used] / before[used])
        weights[index] = first * _along(scale, first.ndim, 0)
        weights[index + 1] = second / _along(scale, second.ndim, 0 if depthwise else 1)
    return [
        Stage(np.ascontiguousarray(weight, np.float32), old.groups) for weight, old in zip(weights, stages, strict=True)
    ]


def _along(values: Double, axes: int, axis: int) -> Double:
    """`values` `(n,)` as an array of `axes` axes that lies along `axis`."""
    return np.expand_dims(values, [other for other in range(axes) if other != axis])


def stage(weight: NDArray[Any], groups: int = 1) -> Stage:
    """A stage with the float32 weight `(O, I/groups, *kernel)`."""
    return Stage(np.asarray(weight, np.float32), groups)


def pointwise(matrix: NDArray[Any], axes: int) -> Stage:
    """A stage `(O, I)` whose kernel is 1 on each of `axes` axes."""
    return stage(matrix.reshape(*matrix.shape, *[1] * axes))


def top_eigenvectors(matrix: Double, count: int) -> tuple[Double, Double]:
    """The `count` largest eigenvalues of a symmetric `(n, n)`, descending, and their vectors `(n, count)`."""
    # NumPy's lets other threads go on meanwhile, an interrupt among them; SciPy's does not.
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:count], np.ascontiguousarray(vectors[:, ::-1][:, :count])


def cholesky(matrix: Double) -> Double:
    """Lower Cholesky factor of a symmetric matrix that is positive definite up to rounding.

    The matrix is overwritten: at 4000 rows every copy would be 128 MB.

    Raises:
        ValueError: it is not, even with a hundredth of its mean eigenvalue added.
    """
    turned = np.ascontiguousarray(matrix).T  # in the order of LAPACK
    diagonal = turned.diagonal().copy()
    for jitter in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        np.fill_diagonal(turned, diagonal + jitter * diagonal.mean())
        factor, info = scipy.linalg.lapack.dpotrf(turned, lower=1, clean=0, overwrite_a=1)
        if info == 0:
            for column in range(1, len(factor)):
                factor[:column, column] = 0
            return np.asarray(factor)
        for column in range(len(turned) - 1):  # the upper triangle is as it was
            turned[column + 1 :, column] = turned[column, column + 1 :]
    raise ValueError("the moments are not positive semidefinite")
