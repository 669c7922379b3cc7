"""Inference: outputs by name, errors in one line, drawn inputs, seen types, latencies."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from onnxneutrino import runtime
from onnxneutrino.errors import ModelError
from onnxneutrino.graph import tensor_types
from onnxneutrino.runtime import (
    LEAST_TURNS,
    MOST_TURNS,
    WARM_UPS,
    Runner,
    first_line,
    latencies,
    observed_types,
    random_inputs,
    runtime_conflict,
    zero_inputs,
)

NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3] x, int64[N] k) => (float[N,3] y, int64[N] l)
    { a = Mul (x, x)  b = Relu (a)  y = Add (b, x)  l = Add (k, k) }
"""
X = np.array([[1, -2, 3]], np.float32)
K = np.array([5])


def test_outputs_come_in_the_order_of_names() -> None:
    runner = Runner(parse_model(NET), threads=1)
    assert (runner.names, runner.inputs) == (["y", "l"], ["x", "k"])
    y, doubled = runner({"k": K, "x": X})
    np.testing.assert_array_equal(y, [[2, 2, 12]])
    np.testing.assert_array_equal(doubled, [10])


def test_inner_tensors_can_be_asked_for_and_need_only_their_own_inputs() -> None:
    runner = Runner(parse_model(NET), ["b", "a"])
    assert runner.names == ["b", "a"]
    assert runner.inputs == ["x"]
    np.testing.assert_array_equal(runner({"x": X})[1], [[1, 4, 9]])


def test_a_path_runs_as_its_model(tmp_path: Path) -> None:
    onnx.save(parse_model(NET), tmp_path / "net.onnx")
    from_path, from_model = (Runner(source)({"x": X, "k": K}) for source in (tmp_path / "net.onnx", parse_model(NET)))
    for a, b in zip(from_path, from_model, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": X}, "no value for the model's input 'k'"),
        ({"x": X[:, :2], "k": K}, "cannot run the model"),
        ({"x": X.astype(np.float64), "k": K}, "cannot run the model"),
    ],
)
def test_wrong_inputs_are_one_line(inputs: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        Runner(parse_model(NET))(inputs)
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_a_model_the_runtime_does_not_know_is_one_line() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[2] y) { y = NoSuchOperator (x) }'
    with pytest.raises(ModelError, match=r"cannot load the model.*NoSuchOperator") as caught:
        Runner(parse_model(text))
    assert "\n" not in str(caught.value)


def test_a_newer_ir_version_than_the_runtime_reads_is_capped() -> None:
    model = parse_model(NET)
    model.ir_version = 12
    np.testing.assert_array_equal(Runner(model)({"x": X, "k": K})[1], [10])
    assert model.ir_version == 12


def test_first_line_leaves_the_runtimes_code_out() -> None:
    assert first_line(ValueError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : what : is wrong\nmore")) == (
        "what : is wrong"
    )
    assert first_line(KeyError()) == "KeyError"


def test_drawn_inputs_have_the_models_types() -> None:
    model = parse_model(NET)
    shapes = {"x": (400, 3), "k": (400,)}
    zeros, drawn, again = zero_inputs(model, shapes), random_inputs(model, shapes, 1), random_inputs(model, shapes, 1)
    for name, dtype in (("x", np.float32), ("k", np.int64)):
        assert zeros[name].dtype == drawn[name].dtype == dtype
        assert zeros[name].shape == drawn[name].shape == shapes[name]
        assert not zeros[name].any()
        np.testing.assert_array_equal(drawn[name], again[name])
    assert float(drawn["x"].std()) == pytest.approx(1, abs=0.1)
    assert set(np.unique(drawn["k"])) == {0, 1}
    assert not np.array_equal(drawn["x"], random_inputs(model, shapes, 2)["x"])


def test_types_that_inference_cannot_know_are_seen_by_running() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,4] x) => (float[A,B] y)
        {
            t = Cast <to = 7> (x)
            s = ReduceMax <axes = [0], keepdims = 0> (t)
            e = Constant <value = int64[4] {2,1,1,1}> ()
            r = Add (s, e)
            v = Expand (x, r)
            u = Relu (v)
            w = Flatten (u)
            y = Relu (w)
        }
    """
    model = parse_model(text)
    known = tensor_types(model, {"x": (1, 4)})
    assert "v" not in known
    types = observed_types(model, known, {"x": (1, 4)})
    assert types["v"].shape == (2, 1, 1, 4)
    assert types["y"].shape == (2, 4)
    assert types["t"].dtype == np.int64
    assert {name: types[name] for name in known} == known


def test_latencies_alternate_after_the_warm_up() -> None:
    calls: list[str] = []

    class Noted(Runner):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, inputs: object) -> list[np.ndarray]:
            calls.append(self.name)
            return []

    times, repeats = latencies([Noted("a"), Noted("b")], [{}, {}], seconds=0.0)
    assert repeats == LEAST_TURNS
    assert calls == ["a"] * WARM_UPS + ["b"] * WARM_UPS + ["a", "b"] * LEAST_TURNS
    assert all(0 <= time < 1000 for time in times)
    assert latencies([Noted("a")], [{}], seconds=60.0)[1] == MOST_TURNS


def test_latency_is_the_median_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.cumsum([0.0] + [0.0, 0.25] * 2 + [0.0, 9.0] + [0.0] + [0.0, 0.25] * 4))
    monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: float(next(clock, 1e9))))

    class Quick(Runner):
        def __init__(self) -> None: ...

        def __call__(self, inputs: object) -> list[np.ndarray]:
            return []

    assert latencies([Quick()], [{}], seconds=0.0) == ([250.0], LEAST_TURNS)


@pytest.mark.parametrize("rival", ["onnxruntime", "onnxruntime-gpu", "onnxruntime-training"])
def test_a_second_runtime_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, rival: str) -> None:
    def version(name: str) -> str:
        if name == rival:
            return "1.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    line = runtime_conflict()
    assert line is not None
    assert line.startswith(f"{rival} is installed beside onnxruntime-training-cpu")
    assert f"pip uninstall -y {rival} onnxruntime-training-cpu" in line
    assert "\n" not in line


def test_no_second_runtime_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert runtime_conflict() is None


def test_what_the_optimizer_would_make_wrong_is_left_as_it_is() -> None:
    gemm = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[3,4] x, float[4,5] w) => (float[3,5] y)
        { a = Gemm (x, w)  y = Transpose <perm = [0,1]> (a) }"""
    )
    feed = {
        name: np.random.default_rng(0).standard_normal(s).astype(np.float32)
        for name, s in (("x", (3, 4)), ("w", (4, 5)))
    }
    np.testing.assert_allclose(Runner(gemm)(feed)[0], feed["x"] @ feed["w"], rtol=1e-5, atol=1e-6)
    pool = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[1,1,4,4] x) => (float[1,1,7,7] y)
        <int64[8] p = {0,0,2,2,0,0,2,2}>
        { a = Pad (x, p)  y = AveragePool <kernel_shape = [2,2], count_include_pad = 1> (a) }"""
    )
    (y,) = Runner(pool)({"x": np.ones((1, 1, 4, 4), np.float32)})
    assert (y[0, 0, 0, 0], y[0, 0, 1, 1], y[0, 0, 1, 2], y[0, 0, 3, 3]) == (0, 0.25, 0.5, 1)
