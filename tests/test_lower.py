from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxneutrino import graph, passes
from onnxneutrino.passes import (
    drop_identity,
    free_batch,
    lower_auto_pad,
    lower_batchnorm,
    lower_constants,
)
from onnxneutrino.runtime import Runner


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_every_module_is_in_a_tuple_or_listed() -> None:
    modules = {path.stem for path in Path(passes.__file__).parent.glob("*.py")} - {"__init__"}
    ordered = {step.__module__.rpartition(".")[2] for step in (*passes.NORMALIZE, *passes.LOWER_FIRST, *passes.LOWER)}
    assert ordered.isdisjoint(passes.OTHERS)
    assert ordered | set(passes.OTHERS) == modules


def test_constants_become_initializers_outside_the_inputs() -> None:
    model = parse_model(
        """
        <ir_version: 3, opset_import: ["" : 13]>
        net (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> {
            c = Constant <value_float = 3.0> ()
            h = Mul (x, w)
            y = Add (h, c)
        }
        """
    )
    lowered, notes = lower_constants.run(model)
    assert ops(lowered) == ["Mul", "Add"]
    assert [value.name for value in lowered.graph.input] == ["x"]
    assert len(notes) == 1
    np.testing.assert_array_equal(Runner(lowered)({"x": np.ones(2, np.float32)})[0], [4, 5])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_batchnorm_becomes_mul_and_add(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    gamma, beta, mean = rng.standard_normal((3, 3)).astype(np.float32)
    variance = rng.random(3).astype(np.float32) + 0.1
    tensors = zip(("g", "b", "m", "v"), (gamma, beta, mean, variance), strict=True)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Neg", ["x"], ["h"], "neg"),
                helper.make_node("BatchNormalization", ["h", "g", "b", "m", "v"], ["y"], "bn", epsilon=0.01),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape[1:]])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *shape[1:]])],
            [numpy_helper.from_array(value, name) for name, value in tensors],
        ),
        opset_imports=[helper.make_opsetid("", 15)],
        ir_version=8,
    )
    lowered, notes = lower_batchnorm.run(model)
    assert ops(lowered) == ["Neg", "Mul", "Add"]
    assert notes == ["BatchNormalization bn lowered to Mul and Add"]
    x = rng.standard_normal(shape).astype(np.float32)
    column = (3, *(1,) * (len(shape) - 2))
    scale = gamma / np.sqrt(variance + 0.01)
    expected = (-x - mean.reshape(column)) * scale.reshape(column) + beta.reshape(column)
    np.testing.assert_allclose(Runner(lowered)({"x": x})[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Runner(model)({"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def windowed(op: str, mode: str, size: int, kernel: int, stride: int, dilation: int) -> ModelProto:
    attributes = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "auto_pad": mode}
    tensors = []
    names = ["x"]
    if op == "Conv":
        weight = np.random.default_rng(1).standard_normal((2, 3, kernel, kernel)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weight, "w"))
        names.append("w")
    if dilation > 1:
        attributes["dilations"] = [dilation, dilation]
    body = helper.make_graph(
        [helper.make_node(op, names, ["y"], "op", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, size, size + 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", None, None, None])],
        tensors,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("op", ["Conv", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 1), (8, 3, 2), (9, 2, 2), (8, 5, 3), (6, 1, 2)])
def test_auto_pad_written_out_gives_the_same(op: str, mode: str, size: int, kernel: int, stride: int) -> None:
    model = windowed(op, mode, size, kernel, stride, 1)
    lowered, _ = lower_auto_pad.run(model)
    assert "auto_pad" not in graph.attributes(lowered.graph.node[0])
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, size, size + 1)).astype(np.float32)}
    np.testing.assert_allclose(Runner(lowered)(x)[0], Runner(model)(x)[0], rtol=1e-5, atol=1e-6)


def test_same_padding_counts_the_dilated_kernel() -> None:
    model = windowed("Conv", "SAME_UPPER", 8, 3, 1, 2)
    lowered, _ = lower_auto_pad.run(model)
    assert list(graph.attributes(lowered.graph.node[0])["pads"].ints) == [2, 2, 2, 2]
    # The runtime has no dilated SAME to compare with; what SAME means is that the size stays.
    (y,) = Runner(lowered)({"x": np.ones((1, 3, 8, 9), np.float32)})
    assert y.shape == (1, 2, 8, 9)


def test_same_padding_of_unknown_size_is_kept_with_a_note() -> None:
    model = windowed("Conv", "SAME_UPPER", 8, 3, 2, 1)
    graph.set_shape(model.graph.input[0], ["N", 3, "h", "w"])
    lowered, notes = lower_auto_pad.run(model)
    assert graph.attributes(lowered.graph.node[0])["auto_pad"].s == b"SAME_UPPER"
    assert notes == ["Conv op keeps auto_pad=SAME_UPPER: its kernel or input size is unknown"]


def test_identity_and_dropout_leave_outputs_and_captures_right() -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2] x, bool c) => (float[2] y, float[2] z, float[2] w) {
            a = Neg (x)
            b = Identity (a)
            d, mask = Dropout (b)
            y = Identity (d)
            z = If (c) <
                then_branch = p () => (float[2] t) { t = Abs (b) },
                else_branch = q () => (float[2] e) { e = Exp (d) }>
            w = Identity (x)
        }
        """
    )
    dropped, _ = drop_identity.run(model)
    # `w` renames a graph input: that Identity has to stay.
    assert sorted(ops(dropped)) == ["Identity", "If", "Neg"]
    for flag in (True, False):
        feed = {"x": np.array([1.0, -2.0], np.float32), "c": np.array(flag)}
        for new, old in zip(Runner(dropped)(feed), Runner(model)(feed), strict=True):
            np.testing.assert_array_equal(new, old)


RESHAPES = """
<ir_version: 8, opset_import: ["" : 13]>
net (float[1, 2, 3, 4] x) => (float[1, 24] y, float[1, 2, 12] z, float[1, 2, 6, 8] r)
<int64[2] flat = {1, -1}, int64[3] map = {1, 2, 12}, int64[4] sizes = {1, 2, 6, 8}, float[0] none = {}>
{
    y = Reshape (x, flat)
    z = Reshape (x, map)
    r = Resize <mode = "nearest"> (x, none, none, sizes)
}
"""


def test_free_batch_runs_three_as_three_single_runs() -> None:
    model = parse_model(RESHAPES)
    freed, notes = free_batch.run(model)
    assert len(notes) == 4
    assert graph.declared_shape(freed.graph.input[0]) == ("batch", 2, 3, 4)
    assert graph.declared_shape(freed.graph.output[2]) == ("batch", 2, 6, 8)
    x = np.random.default_rng(0).standard_normal((3, 2, 3, 4)).astype(np.float32)
    together = Runner(freed)({"x": x})
    for index in range(3):
        for whole, single in zip(together, Runner(model)({"x": x[index : index + 1]}), strict=True):
            np.testing.assert_array_equal(whole[index : index + 1], single)


def test_free_batch_leaves_a_free_batch_alone() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> net (float[N, 2] x) => (float[N, 2] y) { y = Neg (x) }'
    )
    freed, notes = free_batch.run(model)
    assert freed == model
    assert notes == []
