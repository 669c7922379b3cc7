"""The loss in the graph is the formula of its docstring, computed again with NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.parser import parse_model

from onnxneutrino.graph import with_batch
from onnxneutrino.losses import Loss, loss_inputs, softmax, teacher_loss, with_loss
from onnxneutrino.runtime import Runner

TWO_OUTPUTS = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3] x) => (float[M,3] y, float[N,3,1] z)
    {
        y = Mul (x, x)
        axes = Constant <value_ints = [2]> ()
        z = Unsqueeze (x, axes)
    }
"""


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_graph(model: ModelProto, loss: Loss, x: NDArray[np.float32], targets: dict[str, NDArray[np.float32]]) -> float:
    built, names = with_loss(with_batch(model, len(x)), loss)
    onnx.checker.check_model(built, full_check=True)
    runner = Runner(built)
    assert runner.inputs == names
    assert runner.names == ["onnxneutrino/loss"]
    return float(np.asarray(runner({"x": x, **targets})[0]))


def log_softmax(z: NDArray[np.floating]) -> NDArray[np.float64]:
    z = np.asarray(z, np.float64)
    return np.asarray(z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
def test_classes_are_cross_entropy_and_softened_teacher(weight: float | None, temperature: float) -> None:
    model = parse_model(TWO_OUTPUTS)
    x, teacher = normal(5, 3), normal(5, 3, seed=1)
    labels = None if weight is None else np.array([0, 2, 1, 1, 0])
    loss = Loss("classes", ("y",), label_weight=0.3 if weight is None else weight, temperature=temperature)
    z = x.astype(np.float64) ** 2
    share = 0.0 if weight is None else weight
    hard = 0.0 if labels is None else float(np.mean(log_softmax(z)[np.arange(5), labels]))
    p = np.exp(log_softmax(teacher / temperature))
    soft = float(np.mean(np.sum(p * log_softmax(z / temperature), axis=1)))
    expected = -(share * hard + (1 - share) * temperature**2 * soft)
    assert in_graph(model, loss, x, loss_inputs(loss, [teacher], labels)) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_itself_has_the_least_soft_loss() -> None:
    loss = Loss("classes", ("y",))
    x = normal(6, 3)
    teacher = x * x
    own = in_graph(parse_model(TWO_OUTPUTS), loss, x, loss_inputs(loss, [teacher], None))
    for seed in range(5):
        other = x + 0.1 * normal(6, 3, seed=seed + 2)
        assert in_graph(parse_model(TWO_OUTPUTS), loss, other, loss_inputs(loss, [teacher], None)) > own


def test_values_are_squared_errors_averaged_over_the_outputs() -> None:
    loss = Loss("values", ("y", "z"))
    x, y, z = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, 1, seed=2)
    expected = 0.5 * (np.mean((x**2 - y) ** 2) + np.mean((x[..., None] - z) ** 2))
    assert in_graph(parse_model(TWO_OUTPUTS), loss, x, loss_inputs(loss, [y, z], None)) == pytest.approx(expected)


def test_the_loss_may_be_taken_on_an_inner_tensor_and_leaves_the_model_alone() -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,3] x) => (float[N,3] p) { z = Mul (x, x)  p = Softmax (z) }
        """
    )
    before = model.SerializeToString()
    x, teacher = normal(5, 3), normal(5, 3, seed=1)
    loss = Loss("classes", ("z",), temperature=1.0)
    expected = -np.mean(np.sum(softmax(teacher) * log_softmax(x**2), axis=1))
    assert in_graph(model, loss, x, loss_inputs(loss, [teacher], None)) == pytest.approx(expected, rel=1e-5)
    assert model.SerializeToString() == before


def test_initializers_listed_as_inputs_are_no_inputs_of_the_loss() -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2,2] w, float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }
        """
    )
    _, names = with_loss(model, Loss("values", ("y",)))
    assert names == ["x", "onnxneutrino/target0"]


def test_softmax_holds_large_logits() -> None:
    found = softmax(np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], np.float32))
    np.testing.assert_allclose(found, np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "none", "values"])
def test_the_teachers_loss_is_that_of_a_student_that_computes_the_same(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 3)).astype(np.float32)
    loss = Loss("values" if kind == "values" else "classes", ("y",), label_weight=0.4, temperature=2.0)
    labels = rng.integers(0, 3, 6) if kind == "labels" else None
    given = loss_inputs(loss, [x * x], labels)
    wanted = in_graph(parse_model(TWO_OUTPUTS), loss, x, given)
    assert teacher_loss(loss, [x * x], given) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
