"""Training copies of old opsets, fixed and symbolic batches: the same function, and the right gradient."""

from __future__ import annotations

import numpy as np
import pytest
from models_drawn import drawn
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino.differentiable import untrainable
from onnxneutrino.errors import TrainingError
from onnxneutrino.finetune import Example, Trainer, consumed
from onnxneutrino.graph import arrays, opset, with_arrays
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import check_training_copy, training_copy

BATCH = 3
STEP = 3e-3
VALUES = Loss("values", ("y",))

# Each body computes y (N, 4) from x (N, 4, 6, 6) through two trained Convs w0 and w1.
TAIL = """
        d = Conv (n, w1)
        g = GlobalAveragePool (d)
        s = Constant <value = int64[2] {0, -1}> ()
        y = Reshape (g, s)
"""
BODIES = {
    "clip attributes": (7, 10, "n = Clip <min = -0.5, max = 0.7> (c)"),
    "clip inputs": (
        11,
        12,
        "low = Constant <value = float {-0.5}> () high = Constant <value = float {0.7}> () n = Clip (c, low, high)",
    ),
    "clip with one bound": (11, 13, "low = Constant <value = float {0.1}> () n = Clip (c, low)"),
    "batch normalization 7": (
        7,
        8,
        "r = Tanh (c) n = BatchNormalization <epsilon = 0.01> (r, gamma, offset, mean, var)",
    ),
    "batch normalization 9": (9, 13, "r = Tanh (c) n = BatchNormalization (r, gamma, offset, mean, var)"),
    "dropout": (7, 11, "r = Tanh (c) n = Dropout <ratio = 0.5> (r)"),
    "dropout 12": (12, 13, "r = Tanh (c) p = Constant <value = float {0.5}> () n = Dropout (r, p)"),
    "pad attribute": (7, 10, "r = Tanh (c) n = Pad <pads = [0,0,1,0,0,0,2,1], value = 0.3> (r)"),
    "squeeze attributes": (7, 12, "r = Tanh (c) u = Unsqueeze <axes = [1]> (r) n = Squeeze <axes = [1]> (u)"),
    "reduce sum attribute": (7, 12, "m = ReduceSum <axes = [2], keepdims = 1> (c) t = Tanh (m) n = Mul (c, t)"),
    "softmax over flattened axes": (7, 12, "r = Softmax <axis = 1> (c) n = Mul (r, c)"),
    "split and slice attributes": (
        7,
        9,
        "a, b = Split <axis = 1, split = [1, 3]> (c) k = Concat <axis = 1> (b, a)"
        " z = Slice <axes = [2], starts = [0], ends = [3]> (k) n = Tanh (z)",
    ),
    "max pool and average pool": (
        7,
        13,
        "p = MaxPool <kernel_shape = [2,2]> (c)"
        " n = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (p)",
    ),
}
CASES = [(name, version) for name, (first, last, _) in BODIES.items() for version in sorted({first, last})]


def net(body: str, version: int, batch: str = "N", ir: int = 8, seed: int = 0) -> ModelProto:
    listed = {"w0": [4, 4, 3, 3], "w1": [4, 4, 1, 1], "gamma": [4], "offset": [4], "mean": [4], "var": [4]}
    text = f"""
        <ir_version: {ir}, opset_import: ["" : {version}]>
        net (float[{batch},4,6,6] x) => (float[{batch},4] y)
        {{ c = Conv <pads = [1,1,1,1]> (x, w0) {body} {TAIL} }}
    """
    model = parse_model(text)
    rng = np.random.default_rng(seed)
    used = {name for node in model.graph.node for name in node.input}
    for name, shape in listed.items():
        if name in used:
            array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            array = np.abs(array) + 0.5 if name == "var" else array
            model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
            if ir < 4:
                entry = model.graph.input.add()
                entry.name = name
                entry.type.tensor_type.elem_type = 1
                for size in shape:
                    entry.type.tensor_type.shape.dim.add().dim_value = size
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def inputs(batch: int = BATCH) -> dict[str, NDArray[np.float32]]:
    return {"x": np.random.default_rng(1).standard_normal((batch, 4, 6, 6)).astype(np.float32)}


def slope(model: ModelProto, name: str, direction: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Central difference of the squared error of `model` itself, run by ONNX Runtime.

    ONNX's reference is no judge here: it runs old BatchNormalization on batch statistics and old Softmax over
    one axis.
    """
    losses = []
    for sign in (1, -1):
        moved = with_arrays(model, {name: arrays(model)[name] + sign * np.float32(STEP) * direction})
        (y,) = Runner(moved, threads=1)(inputs())
        losses.append(float(np.mean((np.asarray(y, np.float64) - target) ** 2)))
    return (losses[0] - losses[1]) / (2 * STEP)


@pytest.mark.parametrize(("name", "version"), CASES)
def test_old_opsets_keep_function_and_gradient(name: str, version: int) -> None:
    model = net(BODIES[name][2], version, ir=3 if version < 9 else 7)
    before = model.SerializeToString()
    copy = training_copy(model, BATCH)
    assert model.SerializeToString() == before
    assert (opset(copy) or 0) >= 13
    check_training_copy(model, copy, inputs(), 1)
    target = np.random.default_rng(2).standard_normal((BATCH, 4)).astype(np.float32)
    with Trainer(copy, ["w0", "w1"], VALUES, 1) as trainer:
        assert trainer.batch == BATCH
        gradients = trainer.gradients(Example(inputs(), [target], None))
    for weight, gradient in gradients.items():
        norm = float(np.linalg.norm(gradient))
        assert norm > 1e-4
        direction = np.asarray(gradient / norm, np.float32)
        assert slope(model, weight, direction, target) == pytest.approx(norm, rel=1e-2), weight


@pytest.mark.parametrize("batch", ["N", "1", "7"])
@pytest.mark.parametrize("version", [9, 17])
def test_the_batch_is_fixed_to_what_is_asked(batch: str, version: int) -> None:
    model = net("n = Relu (c)", version, batch)
    copy = training_copy(model, 5)
    (value,) = copy.graph.input
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [5, 4, 6, 6]
    reference = net("n = Relu (c)", version, "N")
    check_training_copy(reference, copy, inputs(5), 1)


def test_average_pool_with_a_symbolic_batch_trains() -> None:
    """With a symbolic batch the runtime's gradient of AveragePool kills the process (ONNX Runtime 1.19.2)."""
    copy = training_copy(net("n = AveragePool <kernel_shape = [2,2]> (c)", 13), BATCH)
    with Trainer(copy, ["w0"], VALUES, 1) as trainer:
        gradient = trainer.gradients(Example(inputs(), [np.zeros((BATCH, 4), np.float32)], None))["w0"]
    assert np.linalg.norm(gradient) > 0


def test_initializers_keep_their_names_and_values() -> None:
    model = net("n = Clip <min = 0.0, max = 6.0> (c)", 7, ir=3)
    copy = training_copy(model, BATCH)
    for name in ("w0", "w1"):
        np.testing.assert_array_equal(arrays(copy)[name], arrays(model)[name])
    assert [value.name for value in copy.graph.input] == ["x"]


def test_a_copy_that_computes_something_else_is_refused() -> None:
    model = net("n = Relu (c)", 13)
    copy = training_copy(model, BATCH)
    wrong = with_arrays(copy, {"w1": np.full((4, 4, 1, 1), 0.1, np.float32)})
    check_training_copy(model, copy, inputs(), 1)
    with pytest.raises(TrainingError, match=r"output 'y' .* differs") as caught:
        check_training_copy(model, wrong, inputs(), 1)
    assert "\n" not in str(caught.value)
    broken = with_arrays(copy, {"w1": np.full((4, 4, 1, 1), np.nan, np.float32)})
    with pytest.raises(TrainingError, match="differs"):
        check_training_copy(model, broken, inputs(), 1)


def test_an_operator_that_cannot_be_converted_is_named() -> None:
    text = """
        <ir_version: 7, opset_import: ["" : 9]>
        net (float[N,4,6,6] x) => (float[N,4,6,6] y) { a = Relu (x)  y = NoSuchOperator (a) }
    """
    with pytest.raises(TrainingError, match=r"NoSuchOperator.*--trainer none") as caught:
        training_copy(parse_model(text), BATCH)
    assert "\n" not in str(caught.value)


# --- what can be trained in a copy


@pytest.mark.parametrize("operator", ["Sign", "Floor", "Atan"])
def test_an_operator_without_gradient_is_refused_only_where_a_gradient_must_pass(operator: str) -> None:
    text = """
        net (float[N,4] x) => (float[N,4] y) <float[4,4] w0, float[4,4] w1>
        { a = MatMul (x, w0)  b = OPERATOR (a)  y = MatMul (b, w1) }
    """
    model = training_copy(drawn(text.replace("OPERATOR", operator)), BATCH)
    assert untrainable(model, ["w0", "w1"], ["y"]) == [(f"{operator}_1", operator)]
    with pytest.raises(TrainingError, match=rf"node '{operator}_1'.*{operator}") as caught:
        Trainer(model, ["w0", "w1"], VALUES, 1)
    assert "\n" not in str(caught.value)
    assert untrainable(model, ["w1"], ["y"]) == []
    own = Example({"x": np.ones((BATCH, 4), np.float32)}, [np.zeros((BATCH, 4), np.float32)], None)
    with Trainer(model, ["w1"], VALUES, 1) as trainer:
        assert np.linalg.norm(trainer.gradients(own)["w1"]) > 0
        assert trainer.trainable == ["w1"]


def test_what_the_loss_does_not_depend_on_is_neither_refused_nor_trained() -> None:
    text = """
        net (float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4,4] w0, float[4,4] w1>
        { y = MatMul (x, w0)  a = MatMul (y, w1)  z = Sign (a) }
    """
    model = training_copy(drawn(text), BATCH)
    assert untrainable(model, ["w0", "w1"], ["y"]) == []
    assert untrainable(model, ["w0", "w1"], ["y", "z"]) == [("Sign_2", "Sign")]
    assert consumed(model, ["w0", "w1"]) == ["w0", "w1"]
    with Trainer(model, ["w0", "w1"], VALUES, 1) as trainer:
        assert sorted(trainer.arrays()) == ["w0"]


@pytest.mark.parametrize(
    ("node", "right"),
    [
        ('Pad <mode = "constant"> (a, pads)', True),
        ('Pad <mode = "reflect"> (a, pads)', False),
        ("Pad (a, pads)", True),
        ('Conv <auto_pad = "SAME_UPPER"> (a, w1)', False),
        ('Conv <auto_pad = "VALID"> (a, w1)', True),
        ("Conv (a, w1)", True),
    ],
)
def test_attributes_decide_where_they_change_the_gradient(node: str, right: bool) -> None:
    text = f"""
        net (float[N,4,5,5] x) => (float[N,4,h,w] y)
        <float[4,4,1,1] w0, float[4,4,3,3] w1, int64[8] pads = {{0,0,1,1,0,0,1,1}}>
        {{ a = Conv (x, w0)  y = {node} }}
    """
    assert (untrainable(drawn(text), ["w0"], ["y"]) == []) is right


def test_what_the_runtime_refuses_is_one_line_and_leaves_nothing() -> None:
    model = training_copy(net("n = Relu (c)", 13), BATCH)
    with pytest.raises(TrainingError, match="refuses the model") as caught:
        Trainer(model, [], VALUES, 1)
    assert "\n" not in str(caught.value)
