"""Refit before any gradient: each last factor by ridge regression (asymmetric reconstruction, design step 7).

A last factor `P` reads features `z` of the *compressed* network and should give what the *original* layer
put out, `y`. With centred `Z` (n × d) and `Y` (n × O), shrinking toward the present factor `P0`:

    P(λ) = P0 + (Yᵀ - P0 Zᵀ) Z (ZᵀZ + λ I)⁻¹,   b = mean y - P mean z

(Zhang et al. 2015, asymmetric reconstruction; ridge with a prior mean). λ is chosen on held-out rows, and the
present factor stays when none is better there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxneutrino.plan import Array

HELD_OUT_SHARE = 0.25
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class Refitted:
    """A last factor `(O, d)`, its bias `(O,)`, and mean squared errors on the held-out rows."""

    weight: Array
    bias: Array
    error_before: float
    error_after: float
    strength: float | None


def refit(features: Array, outputs: Array, weight: Array, bias: Array) -> Refitted:
    """Solve the last factor anew.

    Args:
        features: `z`, `(n, d)`, rows in the order of the examples (the last quarter is held out).
        outputs: `y`, `(n, O)`, of the original layer, at the same positions.
        weight: present factor `P0`, `(O, d)`.
        bias: present bias, `(O,)`.
    """
    held = max(1, round(HELD_OUT_SHARE * len(features)))
    z, y = features[:-held].astype(np.float64), outputs[:-held].astype(np.float64)
    z_held, y_held = features[-held:], outputs[-held:]
    before = _error(z_held, y_held, weight, bias)
    if len(z) < 2:
        return Refitted(weight, bias, before, before, None)
    z_mean, y_mean = z.mean(axis=0), y.mean(axis=0)
    z, y = z - z_mean, y - y_mean
    values, vectors = np.linalg.eigh(z.T @ z)
    values = np.maximum(values, 0.0)
    residual = (y - z @ weight.T).T @ z @ vectors
    best = Refitted(weight, bias, before, before, None)
    scale = float(values.mean())
    if scale <= 0:
        return best
    for strength in STRENGTHS:
        solved = weight + (residual / (values + strength * scale)) @ vectors.T
        own = np.asarray(solved, np.float32)
        own_bias = np.asarray(y_mean - solved @ z_mean, np.float32)
        error = _error(z_held, y_held, own, own_bias)
        if error < best.error_after:
            best = Refitted(own, own_bias, before, error, strength)
    return best


def _error(features: Array, outputs: Array, weight: Array, bias: Array) -> float:
    return float(np.mean((outputs - features @ weight.T - bias) ** 2))
