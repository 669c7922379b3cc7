"""Coordinates of what is trained: the same network, and steps that are alike wherever they are taken."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from models_drawn import drawn, random
from onnx import ModelProto, numpy_helper

from onnxneutrino.coordinates import COMMON, with_coordinates
from onnxneutrino.directions import Directions, input_directions
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.graph import arrays, with_arrays
from onnxneutrino.losses import Loss
from onnxneutrino.plan import Array
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

BATCH = 4
NET = """
    net (float[N,3,8,8] x) => (float[N,5] y)
    <float[6,3,3,3] w, float[6] b, float[6,1,3,3] d, float[6] zero, float[6,7] g, float[7] c, float[7,5] m, float e>
    {
        a = Conv <pads = [1,1,1,1]> (x, w, b)  r = Relu (a)
        k = Conv <group = 6, pads = [1,1,1,1]> (r, d, zero)
        p = GlobalAveragePool (k)  f = Flatten (p)  q = Gemm (f, g, c)  h = MatMul (q, m)  y = Add (h, e)
    }
"""
AXES = {"w": (1, 2, 3), "d": (1, 2, 3), "g": (0,), "m": (0,), "b": None, "c": None, "e": None}
NAMES = ["w", "b", "d", "zero", "g", "c", "m", "e"]


def uneven() -> ModelProto:
    """The network with channels of very different size in its first weight, and a bias of zeros."""
    model = drawn(NET, scaled=True)
    for tensor in model.graph.initializer:
        value = np.array(numpy_helper.to_array(tensor))
        if tensor.name == "w":
            value *= np.array([0.5, 1, 30, 1, 1, 0], np.float32)[:, None, None, None]
        if tensor.name == "zero":
            value[:] = 0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return training_copy(model, BATCH)


def seen(model: ModelProto) -> dict[str, Directions]:
    """Directions of what the layers of the network read, on random inputs around 1."""
    return input_directions(model, NAMES, ({"x": random(BATCH, 3, 8, 8, seed=seed) + 1} for seed in range(8)), 1)


def anywhere(shapes: Mapping[str, Array], seed: int = 1) -> dict[str, Array]:
    """Steps of the size of 0.02."""
    generator = np.random.default_rng(seed)
    return {name: np.asarray(0.02 * generator.standard_normal(own.shape), np.float32) for name, own in shapes.items()}


@pytest.mark.parametrize("turned", [False, True])
def test_the_network_is_the_same_bit_for_bit(turned: bool) -> None:
    model = uneven()
    made, coordinates = with_coordinates(model, NAMES, seen(model) if turned else {})
    before, after = arrays(model), arrays(made)
    assert set(coordinates.origins) == set(NAMES)
    assert not any(after[name].any() for name in NAMES)
    for name, own in coordinates.arrays({name: after[name] for name in NAMES}).items():
        np.testing.assert_array_equal(own, before[name])
    x = random(BATCH, 3, 8, 8)
    np.testing.assert_array_equal(Runner(made)({"x": x})[0], Runner(model)({"x": x})[0])


@pytest.mark.parametrize("turned", [False, True])
def test_graph_and_arrays_agree_on_what_steps_stand_for(turned: bool) -> None:
    model = uneven()
    made, coordinates = with_coordinates(model, NAMES, seen(model) if turned else {})
    steps = anywhere(coordinates.origins)
    x = {"x": random(BATCH, 3, 8, 8)}
    found, wanted = Runner(with_arrays(made, steps))(x)[0], Runner(with_arrays(model, coordinates.arrays(steps)))(x)[0]
    assert np.abs(wanted - Runner(model)(x)[0]).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_what_stands_for_a_weight_is_of_common_size() -> None:
    model = uneven()
    _, coordinates = with_coordinates(model, NAMES, {})
    for name, axes in AXES.items():
        sizes = np.sqrt(np.mean(np.square(coordinates.origins[name] / coordinates.units[name]), axis=axes))
        np.testing.assert_allclose(sizes[:5] if name == "w" else sizes, COMMON, rtol=1e-3)  # its last channel is zero
    assert coordinates.units["zero"].reshape(-1) == [1.0]
    assert coordinates.units["w"][5] > 0  # and can move


def test_turned_units_are_those_of_the_weight_that_reads_even_inputs() -> None:
    model = uneven()
    directions = seen(model)
    assert set(directions) == {"w", "g", "m"}  # not the depthwise one
    assert [directions[name].bias for name in ("w", "g", "m")] == ["b", "c", ""]
    _, coordinates = with_coordinates(model, NAMES, directions)
    for name, own in directions.items():
        value = coordinates.origins[name]
        rows = value.T if coordinates.axes[name] else value.reshape(len(value), -1)
        even = rows + ((rows @ own.vectors) * (1 / own.scales - 1)) @ own.vectors.T
        units = coordinates.units[name].reshape(-1, 1)
        sizes = np.sqrt(np.mean(np.square(even / units), axis=1))
        np.testing.assert_allclose(sizes[:5], COMMON, rtol=1e-3)
        if own.bias:
            np.testing.assert_allclose(coordinates.units[own.bias].reshape(-1), own.level * units[:, 0], rtol=1e-6)


def test_steps_of_one_size_move_outputs_alike_in_all_directions() -> None:
    """The change of a Gemm's output varies alike whichever turned input its step multiplies, and has no mean."""
    model = uneven()
    own, run = seen(model)["g"], Runner(model, ["f"])
    read = [run({"x": random(BATCH, 3, 8, 8, seed=seed) + 1})[0] for seed in range(8)]
    rows = np.concatenate(read).astype(np.float64)
    full = np.eye(rows.shape[1]) + (own.vectors * (own.scales - 1)) @ own.vectors.T
    variances = np.linalg.eigvalsh(np.cov(((rows - own.mean) @ full).T, bias=True))
    strongest = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[-1]
    assert variances.max() <= own.level**2 * 1.01
    assert strongest > 10 * own.level**2
    np.testing.assert_allclose(rows.mean(axis=0), own.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_are_those_of_the_steps(turned: bool) -> None:
    """Against a central difference of the loss along a random direction of all steps together."""
    model = uneven()
    example = Example({"x": random(BATCH, 3, 8, 8)}, [random(BATCH, 5, seed=1)], None)
    directions = seen(model) if turned else {}
    _, coordinates = with_coordinates(model, NAMES, directions)
    along = anywhere(coordinates.origins, seed=3)

    def loss(share: float) -> float:
        moved = coordinates.arrays({name: np.float32(share) * own for name, own in along.items()})
        outputs = Runner(with_arrays(model, moved))(example.inputs)[0]
        return float(np.mean(np.square(outputs - example.teacher[0], dtype=np.float64)))

    with Trainer(model, NAMES, Loss("values", ("y",)), 1, directions=directions) as trainer:
        gradients, kept = trainer.gradients(example), trainer.arrays()
    before = arrays(model)
    for name in NAMES:
        np.testing.assert_array_equal(kept[name], before[name])
    found = sum(float(np.vdot(gradients[name], own)) for name, own in along.items())
    np.testing.assert_allclose(found, (loss(0.05) - loss(-0.05)) / 0.1, rtol=2e-2)


@pytest.mark.parametrize("turned", [False, True])
def test_the_first_step_of_adam_is_the_rate_in_these_coordinates(turned: bool) -> None:
    model, rate = uneven(), 1e-3
    example = Example({"x": random(BATCH, 3, 8, 8)}, [random(BATCH, 5, seed=1)], None)
    directions = seen(model) if turned else {}
    _, coordinates = with_coordinates(model, NAMES, directions)
    with Trainer(model, NAMES, Loss("values", ("y",)), 1, directions=directions) as trainer:
        gradients = trainer.gradients(example)
        trainer.step(example, rate)
        after = trainer.arrays()
    norm = np.sqrt(sum(np.vdot(own, own) for own in gradients.values()))
    # The runtime's 1e-6 stands beside a second moment that is not yet corrected, 0.001 of the square.
    clipped = {name: own / max(norm, 1.0) for name, own in gradients.items()}
    steps = {
        name: np.asarray(-rate * own / (np.abs(own) + 1e-6 / np.sqrt(0.001)), np.float32)
        for name, own in clipped.items()
    }
    for name, wanted in coordinates.arrays(steps).items():
        change = wanted - coordinates.origins[name]
        found = after[name] - coordinates.origins[name]
        np.testing.assert_allclose(found, change, rtol=0.02, atol=2e-2 * np.abs(change).max())


def test_sgd_takes_its_steps_as_they_are() -> None:
    model = uneven()
    example = Example({"x": random(BATCH, 3, 8, 8)}, [random(BATCH, 5, seed=1)], None)
    found = []
    for directions in (None, seen(model)):
        with Trainer(model, NAMES, Loss("values", ("y",)), 1, "sgd", directions=directions) as trainer:
            trainer.step(example, 1e-3)
            found.append(trainer.arrays())
    for name in NAMES:
        np.testing.assert_array_equal(found[0][name], found[1][name])
