"""Refit: the ridge problem of its docstring, solved exactly, and never for the worse on held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxneutrino import refit as module
from onnxneutrino.plan import Array
from onnxneutrino.refit import HELD_OUT_SHARE, STRENGTHS, Refitted, refit


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held_out(rows: int) -> int:
    return max(1, round(HELD_OUT_SHARE * rows))


def squared(features: Array, outputs: Array, weight: Array, bias: Array) -> float:
    return float(np.mean((outputs.astype(np.float64) - features.astype(np.float64) @ weight.T - bias) ** 2))


def mixed(rows: int, size: int, seed: int = 0) -> Array:
    """Correlated features with a mean."""
    return normal(rows, size, seed=seed) @ normal(size, size, seed=seed + 1) + normal(size, seed=seed + 2)


def test_without_noise_it_is_least_squares() -> None:
    z, truth, offset = normal(400, 6) + normal(6, seed=1), normal(5, 6, seed=5), normal(5, seed=6)
    y = z @ truth.T + offset
    solved = refit(z, y, normal(5, 6, seed=7), normal(5, seed=8))
    rows = len(z) - held_out(len(z))
    design = np.hstack([z[:rows], np.ones((rows, 1), np.float32)]).astype(np.float64)
    wanted = np.linalg.lstsq(design, y[:rows].astype(np.float64), rcond=None)[0].T
    assert solved.strength == min(STRENGTHS)
    np.testing.assert_allclose(solved.weight, wanted[:, :-1], atol=2e-4)
    np.testing.assert_allclose(solved.bias, wanted[:, -1], atol=2e-4)
    assert solved.error_after < 1e-8 * solved.error_before


def test_vanishing_strength_is_lstsq_with_noise_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRENGTHS", (1e-12,))
    z, y = mixed(300, 8), normal(300, 4, seed=9)
    y += z @ normal(8, 4, seed=10)
    solved = refit(z, y, normal(4, 8, seed=11), normal(4, seed=12))
    rows = len(z) - held_out(len(z))
    design = np.hstack([z[:rows], np.ones((rows, 1), np.float32)]).astype(np.float64)
    wanted = np.linalg.lstsq(design, y[:rows].astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(solved.weight, wanted[:, :-1], atol=1e-5)
    np.testing.assert_allclose(solved.bias, wanted[:, -1], atol=1e-5)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_the_ridge_problem_is_at_its_minimum(monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    """|Y - ZPᵀ - b|² + λ|P - P0|² has no gradient in P nor b at the solution."""
    monkeypatch.setattr(module, "STRENGTHS", (strength,))
    z, weight = mixed(200, 7), normal(3, 7, seed=4)
    y = z @ normal(7, 3, seed=5) + 0.1 * normal(200, 3, seed=6)
    solved = refit(z, y, weight, normal(3, seed=7))
    assert solved.strength == strength
    rows = len(z) - held_out(len(z))
    data, wanted = z[:rows].astype(np.float64), y[:rows].astype(np.float64)
    centred = data - data.mean(axis=0)
    penalty = strength * np.sum(centred**2) / data.shape[1]
    residual = wanted - data @ solved.weight.T.astype(np.float64) - solved.bias
    gradient = residual.T @ data - penalty * (solved.weight - weight.astype(np.float64))
    scale = np.linalg.norm(wanted) * np.linalg.norm(data)
    assert np.linalg.norm(gradient) < 1e-5 * scale
    assert np.linalg.norm(residual.sum(axis=0)) < 1e-5 * scale


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 20),
    outputs=st.integers(1, 5),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
    off=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_held_out_error_never_rises(
    rows: int, size: int, outputs: int, noise: float, off: float, seed: int
) -> None:
    z, truth, bias = normal(rows, size, seed=seed), normal(outputs, size, seed=seed + 1), normal(outputs, seed=seed + 2)
    y = z @ truth.T + bias + noise * normal(rows, outputs, seed=seed + 3)
    weight = truth + off * normal(outputs, size, seed=seed + 4)
    solved = refit(z, y, weight, bias)
    last = slice(rows - held_out(rows), None)
    before, after = (squared(z[last], y[last], w, b) for w, b in ((weight, bias), (solved.weight, solved.bias)))
    assert solved.error_before == pytest.approx(before, rel=1e-3, abs=1e-6)
    assert solved.error_after == pytest.approx(after, rel=1e-3, abs=1e-6)
    assert solved.error_after <= solved.error_before
    if solved.strength is None:
        assert solved.weight is weight
        assert solved.bias is bias
    assert solved.weight.dtype == solved.bias.dtype == np.float32
    assert (solved.weight.shape, solved.bias.shape) == (weight.shape, bias.shape)


def noisy(seed: int) -> tuple[Refitted, Array, Array]:
    z, weight, bias = normal(80, 50, seed=seed), normal(4, 50, seed=seed + 1), normal(4, seed=seed + 2)
    y = z @ weight.T + bias + 5 * normal(80, 4, seed=seed + 3)
    return refit(z, y, weight, bias), weight, bias


def test_noise_around_the_present_factor_keeps_it() -> None:
    """Sixty rows of noise for fifty features: on fresh rows plain least squares is far worse than the truth."""
    kept = 0
    worse = []
    for seed in range(0, 400, 10):
        solved, weight, bias = noisy(seed)
        kept += solved.weight is weight
        fresh = normal(500, 50, seed=seed + 5)
        missed = fresh @ (solved.weight - weight).T + solved.bias - bias
        worse.append(float(np.mean(missed**2)) / 25)
    assert kept >= 20
    # Added error against the noise's own; without the prior it would be d / (n - d - 1), about five.
    assert np.mean(worse) < 0.1


def test_features_that_never_vary_leave_the_factor() -> None:
    z, y, weight, bias = np.ones((40, 3), np.float32), normal(40, 2), normal(2, 3, seed=1), normal(2, seed=2)
    solved = refit(z, y, weight, bias)
    assert np.isfinite(solved.weight).all()
    np.testing.assert_array_equal(solved.weight, weight)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_too_few_rows_still_answer(rows: int) -> None:
    solved = refit(normal(rows, 4), normal(rows, 2, seed=1), normal(2, 4, seed=2), normal(2, seed=3))
    assert solved.error_after <= solved.error_before
    assert np.isfinite(solved.weight).all()
