"""Weights behind layout, cast and dequantization become initializers; everything else stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxneutrino.graph import arrays
from onnxneutrino.normalize import normalize
from onnxneutrino.passes import NORMALIZE, fold_constants, slim
from onnxneutrino.passes.fold_constants import MADE_FLOAT
from onnxneutrino.runtime import Runner

RNG = np.random.default_rng(0)
W = RNG.standard_normal((24, 64)).astype(np.float32)
X = RNG.standard_normal((5, 24)).astype(np.float32)


def build(body: str, opset: int = 21, ir: int = 10, outputs: Sequence[str] = ("y",), **weights: NDArray) -> ModelProto:
    declared = ", ".join(f"float[N, M{index}] {name}" for index, name in enumerate(outputs))
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    model = parser.parse_model(f"{head} g (float[N, 24] x) => ({declared}) {{ {body} }}")
    for name, value in weights.items():
        tensor = numpy_helper.from_array(value, name)
        model.graph.initializer.append(tensor)
        if ir < 4:
            model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return model


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def packed(values: NDArray, name: str, kind: int) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())


LAYOUTS = {
    "transpose": ("v = Transpose <perm = [1, 0]> (w)", {"w": W.T}),
    "reshape": ("v = Reshape (w, s)", {"w": W.reshape(4, 6, 64), "s": np.array([24, -1])}),
    "flatten": ("v = Flatten <axis = 2> (w)", {"w": W.reshape(4, 6, 64)}),
    "identity": ("v = Identity (w)", {"w": W}),
    "squeeze": ("v = Squeeze (w, a)", {"w": W[None], "a": np.array([0])}),
    "chain": (
        "u = Unsqueeze (w, a) t = Transpose <perm = [0, 2, 1]> (u) v = Reshape (t, s)",
        {"w": W.T, "a": np.array([0]), "s": np.array([24, 64])},
    ),
    "cast": ("v = Cast <to = 1> (w)", {"w": W.astype(np.float16)}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_and_cast(case: str) -> None:
    body, weights = LAYOUTS[case]
    model = build(f"{body} y = MatMul (x, v)", **weights)
    folded, notes = fold_constants.run(model)
    assert ops(folded) == ["MatMul"]
    assert set(arrays(folded)) == {"v"}
    np.testing.assert_array_equal(arrays(folded)["v"], W.astype(weights["w"].dtype))
    np.testing.assert_array_equal(Runner(folded)({"x": X})[0], Runner(model)({"x": X})[0])
    assert (MADE_FLOAT.format("float32") in notes) == (case == "cast")


@pytest.mark.parametrize("opset", [9, 11])
def test_axes_as_attributes_and_old_ir(opset: int) -> None:
    """Below IR 4 the new initializer is an input too, and its source is none any more."""
    body = "u = Squeeze <axes = [0]> (w) v = Transpose <perm = [1, 0]> (u) y = MatMul (x, v)"
    model = build(body, opset=opset, ir=3, w=W.T[None])
    folded, _ = fold_constants.run(model)
    onnx.checker.check_model(folded)
    assert [value.name for value in folded.graph.input] == ["x", "v"]
    np.testing.assert_array_equal(Runner(folded)({"x": X})[0], Runner(model)({"x": X})[0])


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_every_opset(opset: int) -> None:
    squeeze = "u = Squeeze <axes = [0]> (w)" if opset < 13 else "u = Squeeze (w, a)"
    unsqueeze = "r = Unsqueeze <axes = [1]> (t)" if opset < 13 else "r = Unsqueeze (t, b)"
    extra = {} if opset < 13 else {"a": np.array([0]), "b": np.array([1])}
    body = f"""{squeeze} t = Transpose (u) {unsqueeze} i = Identity (r) f = Flatten (i) c = Cast <to = 1> (f)
    v = Reshape (c, s) y = MatMul (x, v)"""
    stored, shape = W.T[None].astype(np.float16), np.array([24, -1])
    folded, _ = fold_constants.run(build(body, opset=opset, ir=8, w=stored, s=shape, **extra))
    assert ops(folded) == ["MatMul"]
    np.testing.assert_array_equal(arrays(folded)["v"], W.astype(np.float16))


def test_constant_nodes() -> None:
    model = build("v = Transpose (w) y = MatMul (x, v)")
    constant = helper.make_node("Constant", [], ["w"], "w", value=numpy_helper.from_array(W.T.copy()))
    model.graph.node.insert(0, constant)
    folded, _ = fold_constants.run(model)
    assert ops(folded) == ["MatMul"]
    np.testing.assert_array_equal(arrays(folded)["v"], W)


@pytest.mark.parametrize("kind", ["tensor", "axis", "block", "int4", "half"])
def test_dequantize(kind: str) -> None:
    """`(q - zero point) · scale`, the scale of one element repeated over its axis or block."""
    stored = RNG.integers(-7, 8, W.shape)
    shape = {"axis": (64,), "block": (3, 64)}.get(kind, ())
    scale = RNG.uniform(0.01, 0.1, shape).astype(np.float16 if kind == "half" else np.float32)
    zero = RNG.integers(-7, 8, shape)
    attributes = {"axis": {"axis": 1}, "block": {"axis": 0, "block_size": 8}}.get(kind, {})
    model = build("y = MatMul (x, f)")
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"], "dq", **attributes)]
    nodes.append(helper.make_node("Cast", ["v"], ["f"], "cast", to=TensorProto.FLOAT))
    model.graph.node.insert(0, nodes[1])
    model.graph.node.insert(0, nodes[0])
    element = TensorProto.INT4 if kind == "int4" else TensorProto.INT8
    model.graph.initializer.extend([packed(stored, "q", element), packed(zero, "z", element)])
    model.graph.initializer.append(numpy_helper.from_array(scale, "s"))
    onnx.checker.check_model(model)
    folded, notes = fold_constants.run(model)
    assert ops(folded) == ["MatMul"]
    assert set(arrays(folded)) == {"f"}
    wide_scale, wide_zero = (np.repeat(a, 8, axis=0) if kind == "block" else a for a in (scale, zero))
    wanted = ((stored - wide_zero) * wide_scale.astype(np.float32)).astype(scale.dtype)
    np.testing.assert_allclose(arrays(folded)["f"], wanted, rtol=2e-3 if kind == "half" else 1e-6)
    np.testing.assert_allclose(Runner(folded)({"x": X})[0], Runner(model)({"x": X})[0], rtol=1e-4, atol=1e-4)
    assert notes[0] == "DequantizeLinear dq folded into weights"
    assert any("the output holds them as float" in note for note in notes)


def test_what_stays() -> None:
    """An activation, a graph output, a copy of a weight that others read, a larger tensor, another type."""
    body = """
    t = Transpose (x) a = Transpose (t)
    o = Transpose (small)
    v = Transpose (shared) h = MatMul (a, v) g = MatMul (h, shared)
    e = Expand (row, size) i = Add (g, e)
    d = Cast <to = 11> (row) f = Cast <to = 1> (d) y = Add (i, f)
    """
    weights = {
        "small": np.eye(2, dtype=np.float32),
        "shared": RNG.standard_normal((64, 24)).astype(np.float32),
        "row": np.ones((1, 24), np.float32),
        "size": np.array([5, 24]),
    }
    model = build(body, outputs=("y", "o"), **weights)
    folded, notes = fold_constants.run(model)
    assert notes == []
    assert folded == model


def test_a_subgraph_reads_the_folded_weight() -> None:
    body = """
    v = Transpose (w)
    y = If (c) <
        then_branch = yes () => (float[N, 64] p) { p = MatMul (x, v) },
        else_branch = no () => (float[N, 64] q) { z = MatMul (x, v) q = Neg (z) }
    >
    """
    model = build(body, w=W.T.copy(), c=np.array(True))
    folded, _ = fold_constants.run(model)
    onnx.checker.check_model(folded)
    assert ops(folded) == ["If"]
    np.testing.assert_array_equal(Runner(folded)({"x": X})[0], Runner(model)({"x": X})[0])


def test_normalize_folds_where_onnxslim_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: ModelProto) -> tuple[ModelProto, list[str]]:
        raise RuntimeError("no")

    model = build("v = Transpose (w) y = MatMul (x, v)", w=W.T.copy())
    steps = tuple(fails if step is slim.run else step for step in NORMALIZE)
    monkeypatch.setattr("onnxneutrino.normalize.NORMALIZE", steps)
    current, notes = normalize(model, [{"x": X}], lambda graph, sample: Runner(graph)(sample))
    assert ops(current) == ["MatMul"]
    assert any("folded into weights" in note for note in notes)
    assert any("undone: no" in note for note in notes)
