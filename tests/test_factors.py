from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxneutrino.errors import DataError
from onnxneutrino.factors import (
    Factors,
    Moments,
    Stage,
    chain_macs,
    chain_product,
    dense,
    stage_geometries,
)
from onnxneutrino.moments import MomentSum, total_variance
from onnxneutrino.plan import Array, Geometry

RNG = np.random.default_rng


def normal(*shape: int, seed: int = 0) -> Array:
    return RNG(seed).standard_normal(shape).astype(np.float32)


def correlate(stage: Stage, geometry: Geometry, image: Array) -> tuple[Array, int]:
    """The stage by plain loops on one map `(I, H, W)` or `(I, D, H, W)`, in float64, and its multiplications."""
    weight, groups = stage.weight.astype(np.float64), stage.groups
    outputs, per_group, *kernel = weight.shape
    axes = len(kernel)
    padded = np.pad(image, ((0, 0), *zip(geometry.pads[:axes], geometry.pads[axes:], strict=True)))
    result = np.zeros((outputs, *geometry.output_size(*image.shape[1:])))
    count = 0
    for o, *place in np.ndindex(*result.shape):
        start = o // (outputs // groups) * per_group
        for i, *tap in np.ndindex(per_group, *kernel):
            steps = zip(place, geometry.strides, tap, geometry.dilations, strict=True)
            source = (start + i, *(p * stride + t * dilation for p, stride, t, dilation in steps))
            result[(o, *place)] += weight[(o, i, *tap)] * padded[source]
            count += 1
    return result, count


CHAINS = {
    "spatial": (Stage(normal(2, 3, 3, 1)), Stage(normal(4, 2, 1, 2, seed=1))),
    "tucker2": (
        Stage(normal(2, 3, 1, 1)),
        Stage(normal(3, 2, 3, 2, seed=1)),
        Stage(normal(4, 3, 1, 1, seed=2)),
    ),
    "cp": (
        Stage(normal(2, 3, 1, 1)),
        Stage(normal(2, 1, 3, 1, seed=1), groups=2),
        Stage(normal(2, 1, 1, 2, seed=2), groups=2),
        Stage(normal(4, 2, 1, 1, seed=3)),
    ),
}
DEEP = (
    Stage(normal(2, 3, 1, 1, 1)),
    Stage(normal(3, 2, 3, 2, 2, seed=1)),
    Stage(normal(4, 3, 1, 1, 1, seed=2)),
)
GEOMETRY = Geometry((3, 2), strides=(2, 1), pads=(1, 0, 2, 1), dilations=(1, 2))


@pytest.mark.parametrize("form", CHAINS)
def test_a_chain_run_by_stage_equals_its_product(form: str) -> None:
    stages = CHAINS[form]
    image = normal(3, 6, 5, seed=9)
    whole, _ = correlate(Stage(chain_product(stages)), GEOMETRY, image)
    count, value = 0, image
    for stage, own in zip(stages, stage_geometries(stages, GEOMETRY), strict=True):
        value, used = correlate(stage, own, value)
        count += used
    np.testing.assert_allclose(value, whole, rtol=1e-5, atol=1e-5)
    assert chain_macs(stages, GEOMETRY, (6, 5)) == count


def test_a_3d_chain_run_by_stage_equals_its_product() -> None:
    geometry = Geometry((3, 2, 2), strides=(2, 1, 1), pads=(1, 0, 0, 2, 1, 0), dilations=(1, 2, 1))
    image = normal(3, 4, 5, 3, seed=9)
    whole, _ = correlate(Stage(chain_product(DEEP)), geometry, image)
    count, value = 0, image
    for stage, own in zip(DEEP, stage_geometries(DEEP, geometry), strict=True):
        value, used = correlate(stage, own, value)
        count += used
    np.testing.assert_allclose(value, whole, rtol=1e-5, atol=1e-5)
    assert chain_macs(DEEP, geometry, (4, 5, 3)) == count


def test_a_geometry_has_as_many_of_everything_as_axes() -> None:
    with pytest.raises(ValueError, match=r"strides \(1, 1\), .* for \(3, 3, 3\)"):
        Geometry((3, 3, 3))


def test_a_grouped_stage_written_out_is_the_same_convolution() -> None:
    stage = Stage(normal(6, 2, 2, 2), groups=3)
    image = normal(6, 4, 4, seed=1)
    geometry = Geometry((2, 2))
    grouped, _ = correlate(stage, geometry, image)
    written_out, _ = correlate(Stage(dense(stage)), geometry, image)
    np.testing.assert_allclose(grouped, written_out, rtol=1e-6, atol=1e-6)


def test_strides_of_a_1x1_kernel_go_to_the_first_stage() -> None:
    stages = (Stage(normal(2, 3, 1, 1)), Stage(normal(4, 2, 1, 1)))
    first, second = stage_geometries(stages, Geometry(strides=(2, 3)))
    assert (first.strides, second.strides) == ((2, 3), (1, 1))


def test_stages_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="gives 2 channels, the next takes 3"):
        Factors("svd", (2,), (Stage(normal(2, 3, 1, 1)), Stage(normal(4, 3, 1, 1))), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="bias"):
        Factors("svd", (2,), (Stage(normal(2, 3, 1, 1)),), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="at least one stage"):
        chain_product(())


def test_params_count_every_element() -> None:
    factors = Factors("cp", (2,), CHAINS["cp"], np.zeros(4, np.float32))
    assert factors.params == 2 * 3 + 2 * 3 + 2 * 2 + 4 * 2 + 4


def test_rows_and_sigma_are_the_same_moments() -> None:
    rows = normal(5, 8)
    rows -= rows.mean(axis=0)
    mean = np.zeros(8, np.float32)
    lean, full = Moments(mean, 5, rows=rows), Moments(mean, 5, sigma=rows.T @ rows / 5)
    left = normal(3, 8, seed=1)
    np.testing.assert_allclose(lean.times(left), full.times(left), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lean.matrix(), full.matrix(), rtol=1e-5, atol=1e-6)
    assert total_variance(lean) == pytest.approx(total_variance(full), rel=1e-5)
    with pytest.raises(ValueError, match="not both"):
        Moments(mean, 5, rows=rows, sigma=full.sigma)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    dimension=st.integers(1, 12),
    offset=st.floats(-1000, 1000),
)
def test_moments_in_chunks_are_those_of_all_rows(sizes: list[int], dimension: int, offset: float) -> None:
    rows = (RNG(sum(sizes)).standard_normal((sum(sizes), dimension)) + offset).astype(np.float32)
    total = MomentSum(dimension)
    for chunk in np.split(rows, np.cumsum(sizes)[:-1]):
        total.add(chunk)
    moments = total.moments()
    exact = rows.astype(np.float64)
    assert moments.count == len(rows)
    assert (moments.rows is not None) == (len(rows) < dimension)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.matrix(), np.cov(exact.T, bias=True).reshape(dimension, -1), atol=2e-5)


def test_moments_of_many_rows_do_not_depend_on_the_chunks() -> None:
    rows = normal(5000, 6) * np.float32(3) + np.float32(50)
    single, many = MomentSum(6), MomentSum(6)
    single.add(rows)
    for chunk in np.array_split(rows, 70):
        many.add(chunk)
    np.testing.assert_allclose(single.moments().matrix(), many.moments().matrix(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(many.moments().matrix(), np.cov(rows.T.astype(np.float64), bias=True), atol=1e-3)


def test_moments_refuse_what_is_no_data() -> None:
    with pytest.raises(DataError, match="no patches"):
        MomentSum(3).moments()
    with pytest.raises(DataError, match="NaN or infinite"):
        MomentSum(3).add(np.array([[1, np.inf, 0]], np.float32))
    with pytest.raises(ValueError, match="dimension 3"):
        MomentSum(3).add(np.zeros((2, 4), np.float32))
