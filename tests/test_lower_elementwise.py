"""Lowered activations and elementwise operators, where a finite difference of the runtime cannot show it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.losses import Loss
from onnxneutrino.passes import (
    Pass,
    lower_cast,
    lower_clip,
    lower_cumsum,
    lower_gelu,
    lower_piecewise,
    lower_pow,
    lower_where,
)
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

POINTS = 81


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def gradient(body: str, x: np.ndarray, opset: int = 20) -> np.ndarray:
    """dy/dx at every point of `x` `[1, POINTS]`, from the training artifacts of `y = f(x)`."""
    size = x.size
    model = parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]>'
        f"g (float[1,{size}] given) => (float[1,{size}] y) {{ x = Add (given, zero) {body} }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, size), np.float32), "zero"))
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
    y = Runner(model)({"given": x})[0]
    # With targets y - size / 2 the derivative of the mean square with respect to each y is one.
    example = Example({"given": x}, [np.asarray(y) - np.float32(size / 2)], None)
    with Trainer(training_copy(model, 1), ["zero"], Loss("values", ("y",)), 1) as trainer:
        return np.asarray(trainer.gradients(example)["zero"], np.float64)


def test_gelu_has_the_gradient_of_its_own_form() -> None:
    x = np.linspace(-4, 4, POINTS, dtype=np.float32)[None]
    wide = x.astype(np.float64)
    density = np.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
    exact = 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) + wide * density
    rate = math.sqrt(2 / math.pi)
    gate = np.tanh(rate * (wide + 0.044715 * wide**3))
    rough = 0.5 * (1 + gate) + 0.5 * wide * (1 - gate**2) * rate * (1 + 3 * 0.044715 * wide**2)
    assert np.abs(exact - rough).max() > 5e-4  # the two are told apart
    np.testing.assert_allclose(gradient("y = Gelu (x)", x), exact, atol=2e-6)
    np.testing.assert_allclose(gradient('y = Gelu <approximate = "tanh"> (x)', x), rough, atol=2e-6)


@pytest.mark.parametrize(
    ("body", "opset", "slopes"),
    [
        ("y = Elu (x)", 13, (0, 1, 1)),
        ("y = Celu <alpha = 2.0> (x)", 13, (0, 1, 1)),
        ("y = Softplus (x)", 13, (0, 0.5, 1)),
        ("y = Mish (x)", 18, (0, 0.6, 1)),
        ("y = Softsign (x)", 13, (0, 1, 0)),
        ("y = Gelu (x)", 20, (0, 0.5, 1)),
    ],
)
def test_far_out_and_at_zero_the_slope_is_the_limit(body: str, opset: int, slopes: tuple[float, ...]) -> None:
    x = np.array([[-1e4, 0, 1e4]], np.float32)
    np.testing.assert_allclose(gradient(body, x, opset)[0], slopes, atol=1e-6)


def test_swish_becomes_x_times_a_gate() -> None:
    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[2,5] x) => (float[2,5] y) { y = Swish <alpha = 1.5> (x) }'
    )
    lowered, _ = lower_gelu.run(model)
    assert ops(lowered) == ["Mul", "Sigmoid", "Mul"]
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    (y,) = ReferenceEvaluator(lowered).run(None, {"x": x})
    np.testing.assert_allclose(np.asarray(y, np.float64), x / (1 + np.exp(-1.5 * x)), rtol=1e-5)


@pytest.mark.parametrize(
    ("lower", "body", "reason"),
    [
        (lower_pow.run, "y = Pow (x, two)", "its own gradient is right"),
        (lower_clip.run, "y = Clip (x, two)", "its own gradient is right"),
        (lower_piecewise.run, "y = LeakyRelu (x)", "its own gradient is right"),
        (lower_where.run, "m = Less (x, two) y = Where (m, x, two)", "its branches have its output's shape"),
        (lower_cast.run, "i = Cast <to = 7> (x) y = Identity (x)", "it changes the type"),
        (lower_cumsum.run, "i = Cast <to = 7> (x) s = CumSum (i, one) y = Cast <to = 1> (s)", "its input is not float"),
    ],
)
def test_what_is_right_already_is_kept(lower: Pass, body: str, reason: str) -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 14]> g (float[2,3] x) => (float[2,3] y)'
        f"<float two = {{2}}, int64 one = {{1}}> {{ {body} }}"
    )
    lowered, notes = lower(model)
    assert ops(lowered) == ops(model)
    assert len(notes) == 1
    assert notes[0].endswith(f"kept: {reason}")


def test_pow_with_a_computed_exponent_computes_the_same_for_every_base() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 14]> g (float[6] a, float[6] b) => (float[6] y) { y = Pow (a, b) }'
    )
    lowered, _ = lower_pow.run(model)
    assert ops(lowered).count("Exp") == 1
    inputs = {
        "a": np.array([-2, -2, 0, 0, 3, 3], np.float32),
        "b": np.array([3, -2, 0.5, 2, -1.5, 0], np.float32),
    }
    np.testing.assert_allclose(
        np.asarray(Runner(lowered)(inputs)[0], np.float64), [-8, 0.25, 0, 0, 3**-1.5, 1], rtol=1e-6
    )


def test_cumsum_over_a_long_axis_is_kept() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 14]> g (float[1,5000] x) => (float[1,5000] y)'
        "<int64 one = {1}> { y = CumSum (x, one) }"
    )
    lowered, notes = lower_cumsum.run(model)
    assert ops(lowered) == ["CumSum"]
    assert notes[0].endswith("kept: its axis has 5000 elements, more than 4096")
