"""What the cases of fixtures/operators cannot show of the lowered normalizations, reductions, pools and products."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino.differentiable import untrainable
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.graph import inferred
from onnxneutrino.losses import Loss
from onnxneutrino.passes import (
    lower_einsum,
    lower_group_conv,
    lower_lrn,
    lower_matmul,
    lower_normalization,
    lower_pool,
    lower_reduce,
)
from onnxneutrino.runtime import Runner


def parsed(graph: str, opset: int = 13) -> ModelProto:
    model = parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("graph", "opset", "why"),
    [
        ("g (int64[2,3] x) => (int64[2,1] y) { y = ReduceMax <axes = [1]> (x) }", 13, "'x' is not float32"),
        ("g (float[2,n] x) => (float[2,1] y) { y = ReduceMax <axes = [1]> (x) }", 13, "the shape of 'x' is unknown"),
        ("g (float[2,3] x, int64[1] a) => (float[2,1] y) { y = ReduceL1 (x, a) }", 18, "computed at run time"),
        ("g (float[2,3] x) => (float[2,3] y) { y = ReduceProd <noop_with_empty_axes = 1> (x) }", 18, "it has no axes"),
    ],
)
def test_a_reduction_that_cannot_be_lowered_is_kept_with_its_reason(graph: str, opset: int, why: str) -> None:
    model = parsed(graph, opset)
    lowered, notes = lower_reduce.run(model)
    assert ops(lowered) == ops(model)
    (note,) = notes
    assert why in note
    assert model.graph.node[0].name in note


@pytest.mark.parametrize("size", [2, 4])
def test_lrn_of_even_size_reaches_one_channel_further_up(size: int) -> None:
    # ONNX Runtime runs odd sizes only, so this one is held to its formula.
    model = parsed(f"g (float[2,5,3,2] x) => (float[2,5,3,2] y) {{ y = LRN <size = {size}, alpha = 0.8> (x) }}")
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 2)).astype(np.float32)
    sums = np.zeros_like(x)
    for channel in range(5):
        first, last = max(channel - (size - 1) // 2, 0), min(channel + size // 2, 4)
        sums[:, channel] = (x[:, first : last + 1] ** 2).sum(1)
    (got,) = Runner(lower_lrn.run(model)[0])({"x": x})
    np.testing.assert_allclose(np.asarray(got, np.float32), x / (1 + 0.8 / size * sums) ** 0.75, rtol=1e-5)


def test_scores_of_attention_are_one_product() -> None:
    model = parsed(
        "g (float[2,3,4,5] q, float[2,3,6,5] k) => (float[2,3,4,6] y) "
        '{ y = Einsum <equation = "bhqd,bhkd->bhqk"> (q, k) }'
    )
    lowered, _ = lower_einsum.run(model)
    assert sorted(set(ops(lowered))) == ["Identity", "MatMul", "Reshape", "Transpose"]
    assert ops(lowered).count("MatMul") == 1
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 3, size, 5)).astype(np.float32) for size in (4, 6))
    (got,) = Runner(lowered)({"q": q, "k": k})
    np.testing.assert_allclose(np.asarray(got, np.float32), np.einsum("bhqd,bhkd->bhqk", q, k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ijk->i", "i->i"])
def test_an_equation_that_does_not_fit_is_kept(equation: str) -> None:
    model = parsed(f'g (float[2,3] x) => (float[2] y) {{ y = Einsum <equation = "{equation}"> (x) }}')
    lowered, notes = lower_einsum.run(model)
    assert ops(lowered) == ["Einsum"]
    assert "does not fit" in notes[0]
    assert untrainable(lowered, ["x"], ["y"]) == [("Einsum_0", "Einsum")]


def test_a_product_of_matrices_stays_as_it_is() -> None:
    model = parsed("g (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul (x, w) }")
    assert lower_matmul.run(model)[0] is model


def test_a_conv_with_groups_stays_where_its_gradient_is_right() -> None:
    model = parsed("g (float[2,4,5,5] x, float[4,1,3,3] w) => (float[2,4,3,3] y) { y = Conv <group = 4> (x, w) }")
    assert lower_group_conv.run(model)[0] is model


def test_a_pool_of_unknown_shape_with_a_wrong_gradient_is_refused() -> None:
    model = parsed("g (float[n,2,d,h,w] x) => (float[n,2,e,i,j] y) { y = AveragePool <kernel_shape = [2,2,2]> (x) }")
    lowered, _ = lower_pool.run(model)
    assert untrainable(lowered, ["x"], ["y"]) == [("AveragePool_0", "AveragePool")]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ("kernel_shape = [5,5], pads = [2,2,2,2]", 2),
        ("kernel_shape = [7,7], pads = [3,1,1,2], strides = [2,1], ceil_mode = 1", 2),
        ("kernel_shape = [5,5], pads = [4,4,4,4], dilations = [2,2], storage_order = 1", 2),
        ("kernel_shape = [3,3], storage_order = 1", 1),
        ("kernel_shape = [3,3], strides = [2,2]", 1),
    ],
)
def test_a_max_pool_of_a_large_kernel_goes_along_its_axes(settings: str, steps: int) -> None:
    text = f"{{ m = Add (x, z) y = MaxPool <{settings}> (m) }}"
    model = parsed(f"g (float[2,3,9,9] x) => (float[2,3,h,w] y) <float[2,3,9,9] z> {text}")
    # Of equal elements the first has the gradient.
    z = np.random.default_rng(0).integers(0, 4, (2, 3, 9, 9)).astype(np.float32)
    model.graph.initializer.add().CopyFrom(numpy_helper.from_array(z, "z"))
    lowered, _ = lower_pool.run(model)
    assert ops(lowered).count("MaxPool") == steps
    x = np.zeros_like(z)
    (wanted,) = Runner(model)({"x": x})
    np.testing.assert_array_equal(Runner(lowered)({"x": x})[0], wanted)
    if "storage_order" in settings:
        return  # the runtime's own gradient is wrong
    found = []
    for graph in (model, lowered):
        with Trainer(inferred(graph), ["z"], Loss("values", ("y",)), 1) as trainer:
            found.append(trainer.gradients(Example({"x": x}, [np.zeros_like(wanted)], None))["z"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_groups_that_do_not_divide_the_channels_are_kept() -> None:
    model = parsed(
        "g (float[2,3,2] x, float[3] s, float[3] b) => (float[2,3,2] y) "
        "{ y = GroupNormalization <num_groups = 2> (x, s, b) }",
        21,
    )
    lowered, notes = lower_normalization.run(model)
    assert ops(lowered) == ["GroupNormalization"]
    assert "3 channels do not fall into 2 groups" in notes[0]
