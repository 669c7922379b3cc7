from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxneutrino import cost
from onnxneutrino.errors import ModelError
from onnxneutrino.graph import TensorType, fixed_shapes, tensor_types
from onnxneutrino.runtime import Runner

ROOT = Path(__file__).resolve().parent.parent


def types_of(model: onnx.ModelProto) -> dict[str, TensorType]:
    return tensor_types(model, fixed_shapes(model, {}))


def model_with(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text, these initializers added."""
    model = parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> ' + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# --- params ---------------------------------------------------------------------------------------------


def test_params_count_floats_that_outputs_depend_on_once() -> None:
    model = model_with(
        """agraph (float[N, 3] x) => (float[N, 3] y) {
            k = Constant <value = float[1, 3] {1.0, 2.0, 3.0}> ()
            s = Constant <value_float: float = 2.0> ()
            a = MatMul(x, w)
            b = MatMul(a, w)
            c = Add(b, k)
            d = Mul(c, s)
            shape = Constant <value = int64[2] {-1, 3}> ()
            y = Reshape(d, shape)
            dead = MatMul(x, unread)
        }""",
        w=floats(3, 3),
        unread=floats(3, 7),
    )
    assert cost.params(model) == 9 + 3 + 1


def test_params_count_float16_and_batch_statistics() -> None:
    model = model_with(
        """agraph (float16[N, 4, 2, 2] x) => (float16[N, 4, 2, 2] y) {
            y = BatchNormalization(x, scale, bias, mean, variance)
        }""",
        **{name: np.ones(4, np.float16) for name in ("scale", "bias", "mean", "variance")},
    )
    assert cost.params(model) == 16


def test_params_of_an_initializer_that_is_an_output() -> None:
    model = model_with("agraph (float[N] x) => (float[N] y, float[5] w) { y = Relu(x) }", w=floats(5))
    assert cost.params(model) == 5


BRANCHES = """agraph (float[1, 3, 8, 8] x, bool c) => (float[1, O, H, W] y) {
    y = If (c) <
        then_branch = small () => (float[1, A, B, C] p) { p = Conv <kernel_shape = [3, 3]> (x, w) },
        else_branch = large () => (float[1, D, E, F] q) {
            k = Constant <value_floats = [1.0, 2.0]> ()
            unread = Mul(k, k)
            r = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
            q = Conv <kernel_shape = [1, 1]> (r, v)
        }
    >
}"""


def test_bodies_count_with_what_they_capture_and_an_if_its_dearer_branch() -> None:
    model = model_with(BRANCHES, w=floats(4, 3, 3, 3), v=floats(5, 4, 1, 1))
    assert cost.params(model) == 4 * 3 * 9 + 5 * 4
    small, large = 6 * 6 * 4 * 27, 8 * 8 * 4 * 27 + 8 * 8 * 5 * 4
    assert large > small
    assert cost.macs(model, types_of(model)) == large
    (node,) = cost.node_costs(model, types_of(model))
    assert (node.op, node.params, node.macs) == ("If", cost.params(model), large)


def test_a_loop_counts_one_pass_through_its_body() -> None:
    model = model_with(
        """agraph (float[1, 4] x, int64 trips, bool go) => (float[1, 4] y) {
            y = Loop (trips, go, x) <
                body = again (int64 i, bool on, float[1, 4] state) => (bool still, float[1, 4] next) {
                    still = Identity(on)
                    next = MatMul(state, w)
                }
            >
        }""",
        w=floats(4, 4),
    )
    assert cost.params(model) == 16
    assert cost.macs(model, types_of(model)) == 16


def test_memory_adds_the_largest_body_of_a_branch() -> None:
    model = model_with(BRANCHES, w=floats(4, 3, 3, 3), v=floats(5, 4, 1, 1))
    types = types_of(model) | {"y": TensorType((1, 5, 8, 8), np.dtype(np.float32))}
    outside = 3 * 64 * 4 + 1 + 5 * 64 * 4
    inside = 4 * 64 * 4 + 5 * 64 * 4
    assert cost.memory_bytes(model, types) == 4 * (4 * 27 + 20) + outside + inside


# --- MACs -----------------------------------------------------------------------------------------------


def counted_conv(x: np.ndarray, w: np.ndarray, groups: int, strides: Any, pads: Any, dilations: Any) -> Any:
    """Convolve with loops; the result and how often one product was added to a sum."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (batch, inputs, height, width), (outputs, each, kh, kw) = x.shape, w.shape
    out_height = (height - dilations[0] * (kh - 1) - 1) // strides[0] + 1
    out_width = (width - dilations[1] * (kw - 1) - 1) // strides[1] + 1
    y = np.zeros((batch, outputs, out_height, out_width))
    count = 0
    for n, o, i, j in itertools.product(*map(range, y.shape)):
        first = o // (outputs // groups) * (inputs // groups)
        for c, a, b in itertools.product(range(each), range(kh), range(kw)):
            row, column = i * strides[0] + a * dilations[0], j * strides[1] + b * dilations[1]
            y[n, o, i, j] += w[o, c, a, b] * x[n, first + c, row, column]
            count += 1
    return y, count


def counted_transpose(x: np.ndarray, w: np.ndarray, groups: int, strides: Any) -> Any:
    """Convolve transposed with loops, no padding; the result and the number of products."""
    (batch, inputs, height, width), (_, each, kh, kw) = x.shape, w.shape
    y = np.zeros((batch, each * groups, (height - 1) * strides[0] + kh, (width - 1) * strides[1] + kw))
    count = 0
    for n, c, i, j in itertools.product(*map(range, x.shape)):
        first = c // (inputs // groups) * each
        for o, a, b in itertools.product(range(each), range(kh), range(kw)):
            y[n, first + o, i * strides[0] + a, j * strides[1] + b] += x[n, c, i, j] * w[c, o, a, b]
            count += 1
    return y, count


def one_node(op: str, shapes: list[tuple[int, ...]], **attributes: Any) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model of one node with constant second input; and its output on `floats` of the first shape."""
    node = helper.make_node(op, ["x", "w"], ["y"], "node", **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shapes[0]), ("y", None))]
    graph = helper.make_graph([node], "one", values[:1], values[1:], [numpy_helper.from_array(floats(*shapes[1]), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return model, Runner(model)({"x": floats(*shapes[0])})[0]


@pytest.mark.parametrize(
    ("groups", "strides", "pads", "dilations"),
    [
        (1, (1, 1), (0, 0, 0, 0), (1, 1)),
        (1, (2, 1), (1, 0, 2, 1), (1, 2)),
        (2, (1, 1), (1, 1, 1, 1), (1, 1)),
        (4, (2, 2), (0, 1, 0, 1), (2, 1)),
    ],
)
def test_conv_macs_equal_a_loop(groups: int, strides: Any, pads: Any, dilations: Any) -> None:
    shapes = [(1, 4, 7, 6), (8, 4 // groups, 3, 2)]
    model, expected = one_node("Conv", shapes, group=groups, strides=strides, pads=pads, dilations=dilations)
    y, count = counted_conv(floats(*shapes[0]), floats(*shapes[1]), groups, strides, pads, dilations)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert cost.macs(model, types_of(model)) == count


def test_conv_1d_macs() -> None:
    model, output = one_node("Conv", [(1, 3, 20), (5, 3, 4)], strides=[2])
    assert cost.macs(model, types_of(model)) == output.size * 3 * 4


@pytest.mark.parametrize(("groups", "strides"), [(1, (1, 1)), (1, (2, 3)), (2, (2, 2))])
def test_conv_transpose_macs_equal_a_loop(groups: int, strides: Any) -> None:
    shapes = [(1, 4, 5, 3), (4, 6 // groups, 3, 2)]
    model, expected = one_node("ConvTranspose", shapes, group=groups, strides=strides)
    y, count = counted_transpose(floats(*shapes[0]), floats(*shapes[1]), groups, strides)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert cost.macs(model, types_of(model)) == count


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((1, 5), (5, 7)),
        ((1, 4, 5), (5, 7)),
        ((1, 3, 4, 5), (2, 1, 5, 6)),
        ((1, 4, 5), (5,)),
        ((2, 5), (4, 5, 3)),
    ],
)
def test_matmul_macs_equal_broadcast_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    model, expected = one_node("MatMul", [left, right])
    types = tensor_types(model, {"x": left})
    products = np.matmul(np.ones(left), np.ones(right))  # each element sums as many ones as there are products
    assert expected.shape == products.shape
    assert cost.macs(model, types) == products.sum()


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_macs(trans_a: int, trans_b: int) -> None:
    left, right = ((5, 3) if trans_a else (3, 5)), ((7, 5) if trans_b else (5, 7))
    model, expected = one_node("Gemm", [left, right], transA=trans_a, transB=trans_b)
    assert expected.shape == (3, 7)
    assert cost.macs(model, tensor_types(model, {"x": left})) == 3 * 5 * 7


def test_macs_are_at_batch_one() -> None:
    model = model_with("agraph (float[64, 5] x) => (float[64, 7] y) { y = MatMul(x, w) }", w=floats(5, 7))
    assert cost.macs(model, types_of(model)) == 35


def test_unknown_shape_names_the_node_and_the_option() -> None:
    model, _ = one_node("Conv", [(1, 3, 4, 4), (2, 3, 1, 1)])
    for measure in (cost.macs, cost.memory_bytes):
        with pytest.raises(ModelError, match=r"^Conv node: .*'y' is unknown.*--input-shape"):
            measure(model, {"x": TensorType((1, 3, 4, 4), np.dtype(np.float32))})


def test_node_costs_add_up_and_shared_params_count_at_the_first() -> None:
    model = model_with(
        "agraph (float[N, 3] x) => (float[N, 3] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }",
        w=floats(3, 3),
    )
    costs = cost.node_costs(model, types_of(model))
    assert [(node.op, node.params, node.macs, node.output_shape) for node in costs] == [
        ("MatMul", 9, 9, (1, 3)),
        ("Relu", 0, 0, (1, 3)),
        ("MatMul", 0, 9, (1, 3)),
    ]


# --- memory ---------------------------------------------------------------------------------------------


def brute_force_peak(steps: list[tuple[set[str], set[str]]], inputs: set[str], outputs: set[str], size: Any) -> int:
    """The largest sum over the steps, a tensor held while some later step or the caller still needs it."""
    alive, peak = set(inputs), 0
    for index, (_, made) in enumerate(steps):
        alive |= made
        peak = max(peak, sum(size(name) for name in alive))
        later = set().union(*(needed for needed, _ in steps[index + 1 :]), outputs)
        alive &= later
    return peak


def test_memory_equals_a_simulation() -> None:
    model = model_with(
        """agraph (float[N, 1000] x, float[N, 10] z) => (float[N, 10] y, float[N, 10] kept) {
            kept = MatMul(x, w)
            a = Concat <axis = 1> (kept, z, z)
            b = Concat <axis = 1> (a, a)
            c = ReduceSum <keepdims = 1> (b, axes)
            y = Add(c, kept)
        }""",
        w=floats(1000, 10),
        axes=np.array([1]),
    )
    widths = {"x": 1000, "z": 10, "kept": 10, "a": 30, "b": 60, "c": 1, "y": 10}
    steps: list[tuple[set[str], set[str]]] = [
        ({"x"}, {"kept"}),
        ({"kept", "z"}, {"a"}),
        ({"a"}, {"b"}),
        ({"b"}, {"c"}),
        ({"c", "kept"}, {"y"}),
    ]
    peak = brute_force_peak(steps, {"x", "z"}, {"y", "kept"}, lambda name: 4 * widths[name])
    assert peak == 4 * (1000 + 10 + 10)
    assert cost.memory_bytes(model, types_of(model)) == 4 * 10_000 + 8 + peak


def test_memory_frees_a_tensor_after_its_last_use() -> None:
    text = "agraph (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) b = Relu(a) y = Relu(b) }"
    held = "agraph (float[N, 8] x) => (float[N, 8] y) { a = Relu(x) b = Relu(a) y = Add(b, x) }"
    model, longer = model_with(text), model_with(held)
    assert cost.memory_bytes(model, types_of(model)) == 2 * 32
    assert cost.memory_bytes(longer, types_of(longer)) == 3 * 32


def test_memory_takes_sizes_from_dtypes() -> None:
    model = model_with(
        "agraph (float16[N, 8] x) => (float16[N, 8] y) { y = MatMul(x, w) }", w=np.ones((8, 8), np.float16)
    )
    assert cost.memory_bytes(model, types_of(model)) == 2 * 64 + 2 * (8 + 8)


# --- size -----------------------------------------------------------------------------------------------


def test_size_includes_external_data(tmp_path: Path) -> None:
    model = model_with("agraph (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }", w=floats(64, 64))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    data = (tmp_path / "weights.data").stat().st_size
    assert data >= 64 * 64 * 4
    assert cost.size_bytes(path) == path.stat().st_size + data
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ModelError, match=r"weights\.data: cannot be read"):
        cost.size_bytes(path)


def test_size_of_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model at all")
    with pytest.raises(ModelError, match=r"text\.onnx: is not an ONNX file"):
        cost.size_bytes(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match=r"absent\.onnx: cannot be read"):
        cost.size_bytes(tmp_path / "absent.onnx")


# --- real models, against a count of its own ------------------------------------------------------------


def independent_count() -> ModuleType:
    path = ROOT / "benchmarks" / "independent_count.py"
    spec = importlib.util.spec_from_file_location("independent_count", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_vgg",
        "cifar10_marabou_large_tf2onnx",
        "mnist_cntk",
        "mnist_fc_256x4",
        "det_yolox_nano",
        "gan_vnn_cgan32",
        "rul_matlab_cnn_w40",
        "vww_mobilenetv1_025_96_tf2onnx",
    ],
)
def test_real_models_agree_with_the_independent_count(shared: Path, name: str) -> None:
    path = shared / "models" / f"{name}.onnx"
    model = onnx.load(path)
    assert (cost.params(model), cost.macs(model, types_of(model))) == independent_count().count(path, {})
