"""Ranks by empirical variational Bayesian matrix factorization, solved globally and in closed form.

An observed `V` (`L × M`, `L <= M`) is a matrix of low rank plus Gaussian noise of variance `σ²`; both factors have
Gaussian priors whose variances are estimated too. Every singular value `γ` of `V` is kept or dropped on its own: it is
kept where `γ² > M σ² x̲`, with `α = L/M`, `x̲ = (1 + τ̲)(1 + α/τ̲)` and `τ̲` the zero of `Φ(τ) + Φ(τ/α)`,
`Φ(z) = log(z + 1)/z - 1/2`. The noise, where it is not known, minimises the free energy

    `Ω(σ²) = Σ_h ω(γ_h² / Mσ²)`,   `ω(x) = x - log x + [x > x̲] (log(τ + 1) + α log(τ/α + 1) - τ)`,
    `τ(x) = ½ (x - (1 + α) + √((x - (1 + α))² - 4α))`

between bounds that the paper gives. Nakajima, Sugiyama, Babacan and Tomioka, Global analytic solution of
fully-observed variational Bayesian matrix factorization, JMLR 14, 2013; noise estimation: their theorem on the
empirical case. Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
applications) take Tucker-2 ranks from it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

SCANNED = 200


def threshold(alpha: float) -> float:
    """`x̲`: the smallest `γ² / Mσ²` that is kept, for `α = L/M` in (0, 1]."""

    def slope(tau: float) -> float:
        return _phi(tau) + _phi(tau / alpha)

    # Φ falls from 1/2 at 0 to -1/2; at τ = α both terms are positive or one is, at 10 both are negative.
    tau = float(scipy.optimize.brentq(slope, 1e-9, 10.0))
    return (1 + tau) * (1 + alpha / tau)


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5


def evbmf_rank(matrix: NDArray[Any], variance: float | None = None) -> int:
    """Number of singular values kept.

    Args:
        matrix: `V`, either side the longer one.
        variance: `σ²` of the noise; None where it is estimated.
    """
    short, long = sorted(matrix.shape)
    gram = np.asarray(matrix if matrix.shape[0] == short else matrix.T, np.float64)
    squares = np.maximum(np.linalg.eigvalsh(gram @ gram.T)[::-1], 0.0)
    if squares[0] <= 0:
        return 0
    # Singular values that are rounding alone would draw the noise to nothing.
    squares = np.maximum(squares, 1e-12 * squares[0])
    alpha = short / long
    least = threshold(alpha)
    noise = noise_variance(squares, long, alpha, least) if variance is None else variance
    return int(np.sum(squares > long * noise * least))


def noise_variance(squares: NDArray[np.float64], long: int, alpha: float, least: float) -> float:
    """The `σ²` of least free energy: the best point of a scan in log `σ²`, refined between its neighbours.

    Args:
        squares: squared singular values, descending, `(L,)`, positive.
        long: `M`.
        alpha: `L/M`.
        least: `x̲`, see `threshold`.
    """
    short = len(squares)
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)  # more than that many are never kept
    high = float(squares.sum()) / (short * long)
    low = max(float(squares[most]) / (long * least), float(squares[most:].mean()) / long)
    low = min(low, high)

    def energy(log_variance: float) -> float:
        x = squares / (long * math.exp(log_variance))
        total = float(np.sum(x - np.log(x)))
        kept = x[x > least]
        root = np.sqrt(np.maximum((kept - (1 + alpha)) ** 2 - 4 * alpha, 0.0))
        tau = (kept - (1 + alpha) + root) / 2
        return total + float(np.sum(np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau))

    grid = np.linspace(math.log(low), math.log(high), SCANNED)
    best = int(np.argmin([energy(value) for value in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, SCANNED - 1)]
    if bounds[0] >= bounds[1]:
        return math.exp(bounds[0])
    found = scipy.optimize.minimize_scalar(energy, bounds=bounds, method="bounded")
    return math.exp(float(found.x) if energy(float(found.x)) <= energy(float(grid[best])) else float(grid[best]))
