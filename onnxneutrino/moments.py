"""Adding up the moments of a layer's input patches, chunk by chunk.

`mean = Σx / n`, `Σ = Σ(x - mean)(x - mean)ᵀ / n`, summed around a shift `s` near the mean so that float32
keeps its digits: `Σ = Σ(x - s)(x - s)ᵀ / n - (mean - s)(mean - s)ᵀ` (Chan, Golub and LeVeque, Algorithms
for computing the sample variance, 1983).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.errors import DataError
from onnxneutrino.factors import Moments
from onnxneutrino.plan import Array

BLOCK = 2048


class MomentSum:
    """Moments of patches that arrive in chunks `(n, D)`.

    The rows themselves are kept while there are fewer than `D` of them; from then on the `D × D` sum is the
    smaller of the two.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.count = 0
        self._shift: Array | None = None
        self._total: NDArray[np.float64] = np.zeros(dimension)
        self._rows: list[Array] = []
        self._waiting = 0
        self._sum: Array | None = None

    def add(self, patches: Array) -> None:
        """Add a chunk of patches `(n, D)` float32.

        Raises:
            ValueError: patches of another dimension.
            DataError: values that are not finite.
        """
        if patches.ndim != 2 or patches.shape[1] != self.dimension:
            raise ValueError(f"patches {patches.shape} for moments of dimension {self.dimension}")
        if not np.isfinite(patches).all():
            raise DataError("calibration gives NaN or infinite values; check scale, mean and std of the data")
        if not len(patches):
            return
        if self._shift is None:
            self._shift = np.asarray(patches.mean(axis=0, dtype=np.float64), np.float32)
        rows = np.asarray(patches, np.float32) - self._shift
        self.count += len(rows)
        self._total += rows.sum(axis=0, dtype=np.float64)
        self._rows.append(rows)
        self._waiting += len(rows)
        if self._waiting >= max(self.dimension if self._sum is None else 0, BLOCK):
            self._square()

    def _square(self) -> None:
        """Turn the rows that wait into their `D × D` sum, many at once: the sum is dear to touch."""
        rows = self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows)
        square = rows.T @ rows
        if self._sum is None:
            self._sum = square
        else:
            self._sum += square
        self._rows, self._waiting = [], 0

    def moments(self) -> Moments:
        """Moments of all patches so far.

        Raises:
            DataError: there are none.
        """
        if self._shift is None:
            raise DataError("calibration has no patches; give at least one example")
        if self._rows and self.count >= self.dimension:
            self._square()
        offset = self._total / self.count
        mean = np.asarray(self._shift + offset, np.float32)
        shift = np.asarray(offset, np.float32)
        if self._sum is None:
            rows = np.concatenate(self._rows)
            rows -= shift
            return Moments(mean, self.count, rows=rows)
        sigma = self._sum / np.float32(self.count)
        for start in range(0, self.dimension, BLOCK):  # the whole outer product would be as large as Σ
            sigma[start : start + BLOCK] -= np.outer(shift[start : start + BLOCK], shift)
        return Moments(mean, self.count, sigma=sigma)


def total_variance(moments: Moments) -> float:
    """Trace of Σ: the variance of a patch summed over its `D` elements."""
    if moments.sigma is not None:
        return float(np.trace(moments.sigma, dtype=np.float64))
    assert moments.rows is not None
    return float(np.einsum("nd,nd->", moments.rows, moments.rows, dtype=np.float64)) / moments.count
