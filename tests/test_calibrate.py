"""Calibration against brute force: patches by loops, moments by their definition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxneutrino import calibrate as module
from onnxneutrino.calibrate import (
    IMAGES,
    calibrate,
    images_needed,
    outputs_at,
    patches,
    sample_positions,
)
from onnxneutrino.errors import DataError
from onnxneutrino.factors import Moments
from onnxneutrino.plan import Geometry, Kind, Layer

EXAMPLES = 6


def layer(
    kind: Kind,
    weight: tuple[int, ...],
    size: tuple[int, ...] = (1, 1),
    positions: int | None = None,
    **geometry: Any,
) -> Layer:
    own = Geometry(kernel=weight[2:], **geometry)
    rng = np.random.default_rng(0)
    return Layer(
        name=f"{kind}_layer",
        op={"gemm": "Gemm", "matmul": "MatMul", "map": "Gemm"}.get(kind, "Conv"),
        kind=kind,
        input="x",
        output="y",
        nodes=("node",),
        weight=rng.standard_normal(weight).astype(np.float32),
        bias=rng.standard_normal(weight[0]).astype(np.float32),
        geometry=own,
        input_size=size,
        positions=math.prod(own.output_size(*size)) if positions is None else positions,
        weight_shape=weight,
    )


LAYERS = {
    "plain": (layer("conv2d", (4, 3, 3, 3), (5, 6)), (3, 5, 6)),
    "strided": (layer("conv2d", (4, 3, 3, 2), (8, 9), strides=(2, 3)), (3, 8, 9)),
    "padded": (layer("conv2d", (4, 2, 3, 3), (5, 4), pads=(0, 1, 2, 3)), (2, 5, 4)),
    "dilated": (layer("conv2d", (4, 2, 3, 2), (9, 8), dilations=(2, 3), pads=(1, 0, 0, 2)), (2, 9, 8)),
    "all of it": (
        layer("conv2d", (4, 2, 2, 3), (9, 10), strides=(3, 2), pads=(2, 0, 1, 3), dilations=(3, 2)),
        (2, 9, 10),
    ),
    "one position": (layer("conv2d", (4, 2, 3, 3), (3, 3)), (2, 3, 3)),
    "conv1d": (layer("conv1d", (4, 3, 3, 1), (11, 1), strides=(2, 1), pads=(1, 0, 2, 0), dilations=(2, 1)), (3, 11)),
    "conv3d": (
        layer(
            "conv3d",
            (4, 2, 2, 3, 2),
            (6, 5, 4),
            strides=(2, 1, 3),
            pads=(1, 0, 2, 0, 3, 1),
            dilations=(1, 2, 3),
        ),
        (2, 6, 5, 4),
    ),
    "gemm": (layer("gemm", (4, 7, 1, 1)), (7,)),
    "matmul": (layer("matmul", (4, 7, 1, 1)), (7,)),
    "batched matmul": (layer("matmul", (4, 7, 1, 1), positions=6), (2, 3, 7)),
    "map": (layer("map", (4, 2, 3, 4), (3, 4)), (2, 3, 4)),
}


def data(name: str, examples: int = EXAMPLES, seed: int = 1) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((examples, *LAYERS[name][1])) + 0.5).astype(np.float32)


def brute_force(own: Layer, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Patches `(n, positions, D)`, element by element from the definition of Conv."""
    if own.kind in ("gemm", "matmul"):
        return tensor.reshape(len(tensor), -1, tensor.shape[-1])
    image = tensor.reshape(*tensor.shape, 1) if own.kind == "conv1d" else tensor
    geometry, (channels, *size) = own.geometry, image.shape[1:]
    begins = geometry.pads[: len(size)]
    target = geometry.output_size(*size)
    result = np.zeros((len(image), math.prod(target), channels, *geometry.kernel), np.float32)
    for index, place in enumerate(np.ndindex(*target)):
        for tap in np.ndindex(*geometry.kernel):
            steps = zip(place, geometry.strides, tap, geometry.dilations, begins, strict=True)
            source = [p * stride + t * dilation - begin for p, stride, t, dilation, begin in steps]
            if all(0 <= at < n for at, n in zip(source, size, strict=True)):
                result[(slice(None), index, slice(None), *tap)] = image[(slice(None), slice(None), *source)]
    return result.reshape(len(image), len(result[0]), -1)


def everywhere(own: Layer, examples: int = EXAMPLES) -> NDArray[np.int64]:
    return np.tile(np.arange(own.positions), (examples, 1))


def sigma(moments: Moments) -> NDArray[np.float64]:
    return np.asarray(moments.matrix(), np.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_patches_are_what_the_layer_multiplies(name: str) -> None:
    own, tensor = LAYERS[name][0], data(name)
    wanted = brute_force(own, tensor)
    assert wanted.shape[1] == own.positions
    got = patches(own, own.geometry, tensor, everywhere(own))
    np.testing.assert_array_equal(got, wanted.reshape(-1, wanted.shape[-1]))
    positions = sample_positions(own, EXAMPLES, 3, seed=4)
    picked = patches(own, own.geometry, tensor, positions).reshape(EXAMPLES, -1, wanted.shape[-1])
    np.testing.assert_array_equal(picked, np.take_along_axis(wanted, positions[..., None], axis=1))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_stand_beside_their_patches(name: str) -> None:
    own, tensor = LAYERS[name][0], data(name)
    rows = brute_force(own, tensor) @ own.weight.reshape(len(own.weight), -1).T + own.bias
    if own.kind in ("conv1d", "conv2d", "conv3d"):
        y = rows.transpose(0, 2, 1)
        if own.kind != "conv1d":
            y = y.reshape(*y.shape[:2], *own.geometry.output_size(*tensor.shape[2:]))
    else:
        y = rows.reshape(EXAMPLES, *tensor.shape[1:-1], -1) if own.kind == "matmul" else rows.reshape(EXAMPLES, -1)
    positions = sample_positions(own, EXAMPLES, 4, seed=2)
    wanted = np.take_along_axis(rows, positions[..., None], axis=1).reshape(-1, len(own.weight))
    np.testing.assert_array_equal(outputs_at(own, y, positions), wanted)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [EXAMPLES, 4, 1])
def test_moments_at_all_positions_equal_their_definition(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LAYERS[name][0]
    examples = 60 if own.positions == 1 else EXAMPLES
    tensor = data(name, examples)
    rows = brute_force(own, tensor).reshape(examples * own.positions, -1).astype(np.float64)
    monkeypatch.setattr(module, "ROWS_PER_DIMENSION", 1000)  # more rows than there are, so all must be taken
    batches = ({"x": tensor[start : start + batch]} for start in range(0, examples, batch))
    found, used = calibrate(lambda feed: [feed["x"]], ["x"], [own], batches, examples, seed=0)
    moments = found[own.name]
    assert used == examples
    assert moments.count == len(rows)
    centred = rows - rows.mean(axis=0)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(sigma(moments), centred.T @ centred / len(rows), atol=2e-5)


def test_sampled_moments_come_near_those_of_all_positions() -> None:
    own = layer("conv2d", (4, 1, 2, 2), (20, 20))
    tensor = np.random.default_rng(0).standard_normal((400, 1, 20, 20)).astype(np.float32).cumsum(axis=3) / 4
    rows = np.concatenate([patches(own, own.geometry, tensor, everywhere(own, 400))])
    found, _ = calibrate(lambda feed: [feed["x"]], ["x"], [own], [{"x": tensor}], 400, seed=0)
    moments = found[own.name]
    assert 5 * 4 <= moments.count < 0.1 * len(rows)
    wanted = np.cov(rows.T, bias=True)
    assert np.linalg.norm(sigma(moments) - wanted) < 0.25 * np.linalg.norm(wanted)


@pytest.mark.parametrize("per_example", [1, 2, 5, 1000])
def test_positions_are_in_range_without_repeats_and_reproducible(per_example: int) -> None:
    own = layer("conv2d", (4, 2, 3, 3), (7, 8))
    drawn = sample_positions(own, 50, per_example, seed=3)
    assert drawn.shape == (50, min(per_example, own.positions))
    assert drawn.min() >= 0
    assert drawn.max() < own.positions
    assert all(len(set(row)) == len(row) for row in drawn.tolist())
    np.testing.assert_array_equal(drawn, sample_positions(own, 50, per_example, seed=3))
    if per_example < own.positions:
        assert not np.array_equal(drawn, sample_positions(own, 50, per_example, seed=4))
        assert not np.array_equal(drawn, sample_positions(replace(own, name="other"), 50, per_example, seed=3))


@pytest.mark.parametrize("per_example", [1, 3])
def test_every_position_is_drawn_equally_often(per_example: int) -> None:
    own = layer("conv2d", (4, 2, 3, 3), (5, 6))
    counts = np.bincount(sample_positions(own, 6000, per_example, seed=0).reshape(-1), minlength=own.positions)
    expected = 6000 * per_example / own.positions
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_images_needed_gives_five_rows_a_dimension_within_bounds() -> None:
    wide = layer("conv2d", (4, 64, 3, 3), (6, 6))
    assert images_needed([wide]) == IMAGES[0]
    gemm = layer("gemm", (4, 1000, 1, 1))
    assert images_needed([wide, gemm]) == 5000
    assert images_needed([layer("gemm", (4, 9000, 1, 1))]) == IMAGES[1]
    assert images_needed([]) == IMAGES[0]


def test_calibration_stops_when_enough_is_seen_or_time_is_up() -> None:
    own = LAYERS["gemm"][0]
    runs: list[int] = []

    def run(feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        runs.append(len(feed["x"]))
        return [feed["x"]]

    told: list[int] = []
    batches = [{"x": data("gemm", 5, seed)} for seed in range(10)]
    _, used = calibrate(run, ["x"], [own], batches, 12, seed=0, progress=told.append)
    assert (used, runs, told) == (15, [5, 5, 5], [5, 10, 15])
    _, used = calibrate(run, ["x"], [own], batches, 50, seed=0, deadline=0.0)
    assert used == 5


def test_layers_that_read_the_same_tensor_share_a_run() -> None:
    first, second = LAYERS["gemm"][0], replace(LAYERS["matmul"][0], name="second")
    x = data("gemm", 40)
    found, _ = calibrate(lambda feed: [feed["x"]], ["x"], [first, second], [{"x": x}], 40, seed=0)
    np.testing.assert_allclose(found[first.name].mean, x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["second"].mean, x.mean(axis=0), atol=1e-6)


def test_values_that_are_not_finite_are_refused() -> None:
    x = data("gemm", 40)
    x[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        calibrate(lambda feed: [feed["x"]], ["x"], [LAYERS["gemm"][0]], [{"x": x}], 40, seed=0)
