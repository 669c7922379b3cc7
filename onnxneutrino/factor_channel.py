"""Fewer channels after the kernel: `kh×kw (I → r)`, then `1×1 (r → O)`; for a matrix, `I → r → O`.

The best `M` of rank r projects the outputs on the top r eigenvectors `E` (`O × r`) of their centred
covariance: `M = E Eᵀ W`, with `WΣWᵀ E = E Λ`; its error is the sum of the discarded eigenvalues.
Zhang, Zou, He and Sun, Accelerating very deep convolutional networks, 2015 (section 3.1).
With a weighting G: eigenvectors of `G^½WΣWᵀG^½`, `M = G^-½ E Eᵀ G^½ W`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from onnxneutrino.factor_fit import Double, Problem, check_ranks, pointwise, stage, top_eigenvectors
from onnxneutrino.factors import Factors
from onnxneutrino.plan import Array, Form


class OutputSpectrum:
    """The directions in which a layer's outputs vary, the strongest first, for all forms that project on them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._kept: tuple[Double, Array] | None = None

    @property
    def limit(self) -> int:
        """`min(O, D)`."""
        return int(min(self.problem.target.shape))

    @cached_property
    def _all(self) -> tuple[Double, Double]:
        """Error at ranks 0 to limit, `(limit + 1,)`, and eigenvectors `(O, limit)`.

        The vectors are those of the regularised covariance, the errors those on Σ: `tr C - Σ eᵀCe`.
        """
        target = self.problem.target.astype(np.float64)
        covariance = target @ self.problem.target_sigma.T.astype(np.float64)
        covariance = (covariance + covariance.T) / 2
        _, vectors = top_eigenvectors(covariance + self.problem.ridge * (target @ target.T), self.limit)
        gains = np.einsum("or,op,pr->r", vectors, covariance, vectors, optimize=True)
        return self.problem.energy - np.concatenate([[0.0], np.cumsum(gains)]), vectors

    def error(self, rank: int) -> float:
        """Squared output error at a rank."""
        return float((self._all if self._kept is None else self._kept)[0][rank])

    def vectors(self, rank: int) -> Any:
        """The first eigenvectors, `(O, rank)`."""
        kept: Any = self._kept[1] if self._kept is not None and rank <= self._kept[1].shape[1] else self._all[1]
        return kept[:, :rank]

    def spill(self, most: int, keep: Callable[[Array], Array]) -> None:
        """Leave the eigenvectors for ranks up to `most` where `keep` puts them, in single precision."""
        if self._kept is None:
            errors, vectors = self._all
            self._kept = errors, keep(np.asarray(vectors[:, :most], np.float32))
        self.__dict__.pop("_all", None)
        self.problem.__dict__.pop("target_sigma", None)


class OutputProjection:
    """The forms `svd` and `channel` of one layer."""

    def __init__(self, form: Form, spectrum: OutputSpectrum) -> None:
        self.form = form
        self.spectrum = spectrum

    @property
    def limit(self) -> tuple[int, ...]:
        """`min(O, D)`."""
        return (self.spectrum.limit,)

    def errors(self, grid: Sequence[tuple[int, ...]]) -> list[float]:
        """Relative squared output error at each rank of `grid`."""
        return [self.spectrum.problem.relative(self.spectrum.error(rank)) for (rank,) in grid]

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The chain at `ranks`: `EᵀG^½W` and `G^-½E`."""
        check_ranks(self.form, ranks, self.limit)
        (rank,) = ranks
        problem, kept = self.spectrum.problem, self.spectrum.vectors(rank)
        first = (kept.T @ problem.target).reshape(rank, *problem.weight.shape[1:])
        stages = (stage(first), pointwise(problem.unweighted(kept), first.ndim - 2))
        return problem.chain(self.form, ranks, stages, self.spectrum.error(rank))

    def release(self) -> None:
        """Nothing: the eigenvectors serve every rank and are small."""
