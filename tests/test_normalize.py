from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxneutrino import graph, normalize
from onnxneutrino.passes import fold_batchnorm, fold_scale
from onnxneutrino.runtime import Runner

Array = NDArray[np.float32]


def run(model: ModelProto, sample: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    return Runner(model)(sample)


def chain(
    nodes: list[onnx.NodeProto], shape: list[int | str], weights: dict[str, Array], opset: int = 13, ir: int = 8
) -> ModelProto:
    """A model from `x` to `y` with these nodes."""
    listed = []
    if ir < 4:
        listed = [helper.make_tensor_value_info(n, TensorProto.FLOAT, w.shape) for n, w in weights.items()]
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), *listed],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(np.float32)


def statistics(channels: int) -> dict[str, Array]:
    return {
        "gamma": random(channels, seed=1),
        "beta": random(channels, seed=2),
        "mean": random(channels, seed=3),
        "var": np.abs(random(channels, seed=4)) + np.float32(0.1),
    }


def batchnorm(source: str = "h", **attributes: float) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", [source, *statistics(1)], ["y"], "bn", **attributes)


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def same(before: ModelProto, after: ModelProto, shape: tuple[int, ...]) -> None:
    onnx.checker.check_model(after)
    x = {"x": random(*shape, seed=9)}
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], rtol=1e-4, atol=1e-5)


LINEAR: list[tuple[str, dict[str, object], dict[str, Array], tuple[int, ...]]] = [
    ("Conv", {}, {"w": random(6, 4, 3, 3)}, (2, 4, 5, 5)),
    ("Conv", {"group": 2}, {"w": random(6, 2, 3, 3), "b": random(6)}, (2, 4, 5, 5)),
    ("Conv", {}, {"w": random(6, 4, 3), "b": random(6)}, (2, 4, 5)),
    ("ConvTranspose", {}, {"w": random(4, 6, 3, 3), "b": random(6)}, (2, 4, 5, 5)),
    ("ConvTranspose", {"group": 2}, {"w": random(4, 3, 3, 3)}, (2, 4, 5, 5)),
    ("Gemm", {"transB": 1}, {"w": random(6, 4), "b": random(6)}, (5, 4)),
    ("Gemm", {"alpha": 0.5, "beta": 2.0}, {"w": random(4, 6), "b": random(1, 6)}, (5, 4)),
    ("Gemm", {"transA": 1, "beta": 0.0}, {"w": random(5, 6), "b": random(6)}, (5, 4)),
    ("Gemm", {"alpha": 3.0}, {"w": random(4, 6)}, (5, 4)),
]


@pytest.mark.parametrize(("op", "attributes", "weights", "shape"), LINEAR)
def test_batchnorm_folds_into_every_linear_layer(
    op: str, attributes: dict[str, object], weights: dict[str, Array], shape: tuple[int, ...]
) -> None:
    node = helper.make_node(op, ["x", *weights], ["h"], "lin", **attributes)
    model = chain([node, batchnorm(epsilon=0.01)], list(shape), weights | statistics(6))
    folded, notes = fold_batchnorm.run(model)
    assert ops(folded) == [op]
    assert notes == [f"BatchNormalization bn folded into {op} lin"]
    same(model, folded, shape)


@pytest.mark.parametrize(("op", "attributes", "weights", "shape"), LINEAR)
@pytest.mark.parametrize("step", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("first", [True, False])
def test_channel_constant_folds_into_every_linear_layer(
    op: str, attributes: dict[str, object], weights: dict[str, Array], shape: tuple[int, ...], step: str, first: bool
) -> None:
    node = helper.make_node(op, ["x", *weights], ["h"], "lin", **attributes)
    constant = random(6, *(1,) * (len(shape) - 2), seed=5)
    inputs = ["h", "c"] if first else ["c", "h"]
    model = chain([node, helper.make_node(step, inputs, ["y"], "step")], list(shape), weights | {"c": constant})
    folded, _ = fold_scale.run(model)
    assert ops(folded) == ([op, step] if step == "Div" and not first else [op])
    same(model, folded, shape)


def test_matmul_takes_a_scale_and_its_add_a_shift() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
        helper.make_node("Add", ["b", "m"], ["h"], "add"),
        helper.make_node("Mul", ["h", "c"], ["k"], "mul"),
        helper.make_node("Add", ["k", "d"], ["y"], "shift"),
    ]
    weights = {"w": random(4, 6), "b": random(6), "c": random(6, seed=1), "d": random(6, seed=2)}
    model = chain(nodes, [2, 5, 4], weights)
    folded, _ = fold_scale.run(model)
    assert ops(folded) == ["MatMul", "Add"]
    same(model, folded, (2, 5, 4))


def test_batchnorm_behind_a_matmul_folds_at_rank_two_only() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
        helper.make_node("Add", ["m", "b"], ["h"], "add"),
        batchnorm(),
    ]
    weights = {"w": random(4, 6), "b": random(6)} | statistics(6)
    flat = chain(nodes, [5, 4], weights)
    folded, _ = fold_batchnorm.run(flat)
    assert ops(folded) == ["MatMul", "Add"]
    same(flat, folded, (5, 4))
    # With 6 rows the channels of the BatchNormalization are those rows, not the columns of the MatMul.
    kept, notes = fold_batchnorm.run(chain(nodes, [2, 6, 4], weights))
    assert ops(kept) == ["MatMul", "Add", "BatchNormalization"]
    assert notes == []


@pytest.mark.parametrize("shape", [(1, 6, 5, 5), (5,), (6, 1), (2, 1, 1, 1), (1, 1, 6, 1, 1)])
def test_constants_that_are_not_per_channel_stay(shape: tuple[int, ...]) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("Add", ["h", "c"], ["y"], "add"),
    ]
    size = 6 if shape == (6, 1) else 5
    model = chain(nodes, [1, 4, size, size], {"w": random(6, 4, 1, 1), "c": random(*shape)})
    assert ops(fold_scale.run(model)[0]) == ["Conv", "Add"]


def test_one_output_channel_is_not_folded_where_broadcasting_widens_it() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], "conv"),
        helper.make_node("Add", ["h", "c"], ["y"], "add"),
    ]
    model = chain(nodes, [1, 4, 5, 5], {"w": random(1, 4, 1, 1), "c": random(7, 1, 1)})
    assert ops(fold_scale.run(model)[0]) == ["Conv", "Add"]


def test_second_readers_graph_outputs_and_shared_weights_are_left_alone() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["h"], "conv")
    weights = {"w": random(6, 6, 1, 1)} | statistics(6)
    read_twice = chain([conv, helper.make_node("Relu", ["h"], ["r"]), batchnorm()], [1, 6, 5, 5], weights)
    assert fold_batchnorm.run(read_twice)[1] == []

    shown = chain([conv, batchnorm()], [1, 6, 5, 5], weights)
    shown.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [None] * 4))
    assert fold_batchnorm.run(shown)[1] == []

    other = helper.make_node("Conv", ["x", "w"], ["z"], "other")
    joined = helper.make_node("Add", ["h", "z"], ["s"], "sum")
    shared = chain([conv, other, joined, batchnorm("z")], [1, 6, 5, 5], weights)
    assert fold_batchnorm.run(shared)[1] == []


def test_shared_bias_gets_a_copy() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["p"], "first"),
        helper.make_node("Conv", ["p", "v", "b"], ["h"], "second"),
        batchnorm(),
    ]
    weights = {"w": random(6, 6, 1, 1), "v": random(6, 6, 1, 1, seed=7), "b": random(6)} | statistics(6)
    model = chain(nodes, [1, 6, 5, 5], weights, ir=3)
    folded, _ = fold_batchnorm.run(model)
    assert ops(folded) == ["Conv", "Conv"]
    same(model, folded, (1, 6, 5, 5))


def test_training_batchnorm_is_left_alone() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["h"], "conv")
    node = batchnorm(training_mode=1)
    node.output.extend(["running_mean", "running_var"])
    model = chain([conv, node], [1, 6, 5, 5], {"w": random(6, 6, 1, 1)} | statistics(6), opset=15)
    assert fold_batchnorm.run(model)[1] == []


def described() -> ModelProto:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 2], producer_name: "maker",
         domain: "some.domain", doc_string: "about", metadata_props: ["key" : "value"]>
        net (float[N, 3, h, w] x) => (float[M, k, h, w] y)
        <float[2, 3, 1, 1] weight = {1, 2, 3, 4, 5, 6}, float[2, 1, 1] bias = {1, 2}>
        {
            [conv] c = Conv (x, weight)
            [add] a = Add (c, bias)
            [same] i = Identity (a)
            [act] y = Relu (i)
        }
        """
    )
    model.graph.node[3].doc_string = "the activation"
    return model


def test_normalize_keeps_what_the_user_declared() -> None:
    model = described()
    before = graph.copied(model)
    samples = [{"x": random(2, 3, 4, 5)}]
    result, notes = normalize.normalize(model, samples, run)
    assert model == before
    assert ops(result) == ["Conv", "Relu"]
    assert "Add add folded into Conv conv" in notes
    assert list(result.graph.input) == list(model.graph.input)
    assert list(result.graph.output) == list(model.graph.output)
    for field in ("ir_version", "producer_name", "domain", "doc_string"):
        assert getattr(result, field) == getattr(model, field)
    assert list(result.metadata_props) == list(model.metadata_props)
    assert list(result.opset_import) == list(model.opset_import)
    assert result.graph.node[1].doc_string == "the activation"
    same(model, result, (2, 3, 4, 5))


def test_normalize_lists_initializers_as_inputs_below_ir_4() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["h"], "conv")
    model = chain([conv, batchnorm()], [1, 6, 5, 5], {"w": random(6, 6, 1, 1)} | statistics(6), ir=3)
    result, _ = normalize.normalize(model, [{"x": random(1, 6, 5, 5)}], run)
    assert ops(result) == ["Conv"]
    stored = {tensor.name for tensor in result.graph.initializer}
    assert {value.name for value in result.graph.input} == {"x"} | stored
    assert len(stored) == 2


def doubles(model: ModelProto) -> tuple[ModelProto, list[str]]:
    wrong = graph.with_arrays(model, {"weight": 2 * graph.arrays(model)["weight"]})
    return wrong, ["weight doubled"]


def invalid(model: ModelProto) -> tuple[ModelProto, list[str]]:
    wrong = graph.copied(model)
    wrong.graph.node[0].op_type = "NoSuchOperator"
    return wrong, ["operator renamed"]


def raises(model: ModelProto) -> tuple[ModelProto, list[str]]:
    raise SystemExit("gave up")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (doubles, "undone: output 'y' differs by"),
        (invalid, "undone: No Op registered for NoSuchOperator"),
        (raises, "undone: gave up"),
    ],
)
def test_normalize_undoes_a_pass_that_breaks_the_model(
    monkeypatch: pytest.MonkeyPatch,
    step: Callable[[ModelProto], tuple[ModelProto, list[str]]],
    words: str,
) -> None:
    monkeypatch.setattr(normalize, "NORMALIZE", (step,))
    model = described()
    result, notes = normalize.normalize(model, [{"x": random(1, 3, 4, 4)}], run)
    assert result == model
    assert len(notes) == 1
    assert words in notes[0]


def test_relative_error() -> None:
    assert normalize.relative_error(np.array([1.0, -4.0]), np.array([1.0, -4.4])) == pytest.approx(0.1)
    assert normalize.relative_error(np.array([1, 2]), np.array([1, 2])) == 0
    assert normalize.relative_error(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert normalize.relative_error(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == 0
    assert normalize.relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) == np.inf
    assert not normalize.relative_error(np.array([1.0]), np.array([np.nan])) <= 1


def test_many_notes_become_one_line() -> None:
    notes = [f"BatchNormalization bn{k} folded into Conv conv{k}" for k in range(5)] + ["Identity i dropped"]
    assert normalize.summarized(notes) == ["5 BatchNormalization folded into Conv", "Identity i dropped"]


@pytest.mark.parametrize(("name", "left"), [("cifar10_resnet20_akamaster_bn", 0), ("mnist_burn_pytorch_bn", 1)])
def test_real_models_lose_their_batchnorms(shared: Path, name: str, left: int) -> None:
    model = graph.load(shared / "models" / f"{name}.onnx").model
    shapes = graph.fixed_shapes(model, {})
    sample: dict[str, NDArray[np.generic]] = {key: random(*shape) for key, shape in shapes.items()}
    result, _ = normalize.normalize(model, [sample], run)
    assert ops(result).count("BatchNormalization") == left
    for before, after in zip(run(model, sample), run(result, sample), strict=True):
        assert normalize.relative_error(before, after) < 1e-5
