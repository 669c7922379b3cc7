"""Strong directions of what layers read, against eigenvectors of the whole covariance and Conv itself."""

from __future__ import annotations

import numpy as np
import pytest
from models_drawn import drawn, random

from onnxneutrino.conv_geometry import windows
from onnxneutrino.directions import RANK, CovarianceSketch, input_directions
from onnxneutrino.plan import Geometry
from onnxneutrino.runtime import Runner


def uneven_rows(dimension: int, decay: float, seed: int = 0) -> np.ndarray:
    """Rows `(4000, D)` around 1 whose standard deviations fall by `decay` from direction to direction."""
    generator = np.random.default_rng(seed)
    turned = np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]
    return generator.standard_normal((4000, dimension)) * decay ** np.arange(dimension) @ turned + 1


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("dimension", "decay"), [(3, 0.5), (40, 0.9), (200, 0.8)])
def test_directions_are_the_eigenvectors_of_the_covariance(dimension: int, decay: float, centred: bool) -> None:
    rows = uneven_rows(dimension, decay)
    sketch = CovarianceSketch(dimension, centred)
    for chunk in np.array_split(rows, 7):
        sketch.add(chunk)
    found = sketch.directions()
    assert found is not None
    moved = rows - rows.mean(axis=0) * centred
    values, vectors = np.linalg.eigh(moved.T @ moved / len(rows))
    wanted, own = values[::-1], vectors[:, ::-1]
    count = len(found.scales)
    assert 0 < count <= RANK
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(count), atol=1e-5)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0) * centred, rtol=1e-5)
    first = min(count, 10)
    np.testing.assert_allclose(np.abs(np.sum(found.vectors[:, :first] * own[:, :first], axis=0)), 1, rtol=1e-3)
    np.testing.assert_allclose((found.level / found.scales[:first]) ** 2, wanted[:first], rtol=1e-3)
    # Scaled by these, no direction varies more than the level.
    even = np.eye(dimension) + (found.vectors * (found.scales - 1)) @ found.vectors.T
    assert np.linalg.eigvalsh(even @ (moved.T @ moved / len(rows)) @ even)[-1] <= 1.05 * found.level**2


def test_rows_that_do_not_differ_or_are_not_finite_have_none() -> None:
    for rows in (np.ones((5, 3)), np.zeros((5, 3)), np.full((5, 3), np.nan)):
        sketch = CovarianceSketch(3, centred=True)
        sketch.add(rows)
        assert sketch.directions() is None


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "dilations", "pads"),
    [
        ((9,), (3,), (2,), (1,), (1, 0)),
        ((8, 7), (3, 2), (1, 2), (2, 1), (0, 1, 2, 0)),
        ((4, 5, 6), (2, 1, 3), (1, 1, 2), (1, 1, 1), (1, 0, 0, 0, 0, 1)),
    ],
)
def test_windows_times_a_weight_are_the_outputs_of_a_conv(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
) -> None:
    shapes = ("N,3," + ",".join(map(str, size)), "4,3," + ",".join(map(str, kernel)))
    model = drawn(
        f"net (float[{shapes[0]}] x) => (float[N,4,{','.join('A' * len(size))}] y) <float[{shapes[1]}] w> "
        f"{{ y = Conv <strides = {list(strides)}, dilations = {list(dilations)}, pads = {list(pads)}> (x, w) }}"
    )
    x, w = random(2, 3, *size), np.asarray(Runner(model, ["w"])({"x": random(2, 3, *size)})[0])
    wanted = Runner(model)({"x": x})[0]
    positions = np.stack([np.random.default_rng(seed).permutation(wanted[0, 0].size) for seed in range(2)])
    rows = windows(Geometry(kernel, strides, pads, dilations), x, positions)
    found = (rows @ w.reshape(4, -1).T).reshape(2, -1, 4)
    for image in range(2):
        flat = wanted[image].reshape(4, -1).T[positions[image]]
        np.testing.assert_allclose(found[image], flat, rtol=1e-4, atol=1e-5)


def test_a_weight_that_two_nodes_read_and_a_grouped_one_have_none() -> None:
    model = drawn(
        "net (float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4,4] v> "
        "{ a = MatMul (x, w) b = MatMul (a, w) y = Gemm <transA = 1> (b, v) }"
    )
    assert input_directions(model, ["w", "v"], [{"x": random(4, 4)}], 1) == {}
    grouped = drawn("net (float[N,4,5] x) => (float[N,4,5] y) <float[4,2,1] w> { y = Conv <group = 2> (x, w) }")
    assert input_directions(grouped, ["w"], [{"x": random(4, 4, 5)}], 1) == {}
