from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxneutrino.errors import ModelError
from onnxneutrino.factors import Factors, Stage
from onnxneutrino.graph import arrays, fixed_shapes, load, real_inputs, tensor_types, with_arrays
from onnxneutrino.passes.factorize import factorize, last_stage, read_factors, stage_arrays, stage_names
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import FORMS, Form, Layer
from onnxneutrino.runtime import Runner


def random(*shape: int, seed: int = 0, dtype: type = np.float32) -> NDArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def build(
    body: str, inputs: str, element: str = "float", ir: int = 8, opset: int = 13, **weights: NDArray
) -> ModelProto:
    """A model of ONNX text; its outputs have the inferred shapes, its initializers are `weights`."""
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    model = parser.parse_model(f"{head} g ({inputs}) => ({element} y) {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, value in weights.items():
        tensor = numpy_helper.from_array(value, name)
        model.graph.initializer.append(tensor)
        if ir < 4:
            model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    model.graph.output[0].CopyFrom(inferred.graph.output[0])
    return model


def layers_of(model: ModelProto) -> dict[str, Layer]:
    listed = find_layers(model, tensor_types(model, fixed_shapes(model, {})))
    return {entry.name: entry for entry in listed if isinstance(entry, Layer)}


def exact(layer: Layer, form: Form) -> Factors:
    """Factors at full rank whose chain is the layer, written down by hand."""
    weight = layer.weight
    outputs, inputs, kh, kw = weight.shape

    def eye(n: int) -> Stage:
        return Stage(np.eye(n, dtype=np.float32).reshape(n, n, 1, 1))

    stages: tuple[Stage, ...]
    ranks: tuple[int, ...]
    if form in ("svd", "input"):
        stages, ranks = (eye(inputs), Stage(weight)), (inputs,)
    elif form == "channel":
        stages, ranks = (Stage(weight), eye(outputs)), (outputs,)
    elif form == "spatial_vh":
        # Feature (o, b) is the column b of the kernel of output o.
        columns = weight.transpose(0, 3, 1, 2).reshape(outputs * kw, inputs, kh, 1)
        pick = np.einsum("op,bc->opbc", np.eye(outputs), np.eye(kw)).reshape(outputs, outputs * kw, 1, kw)
        stages, ranks = (Stage(columns), Stage(pick.astype(np.float32))), (outputs * kw,)
    elif form == "spatial_hv":
        rows = weight.transpose(0, 2, 1, 3).reshape(outputs * kh, inputs, 1, kw)
        pick = np.einsum("op,ac->opac", np.eye(outputs), np.eye(kh)).reshape(outputs, outputs * kh, kh, 1)
        stages, ranks = (Stage(rows), Stage(pick.astype(np.float32))), (outputs * kh,)
    elif form == "tucker2":
        stages, ranks = (eye(inputs), Stage(weight), eye(outputs)), (inputs, outputs)
    else:
        # Feature (i, a, b) is the pixel (a, b) of channel i.
        rank = inputs * kh * kw
        spread = np.repeat(np.eye(inputs, dtype=np.float32), kh * kw, axis=0).reshape(rank, inputs, 1, 1)
        row = np.tile(np.repeat(np.eye(kh, dtype=np.float32), kw, axis=0), (inputs, 1)).reshape(rank, 1, kh, 1)
        column = np.tile(np.eye(kw, dtype=np.float32), (inputs * kh, 1)).reshape(rank, 1, 1, kw)
        last = Stage(weight.reshape(outputs, rank, 1, 1))
        stages = (Stage(spread), Stage(row, groups=rank), Stage(column, groups=rank), last)
        ranks = (rank,)
    return Factors(form, ranks, stages, layer.bias)


def assert_same_outputs(
    model: ModelProto, other: ModelProto, inputs: Mapping[str, NDArray], tolerance: float = 1e-4
) -> None:
    for expected, got in zip(Runner(model)(inputs), Runner(other)(inputs), strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        error = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
        assert error <= tolerance * np.abs(expected).max()


def replaced(model: ModelProto, form: Form) -> ModelProto:
    """The model with all layers exactly factorized, checked."""
    layers = layers_of(model)
    assert layers
    result = factorize(model, list(layers.values()), {name: exact(layer, form) for name, layer in layers.items()})
    onnx.checker.check_model(result, full_check=True)
    assert not {name for layer in layers.values() for name in layer.nodes} & {n.name for n in result.graph.node}
    return result


CONVS = {
    "plain": "group = 1",
    "strided": "strides = [2, 1], pads = [1, 0, 2, 1]",
    "dilated": "strides = [1, 3], dilations = [2, 1], pads = [2, 1, 3, 0]",
    "same": 'auto_pad = "SAME_LOWER", strides = [2, 2]',
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attributes", CONVS.values(), ids=CONVS)
def test_full_rank_chain_equals_conv(form: Form, attributes: str) -> None:
    body = f"[c] p = Conv <{attributes}> (x, w, b) y = Relu(p)"
    model = build(body, "float[N, 5, 11, 10] x", w=random(6, 5, 3, 4), b=random(6))
    result = replaced(model, form)
    for batch in (1, 3):
        assert_same_outputs(model, result, {"x": random(batch, 5, 11, 10, seed=batch)})


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_chain_equals_conv_with_a_flat_kernel(form: Form) -> None:
    """Stride, padding and dilation of an axis that no stage's kernel covers are not lost."""
    model = build(
        "[c] y = Conv <strides = [2, 2], pads = [1, 0, 1, 3]> (x, w)",
        "float[N, 9, 8, 8] x",
        w=random(7, 9, 1, 5),
    )
    assert_same_outputs(model, replaced(model, form), {"x": random(2, 9, 8, 8)})


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_chain_equals_conv1d(form: Form) -> None:
    model = build(
        "[c] y = Conv <strides = [2], pads = [3, 1], dilations = [2]> (x, w, b)",
        "float[N, 12, 33] x",
        w=random(8, 12, 4),
        b=random(8),
    )
    assert_same_outputs(model, replaced(model, form), {"x": random(2, 12, 33)})


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
@pytest.mark.parametrize("transposed", [0, 1])
def test_full_rank_chain_equals_gemm(opset: int, transposed: int) -> None:
    weight = random(24, 16) if transposed else random(16, 24)
    model = build(
        f"[g] y = Gemm <alpha = 0.5, beta = -2.0, transB = {transposed}> (x, w, b)",
        "float[N, 16] x",
        opset=opset,
        w=weight,
        b=random(1, 24),
    )
    assert_same_outputs(model, replaced(model, "svd"), {"x": random(3, 16)})


@pytest.mark.parametrize("body", ["[m] p = MatMul(x, w) [a] y = Add(p, b)", "[m] y = MatMul(x, w)"])
def test_full_rank_chain_equals_batched_matmul(body: str) -> None:
    model = build(body, "float[N, 7, 16] x", w=random(16, 24), b=random(24))
    assert_same_outputs(model, replaced(model, "svd"), {"x": random(3, 7, 16)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "body",
    [
        "f = Flatten(r) [g] y = Gemm<transB = 0>(f, w, b)",
        "f = Reshape(r, s) [m] p = MatMul(f, w) [a] y = Add(p, b)",
        "q = Transpose<perm = [0, 2, 3, 1]>(r) f = Reshape(q, s) [m] p = MatMul(f, w) [a] y = Add(p, b)",
    ],
    ids=["flatten", "reshape", "channels last"],
)
def test_full_rank_chain_equals_dense_layer_behind_a_map(form: Form, body: str) -> None:
    weights = {"w": random(72, 10), "b": random(10), "s": np.array([-1, 72])}
    if "Reshape" not in body:
        del weights["s"]
    model = build(f"r = Relu(x) {body}", "float[N, 6, 3, 4] x", **weights)
    result = replaced(model, form)
    assert_same_outputs(model, result, {"x": random(3, 6, 3, 4)})
    # Only the chain and what it reads is left.
    assert result.graph.node[0].op_type == "Relu"
    assert {node.op_type for node in result.graph.node[1:-1]} == {"Conv"}
    assert result.graph.node[-1].op_type == "Flatten"
    assert not {"w", "b", "s"} & {tensor.name for tensor in result.graph.initializer}


def test_truncated_chain_equals_the_layer_with_its_product() -> None:
    """Below full rank: the chain is the original graph whose weight is the product of the stages."""
    model = build(
        "[c] y = Conv <strides = [2, 1], pads = [1, 2, 0, 1]> (x, w, b)",
        "float[N, 12, 9, 9] x",
        w=random(16, 12, 3, 3),
        b=random(16),
    )
    (layer,) = layers_of(model).values()
    down = Stage(random(4, 12, 1, 1, seed=1))
    core, up = Stage(random(5, 4, 3, 3, seed=2)), Stage(random(16, 5, 1, 1, seed=3))
    factors = Factors("tucker2", (4, 5), (down, core, up), random(16, seed=4))
    dense = with_arrays(model, {"w": factors.product(), "b": factors.bias})
    assert_same_outputs(dense, factorize(model, [layer], {"c": factors}), {"x": random(2, 12, 9, 9)})


def test_what_something_else_reads_stays() -> None:
    body = (
        "f = Flatten(x) [g] p = Gemm(f, w, b) h = Relu(f) [k] q = Gemm(h, v, b)"
        " y = If(c) <then_branch = t () => (float[N, 10] ty) { ty = Add(p, w0) },"
        " else_branch = e () => (float[N, 10] ey) { ey = Add(q, b) }>"
    )
    weights = {"w": random(72, 10), "v": random(72, 10, seed=1), "b": random(10), "w0": random(10)}
    model = build(body, "float[N, 6, 3, 4] x, bool c", **weights)
    layers = layers_of(model)
    assert set(layers) == {"g", "k"}
    result = factorize(model, list(layers.values()), {"g": exact(layers["g"], "channel")})
    onnx.checker.check_model(result, full_check=True)
    kept = {tensor.name for tensor in result.graph.initializer}
    assert {"v", "b", "w0"} <= kept
    assert "w" not in kept
    assert "f" in {name for node in result.graph.node for name in node.output}
    for choice in (True, False):
        assert_same_outputs(model, result, {"x": random(2, 6, 3, 4), "c": np.array(choice)})


def two_convs(ir: int = 8) -> ModelProto:
    model = build(
        "[first] p = Conv(x, w, b) [between] r = LeakyRelu<alpha = 0.25>(p) [second] y = Conv(r, v)",
        "float[N, 5, 9, 9] x",
        ir=ir,
        w=random(8, 5, 3, 3),
        b=random(8),
        v=random(6, 8, 3, 3),
    )
    model.doc_string, model.producer_name, model.domain = "doc", "maker", "org.example"
    helper.set_model_props(model, {"key": "value"})
    model.graph.doc_string = "graph doc"
    model.graph.node[1].doc_string = "node doc"
    for name in ("p", "r"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, 7, 7]))
    return model


def test_everything_else_stays_byte_for_byte() -> None:
    model = two_convs()
    before = model.SerializeToString(deterministic=True)
    layers = layers_of(model)
    result = factorize(model, list(layers.values()), {"first": exact(layers["first"], "tucker2")})
    assert model.SerializeToString(deterministic=True) == before
    old, new = list(model.graph.node), list(result.graph.node)
    assert [node.name for node in new[:3]] == ["first/tucker2.0", "first/tucker2.1", "first/tucker2.2"]
    assert [node.SerializeToString() for node in new[3:]] == [node.SerializeToString() for node in old[1:]]
    assert result.graph.initializer[0] == model.graph.initializer[2]
    # Apart from nodes and initializers nothing at all is different.
    for graph in (model.graph, result.graph):
        del graph.node[:], graph.initializer[:]
    assert result.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_no_factors_change_nothing() -> None:
    model = two_convs()
    result = factorize(model, list(layers_of(model).values()), {})
    assert result.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert result is not model


def test_value_info_of_removed_tensors_goes() -> None:
    model = build("[m] p = MatMul(x, w) [a] y = Add(p, b)", "float[N, 16] x", w=random(16, 24), b=random(24))
    model.graph.value_info.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 24]))
    assert not replaced(model, "svd").graph.value_info


def test_below_ir_4_initializers_are_inputs() -> None:
    model = two_convs(ir=3)
    result = replaced(model, "channel")
    assert result.ir_version == 3
    initializers = {tensor.name for tensor in result.graph.initializer}
    assert {value.name for value in result.graph.input} == initializers | {"x"}
    assert [value.name for value in real_inputs(result)] == ["x"]
    assert len(initializers) == 6
    assert_same_outputs(model, result, {"x": random(2, 5, 9, 9)})


def test_half_layers_get_half_chains() -> None:
    model = build(
        "[c] y = Conv<pads = [1, 1, 1, 1]>(x, w, b)",
        "float16[N, 8, 9, 9] x",
        element="float16",
        w=random(16, 8, 3, 3, dtype=np.float16),
        b=random(16, dtype=np.float16),
    )
    result = replaced(model, "channel")
    assert {tensor.data_type for tensor in result.graph.initializer} == {TensorProto.FLOAT16}
    assert_same_outputs(model, result, {"x": random(2, 8, 9, 9, dtype=np.float16)}, 5e-3)


KINDS = {
    "conv2d": ("[l] y = Conv(x, w, b)", "float[N, 12, 9, 9] x", (16, 12, 3, 3), "cp"),
    "conv1d": ("[l] y = Conv(x, w, b)", "float[N, 12, 33] x", (16, 12, 4), "spatial_vh"),
    "gemm": ("[l] y = Gemm<transB = 1>(x, w, b)", "float[N, 24] x", (16, 24), "svd"),
    "matmul": ("[l] p = MatMul(x, w) [a] y = Add(p, b)", "float[N, 7, 24] x", (24, 16), "svd"),
    "map": ("f = Flatten(x) [l] y = Gemm<transB = 1>(f, w, b)", "float[N, 6, 3, 4] x", (16, 72), "tucker2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_read_back_from_the_graph(kind: str) -> None:
    body, inputs, shape, form = KINDS[kind]
    model = build(body, inputs, w=random(*shape), b=random(16))
    layer = layers_of(model)["l"]
    assert layer.kind == kind
    factors = exact(layer, form)
    result = factorize(model, [layer], {"l": factors})
    names = stage_names(layer, factors)
    assert names == tuple(stage_arrays(layer, factors)) == tuple(t.name for t in result.graph.initializer)
    assert len(set(names)) == len(factors.stages) + 1
    assert sum(value.size for value in stage_arrays(layer, factors).values()) == factors.params
    rng = np.random.default_rng(5)
    trained = {name: value + rng.standard_normal(value.shape) for name, value in arrays(result).items()}
    back = read_factors(layer, factors, trained)
    assert (back.form, back.ranks) == (factors.form, factors.ranks)
    assert np.isnan(back.error)
    for name, value in stage_arrays(layer, back).items():
        np.testing.assert_array_equal(value, trained[name].astype(np.float32))
    # Values set by name in the graph and factors put into the original are the same model.
    shape_x = {name: (2, *rest) for name, (_, *rest) in fixed_shapes(model, {}).items()}
    x = {"x": random(*shape_x["x"])}
    assert_same_outputs(with_arrays(result, trained), factorize(model, [layer], {"l": back}), x)


@pytest.mark.parametrize("kind", KINDS)
def test_last_stage_times_what_feeds_it_is_the_output(kind: str) -> None:
    body, inputs, shape, form = KINDS[kind]
    model = build(body, inputs, w=random(*shape), b=random(16))
    layer = layers_of(model)["l"]
    factors = exact(layer, "channel" if kind in ("conv2d", "conv1d", "map") else form)
    result = factorize(model, [layer], {"l": factors})
    ((_, *rest),) = fixed_shapes(model, {}).values()
    fed, output = Runner(result, last_stage(layer, factors))({"x": random(2, *rest)})
    axis = fed.ndim - 1 if kind in ("gemm", "matmul") else 1
    features = np.moveaxis(fed, axis, -1)
    expected = features @ factors.stages[-1].weight[:, :, 0, 0].T + factors.bias
    expected = np.moveaxis(expected, -1, axis).reshape(output.shape)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_one_stage_reads_the_layers_input() -> None:
    model = two_convs()
    layer = layers_of(model)["second"]
    single = Factors("channel", (6,), (Stage(layer.weight),), layer.bias)
    assert last_stage(layer, single) == ("r", "y")
    assert_same_outputs(model, factorize(model, [layer], {"second": single}), {"x": random(2, 5, 9, 9)})


def test_a_name_that_is_taken_is_refused() -> None:
    model = two_convs()
    layers = layers_of(model)
    model.graph.node[1].name = "first/channel.0"
    with pytest.raises(ModelError, match=r"name 'first/channel\.0' is taken"):
        factorize(model, list(layers.values()), {"first": exact(layers["first"], "channel")})


def test_a_layer_of_another_model_is_refused() -> None:
    model = two_convs()
    layers = layers_of(model)
    model.graph.node[0].name = "renamed"
    with pytest.raises(ModelError, match="node 'first' is not in the model"):
        factorize(model, list(layers.values()), {"first": exact(layers["first"], "channel")})


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("cifar10_resnet8_mlperftiny_tf2onnx", "spatial_vh"),
        ("cifar10_marabou_large_tf2onnx", "channel"),
        ("cifar10_vit_ibp_3_3_8", "svd"),
        ("mnist_fc_256x4", "svd"),
        ("mnist_burn_pytorch_bn", "spatial_hv"),
        ("metaroom_4cnn", "tucker2"),
        ("imagenet_squeezenet_fp16_caffe2", "input"),
        ("det_ultraface_version-RFB-320", "channel"),
    ],
)
def test_real_models_at_full_rank_compute_the_same(shared: Path, name: str, form: Form) -> None:
    model = load(shared / "models" / f"{name}.onnx").model
    shapes = fixed_shapes(model, {})
    types = tensor_types(model, shapes)
    inputs = {value.name: random(*shapes[value.name]).astype(types[value.name].dtype) for value in real_inputs(model)}
    half = any(value.dtype == np.float16 for value in inputs.values())
    assert_same_outputs(model, replaced(model, form), inputs, 2e-2 if half else 1e-4)
