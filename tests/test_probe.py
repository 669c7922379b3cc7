"""The probe: the original's answers kept beside the inputs, and how far another network is from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxneutrino import probe as module
from onnxneutrino.data_values import Batch, IndexedSplit
from onnxneutrino.factors import Stage
from onnxneutrino.losses import Loss
from onnxneutrino.plan import Geometry, Layer
from onnxneutrino.probe import divergence, features_at, probe_batches, take_probe

CLASSES, VALUES = Loss("classes", ("y",)), Loss("values", ("y", "z"))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv(name: str = "conv", outputs: int = 5) -> Layer:
    geometry = Geometry((3, 3), (2, 1), (1, 0, 1, 2))
    return Layer(
        name,
        "Conv",
        "conv2d",
        "x",
        f"{name}/y",
        (name,),
        normal(outputs, 2, 3, 3),
        normal(outputs),
        geometry,
        (7, 6),
        24,
        (outputs, 2, 3, 3),
    )


def split(rows: NDArray[Any]) -> IndexedSplit:
    return IndexedSplit(lambda chosen, generator: {"x": rows[chosen]}, None, np.arange(len(rows)))


def output_of(layer: Layer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Conv by its definition."""
    height, width = layer.geometry.output_size(*x.shape[2:])
    top, left, bottom, right = layer.geometry.pads
    image = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    y = np.zeros((len(x), len(layer.weight), height, width), np.float32)
    for i in range(height):
        for j in range(width):
            patch = image[:, :, 2 * i : 2 * i + 3, j : j + 3]
            y[:, :, i, j] = np.einsum("ncab,ocab->no", patch, layer.weight) + layer.bias
    return y


def test_the_layer_applied_to_its_features_gives_its_targets() -> None:
    layers = [conv("one"), conv("two", 3)]
    batches = [{"x": normal(size, 2, 7, 6, seed=size)} for size in (8, 8, 3)]
    probe = take_probe(
        batches,
        layers,
        ["sums"],
        lambda feed: {
            "sums": feed["x"].sum(axis=(1, 2, 3)),
            **{layer.output: output_of(layer, feed["x"]) for layer in layers},
        },
        seed=0,
    )
    assert [len(outputs[0]) for outputs in probe.outputs] == [8, 8, 3]
    for layer in layers:
        features = features_at(probe, layer, (Stage(layer.weight),), lambda feed: [feed["x"]])
        assert features.shape == (19 * layer.positions, 18)
        made = features @ layer.weight.reshape(len(layer.weight), -1).T + layer.bias
        np.testing.assert_allclose(made, probe.targets[layer.name], atol=1e-5)
        assert probe.targets[layer.name].dtype == np.float32


def test_positions_are_limited_differ_and_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFIT_ROWS", 60)
    layer = conv()

    def take(seed: int) -> list[NDArray[np.int64]]:
        batches = [{"x": normal(10, 2, 7, 6, seed=index)} for index in range(2)]
        probe = take_probe(batches, [layer], ["x"], lambda f: {**f, layer.output: output_of(layer, f["x"])}, seed)
        assert len(probe.targets[layer.name]) == 60
        return list(probe.positions[layer.name])

    first, again, other = take(1), take(1), take(2)
    assert [p.shape for p in first] == [(10, 3), (10, 3)]
    assert not np.array_equal(first[0], first[1])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(("images", "expected"), [(None, 2048), (10, 16), (16, 16), (1, 8)])
def test_probe_batches_take_what_is_asked_in_whole_batches(images: int | None, expected: int) -> None:
    rows = np.arange(3000, dtype=np.float32)[:, None]
    taken = probe_batches(split(rows), 8, seed=0, images=images)
    values = np.concatenate([batch["x"] for batch in taken]).reshape(-1)
    assert len(values) == len(set(values.tolist())) == expected
    assert not np.array_equal(values, np.sort(values))
    again = probe_batches(split(rows), 8, seed=0, images=images)
    np.testing.assert_array_equal(values, np.concatenate([batch["x"] for batch in again]).reshape(-1))


def test_large_inputs_are_fewer_and_a_small_split_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(400, 256)
    monkeypatch.setattr(module, "PROBE_BYTES", 100 * rows[0].nbytes)
    assert sum(len(batch["x"]) for batch in probe_batches(split(rows), 10, seed=0)) == 100
    monkeypatch.setattr(module, "PROBE_BYTES", 1)
    assert sum(len(batch["x"]) for batch in probe_batches(split(rows), 8, seed=0)) == 64
    assert sum(len(batch["x"]) for batch in probe_batches(split(rows[:30]), 8, seed=0)) == 30


def test_the_probe_is_augmented() -> None:
    @dataclass(frozen=True)
    class Noted:
        labelled = False
        seen: list[Mapping[str, Any]]

        def __len__(self) -> int:
            return 4

        def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
            self.seen.append({"size": size, "seed": seed, "augment": augment})
            yield Batch({"x": normal(4, 2)}, None)

        def subset(self, indices: NDArray[np.int64]) -> Noted:
            return self

    noted = Noted([])
    probe_batches(noted, 4, seed=7)
    assert noted.seen == [{"size": 4, "seed": 7, "augment": True}]


def test_divergence_of_classes_is_kullback_leibler() -> None:
    a, b = normal(9, 4), normal(9, 4, seed=1)
    p, q = (np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(axis=1, keepdims=True) for z in (a, b))
    wanted = float(np.mean(np.sum(p * np.log(p / q), axis=1)))
    assert divergence(CLASSES, [[a[:5]], [a[5:]]], [[b[:5]], [b[5:]]]) == pytest.approx(wanted, rel=1e-5)
    assert divergence(CLASSES, [[a]], [[a]]) == 0.0
    assert divergence(CLASSES, [[a]], [[a + 3]]) == pytest.approx(0.0, abs=1e-6)
    extreme = np.array([[1e4, 0.0, 0.0, 0.0]], np.float32)
    assert np.isfinite(divergence(CLASSES, [[extreme]], [[-extreme]]))


def test_divergence_of_values_is_relative_to_their_variance() -> None:
    y, z = normal(10, 4) + 5, 100 * normal(10, 3, 3, seed=1)
    noisy = [y + 0.1 * normal(10, 4, seed=2), z + normal(10, 3, 3, seed=3)]
    wanted = 0.5 * sum(np.mean((own - a) ** 2) / np.var(a) for own, a in zip(noisy, (y, z), strict=True))
    assert divergence(VALUES, [[y, z]], [noisy]) == pytest.approx(float(wanted), rel=1e-4)
    assert divergence(VALUES, [[y, z]], [[y, z]]) == 0.0
    means = [np.full_like(y, y.mean()), np.full_like(z, z.mean())]
    assert divergence(VALUES, [[y, z]], [means]) == pytest.approx(1.0, rel=1e-4)
