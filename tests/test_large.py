"""Models whose weights stay in their file: the same results, and memory for one copy at most."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from onnxneutrino import cost, graph, weights
from onnxneutrino.errors import ModelError
from onnxneutrino.normalize import normalize
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Layer
from onnxneutrino.prepare import types_of
from onnxneutrino.runtime import Runner

WIDTH = 128
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
net (float[N, 8, 4, 4] x) => (float[N, 128] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, kernel)
    b = BatchNormalization (c, gamma, beta, mean, variance)
    r = Relu (b)
    f = Flatten (r)
    h = Gemm <transB = 1> (f, w1)
    t = Transpose (w2)
    y = MatMul (h, t)
}
"""


def big() -> ModelProto:
    """A net with two large weights, one of which the runtime folds a Transpose into, and a foldable Conv."""
    model = onnx.parser.parse_model(TEXT)
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"kernel": (256, 8, 3, 3), "w1": (WIDTH, 4096), "w2": (WIDTH, WIDTH)}
    shapes |= dict.fromkeys(("gamma", "beta", "mean", "variance"), (256,))
    for name, shape in shapes.items():
        value = generator.uniform(0.5, 1.5, shape) if len(shape) == 1 else generator.standard_normal(shape) / 20
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The net as a file with external data, and every model of a megabyte counting as large."""
    monkeypatch.setattr(weights, "LARGE_MODEL_BYTES", 2**20)
    monkeypatch.setattr("onnxneutrino.normalize.LARGE_MODEL_BYTES", 2**20)
    path = tmp_path / "big.onnx"
    onnx.save(big(), path, save_as_external_data=True, location="big.data", size_threshold=100)
    return path


def inputs() -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(1).standard_normal((3, 8, 4, 4)).astype(np.float32)}


def test_load_leaves_large_weights_in_the_file(stored: Path) -> None:
    model = graph.load(stored).model
    assert {tensor.name for tensor in weights.light_tensors(model)} == {"kernel", "w1", "w2"}
    assert model.ByteSize() < 10_000
    assert graph.data_bytes(model) == pytest.approx(graph.data_bytes(big()), abs=1000)
    wanted = graph.arrays(big())
    for name, value in graph.arrays(model).items():
        np.testing.assert_array_equal(value, wanted[name])
        assert weights.is_mapped(value) == (value.nbytes >= weights.LARGE_TENSOR_BYTES)
        if weights.is_mapped(value):
            assert not value.flags.writeable
    graph.check(model, "big.onnx")


def test_readers_share_one_map(stored: Path) -> None:
    one, other = (graph.arrays(graph.load(stored).model)["w1"] for _ in range(2))
    assert np.shares_memory(one, other)


def test_costs_and_shapes_are_those_of_the_model_in_memory(stored: Path) -> None:
    light, whole = graph.load(stored).model, big()
    types = types_of(light, {"x": (1, 8, 4, 4)})
    assert types == types_of(whole, {"x": (1, 8, 4, 4)})
    assert cost.params(light) == cost.params(whole)
    assert cost.macs(light, types) == cost.macs(whole, types)
    assert cost.memory_bytes(light, types) == cost.memory_bytes(whole, types)


@pytest.mark.parametrize("tensors", [None, ["r", "h"]])
def test_runs_like_the_model_in_memory(
    stored: Path, monkeypatch: pytest.MonkeyPatch, tensors: list[str] | None
) -> None:
    light = graph.load(stored).model
    found = Runner(light, tensors)(inputs())
    spilled = Runner(big(), tensors)(inputs())
    monkeypatch.setattr(weights, "LARGE_MODEL_BYTES", 2**40)
    for own, other, wanted in zip(found, spilled, Runner(big(), tensors)(inputs()), strict=True):
        np.testing.assert_array_equal(own, other)
        np.testing.assert_allclose(np.asarray(own, float), np.asarray(wanted, float), rtol=1e-4, atol=1e-4)


def test_runs_after_its_temporary_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE_MODEL_BYTES", 2**20)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runner = Runner(big())
    assert not list(tmp_path.iterdir())
    assert np.isfinite(runner(inputs())[0]).all()


def test_normalize_folds_and_skips_the_slimmer(stored: Path) -> None:
    light = graph.load(stored).model
    normal, notes = normalize(light, [inputs()], lambda model, sample: Runner(model)(sample))
    assert any(note.startswith("slim skipped: it would copy 2 MB") for note in notes)
    assert "BatchNormalization" not in {node.op_type for node in normal.graph.node}
    assert "w1" in {tensor.name for tensor in weights.light_tensors(normal)}


def test_layers_read_their_weights_from_the_file(stored: Path) -> None:
    light = graph.load(stored).model
    types = types_of(light, {"x": (1, 8, 4, 4)})
    found = {layer.name: layer for layer in find_layers(light, types) if isinstance(layer, Layer)}
    wanted = {layer.name: layer for layer in find_layers(big_named(), types) if isinstance(layer, Layer)}
    assert found.keys() == wanted.keys()
    assert len(found) == 2
    for name, layer in found.items():
        np.testing.assert_array_equal(layer.weight, wanted[name].weight)
        assert weights.is_mapped(layer.weight)


def big_named() -> ModelProto:
    model = big()
    graph.name_nodes(model.graph)
    return model


@pytest.mark.parametrize("external", [False, True])
def test_save_writes_every_tensor_from_its_file(stored: Path, external: bool) -> None:
    given = graph.load(stored)
    path = stored.with_name("out.onnx")
    graph.save(given.model, path, external)
    raw = stored.with_name("raw.onnx")
    graph.save(big_named(), raw, external)
    own, other = (sorted(path.parent.glob(f"{name}*.data")) for name in ("out.onnx", "raw.onnx"))
    assert [file.read_bytes() for file in own] == [file.read_bytes() for file in other]
    assert len(own) == int(external)
    onnx.checker.check_model(path, full_check=True)
    wanted = graph.arrays(big())
    for name, value in graph.arrays(onnx.load(path)).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_save_copies_no_more_than_a_tensor(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    kept = weights._raw

    def watched(tensor: onnx.TensorProto) -> bytes | memoryview | None:
        data = kept(tensor)
        sizes.append(sys.getsizeof(data))
        return data

    monkeypatch.setattr(weights, "_raw", watched)
    graph.save(graph.load(stored).model, stored.with_name("out.onnx"), True)
    assert len(sizes) == 7
    assert max(sizes) < 2000  # views of the map, not the 2 MB of w1


def test_replaced_weights_leave_the_file(stored: Path) -> None:
    light = graph.load(stored).model
    value = np.zeros((WIDTH, WIDTH), np.float32)
    changed = graph.with_arrays(light, {"w2": value})
    assert {tensor.name for tensor in weights.light_tensors(changed)} == {"kernel", "w1"}
    assert not Runner(changed)(inputs())[0].any()


def test_convert_opset_keeps_weights_in_the_file(stored: Path) -> None:
    light = graph.load(stored).model
    newer = graph.convert_opset(light, 20)
    assert graph.opset(newer) == 20
    assert [value.name for value in newer.graph.input] == ["x"]
    np.testing.assert_array_equal(Runner(newer)(inputs())[0], Runner(light)(inputs())[0])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "../big.data", "cannot be read"),
        ("length", "2000000", "is not 2097152 bytes long"),
        ("offset", "99999999", "ends before"),
    ],
)
def test_load_refuses_data_that_does_not_fit(stored: Path, key: str, value: str, words: str) -> None:
    model = onnx.load(stored, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    if key == "location":
        (stored.parent.parent / "big.data").write_bytes(stored.with_name("big.data").read_bytes())
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    stored.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=words):
        graph.load(stored)


def test_load_refuses_an_absolute_location(stored: Path) -> None:
    model = onnx.load(stored, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(stored.with_name("big.data"))
    stored.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="absolute location"):
        graph.load(stored)


def test_check_finds_nan_in_a_file(stored: Path) -> None:
    values = np.fromfile(stored.with_name("big.data"), np.float32)
    values[-1] = np.nan
    values.tofile(stored.with_name("big.data"))
    with pytest.raises(ModelError, match="holds NaN"):
        graph.check(graph.load(stored).model, "big.onnx")


def test_stored_bytes_are_those_of_the_file(stored: Path) -> None:
    assert weights.stored_bytes(graph.load(stored).model) == pytest.approx(cost.size_bytes(stored), abs=2000)
    assert weights.stored_bytes(big()) == pytest.approx(len(big().SerializeToString()), abs=200)
