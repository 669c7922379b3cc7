"""K-FAC's output factor equals the second moment of gradients worked out by hand, and serves the fits."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxneutrino.curvature import SUFFIX, _draw, output_curvature, with_zeros
from onnxneutrino.graph import fixed_shapes, tensor_types
from onnxneutrino.losses import Loss, softmax
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Layer
from onnxneutrino.runtime import Runner

BATCH, CHANNELS, SIDE, FEATURES, CLASSES = 16, 8, 6, 32, 10
GENERATOR = np.random.default_rng(0)
WEIGHT = GENERATOR.standard_normal((FEATURES, CHANNELS, 3, 3)).astype(np.float32) * 0.3
HEAD = GENERATOR.standard_normal((CLASSES, FEATURES)).astype(np.float32)


def network() -> ModelProto:
    """Conv, mean over the map, Gemm: linear up to the softmax, so that gradients are short formulas."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["features"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "head", "bias"], ["logits"], name="gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [BATCH, CLASSES])],
        [
            numpy_helper.from_array(WEIGHT, "w"),
            numpy_helper.from_array(HEAD, "head"),
            numpy_helper.from_array(np.zeros(CLASSES, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def inputs(count: int) -> list[dict[str, NDArray[np.float32]]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((BATCH, CHANNELS, SIDE, SIDE)).astype(np.float32)} for _ in range(count)]


def layers(model: ModelProto) -> list[Layer]:
    found = find_layers(model, tensor_types(model, fixed_shapes(model, {})))
    assert all(isinstance(layer, Layer) for layer in found)
    return [layer for layer in found if isinstance(layer, Layer)]


def test_it_is_the_second_moment_of_the_gradients() -> None:
    model, batches = network(), inputs(5)
    found = layers(model)
    teacher = Runner(model)
    curvature = output_curvature(model, BATCH, found, Loss("classes", ("logits",)), batches, teacher, 1, seed=3)
    generator = np.random.default_rng(3)
    logit_moment = np.zeros((CLASSES, CLASSES))
    for batch in batches:
        logits = np.asarray(teacher(batch)[0], np.float32)
        # Cross entropy: the gradient at the logits is softmax - one-hot.
        gradient = softmax(logits).astype(np.float64)
        gradient[np.arange(BATCH), _draw(logits, generator)] -= 1
        logit_moment += gradient.T @ gradient
    logit_moment /= BATCH * len(batches)
    # The mean over P positions hands 1 / P of the gradient to each of P positions: their moments sum to 1 / P.
    positions = SIDE * SIDE
    np.testing.assert_allclose(curvature["gemm"], logit_moment, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(curvature["conv"], HEAD.T @ logit_moment @ HEAD / positions, rtol=1e-3, atol=1e-6)


def test_with_many_draws_it_is_the_fisher_information() -> None:
    model, batches = network(), inputs(1) * 200
    teacher = Runner(model)
    found = output_curvature(model, BATCH, layers(model), Loss("classes", ("logits",)), batches, teacher, 1, seed=0)
    p = softmax(np.asarray(teacher(batches[0])[0], np.float32)).astype(np.float64)
    fisher = np.mean([np.diag(row) - np.outer(row, row) for row in p], axis=0)
    assert np.linalg.norm(found["gemm"] - fisher) < 0.1 * np.linalg.norm(fisher)


def test_labels_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.2], np.float32)), (20000, 1))
    drawn = _draw(logits, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20000, [0.5, 0.3, 0.2], atol=0.015)


def test_the_added_zeros_change_nothing() -> None:
    model = network()
    batch = inputs(1)[0]
    probed = with_zeros(model, {"features": (BATCH, FEATURES, SIDE, SIDE), "logits": (BATCH, CLASSES)})
    assert {"features" + SUFFIX, "logits" + SUFFIX} <= {entry.name for entry in probed.graph.initializer}
    np.testing.assert_allclose(Runner(probed)(batch)[0], Runner(model)(batch)[0], rtol=1e-4, atol=1e-5)
