"""What training is taken to bring back."""

from __future__ import annotations

import pytest

from onnxneutrino.recovery import left, secant


def test_half_is_left_after_the_half_time_and_all_before() -> None:
    assert left(10.0, 10.0) == 0.5
    assert left(0.0, 10.0) == 1.0
    assert left(5.0, float("inf")) == 1.0
    assert left(5.0, 0.0) == 0.0
    shares = [left(seconds, 10.0) for seconds in (1, 3, 10, 30, 100)]
    assert shares == sorted(shares, reverse=True)


def test_the_secant_goes_through_its_points() -> None:
    points = [(999.0, 9.0), (400.0, 1.0), (200.0, 3.0)]
    assert secant(points, 1.0) == pytest.approx(400.0)
    assert secant(points, 3.0) == pytest.approx(200.0)
    assert secant(points, 2.0) == pytest.approx(200 * 2**0.5)
    assert secant(points, 5.0) == pytest.approx(100.0)


def test_a_secant_that_does_not_fall_says_nothing() -> None:
    assert secant([(400.0, 1.0)], 0.5) == 0.0
    assert secant([(400.0, 3.0), (200.0, 1.0)], 0.5) == 0.0
    assert secant([(400.0, 3.0), (400.0, 1.0)], 0.5) == 0.0
    assert secant([(400.0, 1.0), (399.0, 1.0 + 1e-12)], 50.0) > 0.0
