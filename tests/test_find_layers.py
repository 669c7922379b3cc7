from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxneutrino.errors import NeutrinoError
from onnxneutrino.graph import fixed_shapes, load, real_inputs, tensor_types
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Frozen, Geometry, Layer
from onnxneutrino.runtime import Runner

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def random(*shape: int, seed: int = 0, dtype: type = np.float32) -> NDArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def build(
    body: str, inputs: str, outputs: Sequence[str] = ("y",), ir: int = 8, opset: int = 13, **weights: NDArray
) -> ModelProto:
    """A model of ONNX text; its outputs are declared without shape, its initializers are `weights`."""
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    declared = ", ".join(f"float {name}" for name in outputs)
    model = parser.parse_model(f"{head} g ({inputs}) => ({declared}) {{ {body} }}")
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def found(model: ModelProto, **options: tuple[str, ...]) -> list[Layer | Frozen]:
    return find_layers(model, tensor_types(model, fixed_shapes(model, {})), **options)


def only_layer(model: ModelProto) -> Layer:
    (layer,) = found(model)
    assert isinstance(layer, Layer), layer
    return layer


def reason(model: ModelProto, **options: tuple[str, ...]) -> str:
    (frozen,) = found(model, **options)
    assert isinstance(frozen, Frozen)
    return frozen.reason


def apply(layer: Layer, x: NDArray) -> NDArray:
    """`W x + b` on the layer's own tensors, patch by patch."""
    x = x.astype(np.float32)
    if layer.kind in ("gemm", "matmul"):
        return x @ layer.weight[:, :, 0, 0].T + layer.bias
    if layer.kind == "conv1d":
        x = x[..., None]
    geometry = layer.geometry
    top, left, bottom, right = geometry.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.strides, geometry.dilations
    height, width = geometry.output_size(*layer.input_size)
    y = np.empty((len(x), len(layer.weight), height, width), np.float32)
    for row in range(height):
        for column in range(width):
            patch = x[:, :, row * sh :, column * sw :][:, :, : dh * kh : dh, : dw * kw : dw]
            y[:, :, row, column] = np.einsum("nihw,oihw->no", patch, layer.weight, optimize=True) + layer.bias
    return {"map": y[:, :, 0, 0], "conv1d": y[..., 0]}.get(layer.kind, y)


def assert_equals_node(model: ModelProto, layer: Layer, inputs: dict[str, NDArray], tolerance: float = 1e-4) -> None:
    source, target = Runner(model, [layer.input, layer.output])(inputs)
    got = apply(layer, source)
    assert got.shape == target.shape
    assert np.abs(got - target).max() <= tolerance * np.abs(target).max()


CONVS = {
    "plain": "group = 1",
    "strided": "strides = [2, 1], pads = [1, 0, 2, 1]",
    "dilated": "dilations = [2, 1], pads = [2, 1, 2, 1]",
    "same upper": 'auto_pad = "SAME_UPPER", strides = [2, 3]',
    "same lower": 'auto_pad = "SAME_LOWER", strides = [2, 2]',
    "valid": 'auto_pad = "VALID", strides = [2, 2]',
}


@pytest.mark.parametrize("attributes", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_conv_is_the_same_linear_map(attributes: str, kernel: tuple[int, int]) -> None:
    model = build(
        f"[c] y = Conv <{attributes}> (x, w, b)",
        "float[N, 5, 11, 10] x",
        w=random(8, 5, *kernel),
        b=random(8),
    )
    layer = only_layer(model)
    assert (layer.name, layer.op, layer.kind, layer.input, layer.output) == ("c", "Conv", "conv2d", "x", "y")
    assert layer.nodes == ("c",)
    assert layer.initializers == ("w", "b")
    assert layer.weight_shape == (8, 5, *kernel)
    (y,) = Runner(model)({"x": random(1, 5, 11, 10)})
    assert layer.positions == y.shape[2] * y.shape[3]
    assert layer.geometry.output_size(*layer.input_size) == y.shape[2:]
    assert_equals_node(model, layer, {"x": random(2, 5, 11, 10, seed=1)})


@pytest.mark.parametrize("attributes", ["strides = [2], pads = [2, 1], dilations = [2]", 'auto_pad = "SAME_UPPER"'])
def test_conv1d_is_a_conv_of_width_one(attributes: str) -> None:
    model = build(f"[c] y = Conv <{attributes}> (x, w)", "float[N, 12, 33] x", w=random(16, 12, 4))
    layer = only_layer(model)
    assert (layer.kind, layer.input_size, layer.geometry.kernel) == ("conv1d", (33, 1), (4, 1))
    assert not layer.bias.any()
    assert layer.geometry.pads[1::2] == (0, 0)
    assert_equals_node(model, layer, {"x": random(3, 12, 33)})


@pytest.mark.parametrize("bias", [(24,), (1, 24), (1,), (), (1, 1)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_holds_alpha_beta_and_every_bias_shape(transposed: int, bias: tuple[int, ...]) -> None:
    weight = random(24, 16) if transposed else random(16, 24)
    model = build(
        f"[g] y = Gemm <alpha = 0.5, beta = -2.0, transB = {transposed}> (x, w, b)",
        "float[N, 16] x",
        w=weight,
        b=random(*bias),
    )
    layer = only_layer(model)
    assert (layer.kind, layer.geometry, layer.positions) == ("gemm", Geometry(), 1)
    assert layer.weight.shape == (24, 16, 1, 1)
    assert_equals_node(model, layer, {"x": random(3, 16)})


@pytest.mark.parametrize("bias", [(24,), (1, 24), (1, 1, 24), (1,), ()])
def test_batched_matmul_takes_the_add_behind_it(bias: tuple[int, ...]) -> None:
    model = build("[m] p = MatMul(x, w) [a] y = Add(b, p)", "float[N, 7, 16] x", w=random(16, 24), b=random(*bias))
    layer = only_layer(model)
    assert (layer.kind, layer.positions, layer.nodes, layer.output) == ("matmul", 7, ("m", "a"), "y")
    assert layer.initializers == ("w", "b")
    assert layer.macs == 7 * 16 * 24
    assert_equals_node(model, layer, {"x": random(3, 7, 16)})


ADDS = {
    "not per output": ("[a] y = Add(p, b)", random(7, 1)),
    "raises the rank": ("[a] y = Add(p, b)", random(1, 1, 1, 24)),
    "product read twice": ("[a] q = Add(p, b) [s] y = Mul(p, q)", random(24)),
    "with itself": ("[a] y = Add(p, p)", random(24)),
    "no constant": ("[s] q = Sigmoid(p) [a] y = Mul(q, b)", random(24)),
}


@pytest.mark.parametrize(("body", "bias"), ADDS.values(), ids=ADDS)
def test_matmul_leaves_another_add_alone(body: str, bias: NDArray) -> None:
    layer = only_layer(build(f"[m] p = MatMul(x, w) {body}", "float[N, 7, 16] x", w=random(16, 24), b=bias))
    assert (layer.nodes, layer.output) == (("m",), "p")
    assert not layer.bias.any()


def test_matmul_output_that_is_a_graph_output_keeps_its_add() -> None:
    model = build(
        "[m] p = MatMul(x, w) [a] y = Add(p, b)", "float[N, 16] x", ("y", "p"), w=random(16, 24), b=random(24)
    )
    assert only_layer(model).output == "p"


MAPS = {
    "flatten": ("f = Flatten(x) [g] y = Gemm<transB = 1>(f, w, b)", (20, 96), "x"),
    "flatten matmul": ("f = Flatten(x) [g] p = MatMul(f, w) [a] y = Add(p, b)", (96, 20), "x"),
    "reshape": ("f = Reshape(x, s) [g] y = Gemm(f, w, b)", (96, 20), "x"),
    "dropout": ("d = Dropout(x) f = Flatten(d) i = Identity(f) [g] y = Gemm(i, w, b)", (96, 20), "d"),
    "two steps": ("r = Reshape(x, t) f = Flatten(r) [g] y = Gemm(f, w, b)", (96, 20), "x"),
    "after relu": ("r = Relu(x) f = Flatten(r) [g] y = Gemm(f, w, b)", (96, 20), "r"),
    "channels last": (
        "q = Transpose<perm = [0, 2, 3, 1]>(x) f = Reshape(q, s) [g] p = MatMul(f, w) [a] y = Add(p, b)",
        (96, 20),
        "x",
    ),
}


@pytest.mark.parametrize(("body", "shape", "source"), MAPS.values(), ids=MAPS)
def test_dense_layer_behind_a_map_is_a_conv_on_it(body: str, shape: tuple[int, int], source: str) -> None:
    model = build(
        body,
        "float[N, 6, 4, 4] x",
        w=random(*shape),
        b=random(20),
        s=np.array([-1, 96]),
        t=np.array([0, 6, 16]),
    )
    layer = only_layer(model)
    assert (layer.kind, layer.input, layer.positions) == ("map", source, 1)
    assert layer.weight.shape == (20, 6, 4, 4)
    assert layer.geometry == Geometry(kernel=(4, 4))
    assert layer.input_size == (4, 4)
    assert_equals_node(model, layer, {"x": random(3, 6, 4, 4)})


NO_MAPS = {
    "one pixel": ("float[N, 96, 1, 1] x", "f = Flatten(x)"),
    "channels last before relu": (
        "float[N, 6, 4, 4] x",
        "q = Transpose<perm = [0, 2, 3, 1]>(x) r = Relu(q) f = Reshape(r, s)",
    ),
    "channels last input": ("float[N, 8, 4, 3] x", "f = Reshape(x, s)"),
    "not flattened": ("float[N, 96] x", "f = Relu(x)"),
    "dropping": ("float[N, 6, 4, 4] x, bool m", "d = Flatten(x) f = Dropout(d, , m)"),
}


@pytest.mark.parametrize(("inputs", "body"), NO_MAPS.values(), ids=NO_MAPS)
def test_dense_layer_without_a_map_stays_dense(inputs: str, body: str) -> None:
    model = build(f"{body} [g] y = MatMul(f, w)", inputs, w=random(96, 20), s=np.array([-1, 96]))
    assert only_layer(model).kind == "matmul"


def test_tokens_are_no_map() -> None:
    """A MatMul on tokens has rank 3, whatever it was reshaped from."""
    model = build(
        "r = Reshape(x, s) [m] y = MatMul(r, w)",
        "float[N, 7, 4, 8] x",
        w=random(32, 24),
        s=np.array([0, 7, 32]),
    )
    assert (only_layer(model).kind, only_layer(model).positions) == ("matmul", 7)


W = random(16, 8, 3, 3)
IMAGE = "float[N, 8, 9, 9] x"
ROWS = "float[N, 16] x"
REASONS = {
    "transposed convolution": ("[c] y = ConvTranspose(x, w)", IMAGE, {"w": random(8, 16, 3, 3)}),
    "depthwise convolution": ("[c] y = Conv<group = 8>(x, w)", IMAGE, {"w": random(64, 1, 3, 3)}),
    "grouped convolution": ("[c] y = Conv<group = 2>(x, w)", IMAGE, {"w": random(16, 4, 3, 3)}),
    "convolution over 4 axes": ("[c] y = Conv(x, w)", "float[N, 4, 5, 5, 5, 5] x", {"w": random(8, 4, 3, 3, 3, 3)}),
    "no form has fewer parameters": ("[c] y = Conv(x, w)", IMAGE, {"w": random(3, 8, 3, 3)}),
    "weight is computed at run time": ("v = Relu(w) [c] y = Conv(x, v)", IMAGE, {"w": W}),
    "bias is computed at run time": ("v = Relu(b) [c] y = Conv(x, w, v)", IMAGE, {"w": W, "b": random(16)}),
    "the input is transposed (transA)": (
        "[g] y = Gemm<transA = 1>(x, w)",
        "float[16, 20] x",
        {"w": random(16, 24)},
    ),
    "the constant is the left factor": ("[g] y = MatMul(w, x)", "float[16, 20] x", {"w": random(24, 16)}),
    "no constant weight": ("[m] y = MatMul(x, x)", "float[16, 16] x", {}),
    "weight of rank 3": ("[m] y = MatMul(x, w)", "float[2, 5, 16] x", {"w": random(2, 16, 24)}),
    "input of rank 1": ("[m] y = MatMul(x, w)", "float[16] x", {"w": random(16, 24)}),
    "bias of shape (5, 24) is not one value per output": (
        "[g] y = Gemm(x, w, b)",
        "float[5, 16] x",
        {"w": random(16, 24), "b": random(5, 24)},
    ),
    "weight is float64, not float32 or float16": (
        "[g] y = Gemm(x, w)",
        "double[N, 16] x",
        {"w": random(16, 24, dtype=np.float64)},
    ),
}


@pytest.mark.parametrize("expected", REASONS)
def test_frozen_layers_say_why(expected: str) -> None:
    body, inputs, weights = REASONS[expected]
    (frozen,) = found(build(body, inputs, **weights))
    assert isinstance(frozen, Frozen)
    assert frozen.reason == expected
    if "run time" not in expected and weights:
        assert frozen.weight_shape == weights["w"].shape
        assert frozen.params == sum(value.size for value in weights.values())


def test_frozen_counts_the_bias_that_is_added_behind_a_matmul() -> None:
    model = build("[m] p = MatMul(x, w) [a] y = Add(p, b)", ROWS, w=random(16, 3), b=random(3))
    (frozen,) = found(model)
    assert frozen.params == 16 * 3 + 3


def test_shared_weight_is_one_layer_and_shared_bias_is_not() -> None:
    body = "[c] p = Conv<pads = [1, 1, 1, 1]>(x, w, b) [d] y = Conv<pads = [1, 1, 1, 1]>(p, {}, b)"
    weights = {"w": random(8, 8, 3, 3), "v": random(8, 8, 3, 3), "b": random(8)}
    shared = found(build(body.format("w"), IMAGE, **weights))
    assert [[use.name for use in entry.uses] for entry in shared if isinstance(entry, Layer)] == [["c", "d"]]
    assert all(isinstance(entry, Layer) for entry in found(build(body.format("v"), IMAGE, **weights)))


def test_weight_behind_identity_or_in_a_constant_node() -> None:
    model = build("v = Identity(w) [c] y = Conv(x, v)", IMAGE, w=W)
    assert only_layer(model).initializers == ("w",)
    constant = build("[c] y = Conv(x, k)", IMAGE)
    constant.graph.node.insert(0, helper.make_node("Constant", [], ["k"], "k", value=numpy_helper.from_array(W)))
    layer = only_layer(constant)
    assert layer.initializers == ("k",)
    np.testing.assert_array_equal(layer.weight, W)


def test_weight_that_is_a_graph_output_is_frozen() -> None:
    model = build("[c] y = Conv(x, w)", IMAGE, ("y", "w"), w=W)
    assert reason(model) == "weight is a graph output"


def test_unknown_shape_is_frozen() -> None:
    model = build("[c] y = Conv(x, w)", "float[N, 8, H, 9] x", w=W)
    (frozen,) = find_layers(model, tensor_types(model, {}))
    assert isinstance(frozen, Frozen)
    assert frozen.reason == "shape unknown: fix free dimensions with --input-shape"


def test_half_weights_become_float32() -> None:
    half = W.astype(np.float16)
    model = build("[c] y = Conv(x, w)", "float16[N, 8, 9, 9] x", w=half)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    layer = only_layer(model)
    assert layer.half
    assert layer.weight.dtype == layer.bias.dtype == np.float32
    np.testing.assert_array_equal(layer.weight, half.astype(np.float32))


@pytest.mark.parametrize("pattern", ["model/conv1/Conv2D", "model/*", "*conv1*", "conv1/out", "conv1/kern?l"])
def test_patterns_match_nodes_and_tensors(pattern: str) -> None:
    model = build("[c] p = Conv(x, w) [last] y = Conv(p, v)", IMAGE, w=W, v=random(8, 16, 3, 3))
    model.graph.node[0].name = "model/conv1/Conv2D"
    names = {"p": "conv1/out:0", "w": "conv1/kernel:0"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    model.graph.initializer[0].name = names["w"]
    first, second = found(model, exclude=(pattern,))
    assert isinstance(first, Frozen)
    assert first.reason == f"excluded by --exclude '{pattern}'"
    assert isinstance(second, Layer)
    first, second = found(model, only=(pattern,))
    assert isinstance(first, Layer)
    assert isinstance(second, Frozen)
    assert second.reason == "not matched by --only"


def test_layers_inside_bodies_are_listed() -> None:
    branch = "{0} () => (float[N, 20] {0}y) {{ [{0}m] {0}y = MatMul(x, {1}) }}"
    first, second = branch.format("t", "w"), branch.format("e", "v")
    body = f"[choose] y = If(c) <then_branch = {first}, else_branch = {second}>"
    listed = found(build(body, ROWS + ", bool c", w=random(16, 20), v=random(16, 20)))
    assert [entry.name for entry in listed] == ["choose/then_branch/tm", "choose/else_branch/em"]
    for entry in listed:
        assert isinstance(entry, Frozen)
        assert entry.reason == "inside the body of If choose"
        assert (entry.weight_shape, entry.params) == ((16, 20), 320)


def test_the_model_is_only_read() -> None:
    model = build("f = Flatten(x) [g] y = Gemm(f, w)", "float[N, 6, 4, 4] x", w=random(96, 20))
    before = model.SerializeToString(deterministic=True)
    found(model)
    assert model.SerializeToString(deterministic=True) == before


SIZES = {
    "ocr_ppocrv2_det_paddle": {"x": (1, 3, 64, 64)},
    "vad_silero_op18": {"input": (1, 576)},
    "vad_silero_spox": {"input": (1, 512), "state": (2, 1, 128)},
}


def test_real_models_list_every_linear_node_once(shared: Path) -> None:
    seen = 0
    for path in sorted((shared / "models").glob("*.onnx")):
        try:
            model = load(path).model
        except NeutrinoError:
            continue
        types = tensor_types(model, fixed_shapes(model, SIZES.get(path.stem, {})))
        entries = find_layers(model, types)
        listed = Counter(use.name for entry in entries for use in getattr(entry, "uses", (entry,)))
        main = [node.name for node in model.graph.node if node.op_type in LINEAR]
        assert [listed[name] for name in main] == [1] * len(main), path.name
        assert max(listed.values()) == 1, path.name
        seen += 1
    assert seen >= 25


REAL = (
    "cifar10_vgg cifar10_marabou_large_tf2onnx cifar10_vit_ibp_3_3_8 mnist_fc_256x4 metaroom_4cnn "
    "rul_matlab_cnn_w40 imagenet_squeezenet_fp16_caffe2 seg_deeplabv3_tf2onnx"
)


@pytest.mark.parametrize("name", REAL.split())
def test_real_layers_compute_what_the_runtime_computes(shared: Path, name: str) -> None:
    model = load(shared / "models" / f"{name}.onnx").model
    shapes = fixed_shapes(model, {})
    types = tensor_types(model, shapes)
    inputs = {value.name: random(*shapes[value.name]).astype(types[value.name].dtype) for value in real_inputs(model)}
    layers = [entry for entry in find_layers(model, types) if isinstance(entry, Layer)]
    small = [layer for layer in layers if layer.positions <= 400][:12]
    assert small
    for layer in small:
        assert_equals_node(model, layer, inputs, 1e-2 if layer.half else 1e-4)
