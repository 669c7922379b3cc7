"""Resampling matrices, transposed convolution's weight, shape arithmetic: what the table of operators cannot show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino.differentiable import untrainable
from onnxneutrino.finetune import Example
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.graph import load
from onnxneutrino.losses import Loss
from onnxneutrino.passes import (
    lower_conv_transpose,
    lower_indexing,
    lower_pad,
    lower_resize,
    lower_shapes,
    lower_where,
)
from onnxneutrino.resampling import Axis, Method, coordinates, matrix, nearest
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import check_training_copy, training_copy

KINDS = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
VALUES = Loss("values", ("y",))


def parsed(version: int, text: str) -> ModelProto:
    model = parse_model(f'<ir_version: 8, opset_import: ["" : {version}]> {text}')
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# --- matrices of one axis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("length", [3, 7, 16])
def test_a_constant_axis_stays_constant(kind: str, mode: str, antialias: bool, length: int) -> None:
    found = matrix(Axis(7, length, length / 7), Method(mode, kind, antialias=antialias))
    assert found.shape == (length, 7)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_a_line_is_read_at_the_coordinates(kind: str, mode: str) -> None:
    axis = Axis(12, 31, 31 / 12)
    x = coordinates(axis, kind)
    inner = (x >= 1) & (x <= 10)  # beyond, the neighbours of cubic are the repeated edge
    assert inner.sum() > 20
    np.testing.assert_allclose(
        (matrix(axis, Method(mode, kind, cubic=-0.5)) @ np.arange(12))[inner], x[inner], atol=1e-5
    )


def test_cubic_of_keys_reads_a_parabola_exactly() -> None:
    """Keys' coefficient -1/2 makes the interpolation exact for polynomials of second degree."""
    axis = Axis(12, 31, 31 / 12)
    x = coordinates(axis, "align_corners").astype(np.float64)
    inner = (x >= 1) & (x <= 10)
    values = matrix(axis, Method("cubic", "align_corners", cubic=-0.5)) @ np.square(np.arange(12.0))
    np.testing.assert_allclose(values[inner], np.square(x)[inner], atol=1e-5)
    other = matrix(axis, Method("cubic", "align_corners", cubic=-0.75)) @ np.square(np.arange(12.0))
    assert np.abs(other[inner] - np.square(x)[inner]).max() > 1e-2


def test_rounding_of_an_exact_half() -> None:
    axis = Axis(4, 8, 2.0)  # asymmetric: 0, 1/2, 1, 3/2, ...
    taken = {
        rounding: nearest(axis, Method("nearest", "asymmetric", rounding)).tolist()
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    }
    assert taken["round_prefer_floor"] == taken["floor"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert taken["round_prefer_ceil"] == taken["ceil"] == [0, 1, 1, 2, 2, 3, 3, 3]


def test_antialias_averages_what_it_leaves_out() -> None:
    plain, smooth = (matrix(Axis(12, 3, 0.25), Method("linear", antialias=flag)) for flag in (False, True))
    assert (np.count_nonzero(plain, axis=0) == 0).any()
    assert (np.count_nonzero(smooth, axis=0) > 0).all()


def test_an_unknown_coordinate_mode_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        coordinates(Axis(4, 8, 2.0), "nowhere")


# --- weights that reach their operator through the rewritten nodes --------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight", "bias"),
    [
        ("float[2,3,4,5] x) => (float[2,4,8,10] y", (3, 4, 4, 4), "strides = [2,2], pads = [1,1,1,1]"),
        ("float[2,4,4,3] x) => (float[2,6,9,7] y", (4, 3, 3, 3), "strides = [2,2], group = 2"),
        ("float[2,3,6] x) => (float[2,4,12] y", (3, 4, 3), "strides = [2], dilations = [1], output_shape = [12]"),
        ("float[1,2,2,3,2] x) => (float[1,3,4,6,4] y", (2, 3, 2, 2, 2), "strides = [2,2,2]"),
    ],
)
def test_the_weight_of_a_transposed_convolution_trains(text: str, weight: tuple[int, ...], bias: str) -> None:
    model = parsed(13, f"net ({text}) {{ y = ConvTranspose <{bias}> (x, w, b) }}")
    maps = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    model.graph.initializer.append(numpy_helper.from_array(normal(*weight, seed=1), "w"))
    model.graph.initializer.append(numpy_helper.from_array(normal(maps, seed=2), "b"))
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    inputs = {"x": normal(*shape)}
    copy = training_copy(model, shape[0])
    check_training_copy(model, copy, inputs, 1)
    (y,) = Runner(model)(inputs)
    example = Example(inputs, [y + normal(*y.shape, seed=3)], None)
    assert not untrainable(copy, ["w", "b"], ["y"])
    for found in derivatives(model, copy, [["w"], ["w"], ["b"]], VALUES, example):
        assert found.error < 1e-2, found


def test_what_has_no_fixed_shape_is_kept_and_named() -> None:
    model = parsed(13, "net (float[1,2,h,w] x) => (float[1,2,a,b] y) { y = ConvTranspose (x, k) }")
    model.graph.initializer.append(numpy_helper.from_array(normal(2, 2, 3, 3), "k"))
    kept, notes = lower_conv_transpose.run(model)
    assert operators(kept) == ["ConvTranspose"]
    assert notes == ["ConvTranspose ConvTranspose_0 kept: the shape of 'x' is unknown"]


def test_a_resize_whose_scales_are_an_input_is_kept_and_refused() -> None:
    model = parsed(
        13,
        'net (float[1,2,3,4] x, float[4] s) => (float[1,2,h,w] y) { z = Relu (x) y = Resize <mode="linear"> (z, , s) }',
    )
    kept, notes = lower_resize.run(model)
    assert "Resize" in operators(kept)
    assert notes == ["Resize Resize_1 kept: input 's' is computed at run time"]
    assert untrainable(kept, ["x"], ["y"]) == [("Resize_1", "Resize")]


def test_a_pad_of_unknown_width_is_kept_and_refused() -> None:
    model = parsed(13, 'net (float[2,3] x, int64[4] p) => (float[h,w] y) { y = Pad <mode = "edge"> (x, p) }')
    kept, notes = lower_pad.run(model)
    assert notes == ["Pad Pad_0 kept: input 'p' is computed at run time"]
    assert untrainable(kept, ["x"], ["y"]) == [("Pad_0", "Pad")]


@pytest.mark.parametrize(("mode", "reason"), [("wrap", "wraps"), ("reflect", "mirrors")])
def test_a_pad_wider_than_its_axis_is_kept(mode: str, reason: str) -> None:
    """ONNX Runtime reads beyond the data there."""
    text = f'net (float[2,3] x) => (float[2,7] y) <int64[4] p = {{0,4,0,0}}> {{ y = Pad <mode = "{mode}"> (x, p) }}'
    kept, notes = lower_pad.run(parsed(19, text))
    assert operators(kept) == ["Pad"]
    assert notes == [f"Pad Pad_0 kept: it {reason} more than the axis holds"]


# --- the same node, left alone where it is right ---------------------------------------------------------------


def test_forms_with_right_gradients_stay() -> None:
    text = """net (float[2,3,4] x) => (float[3,2,2] y)
        <int64[1] s = {0}, int64[1] e = {4}, int64[1] a = {2}, int64[1] t = {2},
         bool[3,2,2] c = {1,0,1,0,1,0,1,0,1,0,1,0}>
        { p = Slice (x, s, e, a, t) q = Transpose <perm = [1,0,2]> (p) r = Neg (q) y = Where (c, q, r) }"""
    model = parsed(13, text)
    for lower in (lower_indexing, lower_where):
        kept, _ = lower.run(model)
        assert operators(kept) == operators(model)


def test_an_unused_part_of_a_split_gets_no_gradient_of_another() -> None:
    """The runtime's own gradient of Split is as long as the parts that reach the loss."""
    model = parsed(
        13, "net (float[2,6] x) => (float[2,2] y) { h = Add (x, w) a, b, c = Split <axis = 1> (h) y = Tanh (b) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 6), np.float32), "w"))
    copy = training_copy(model, 2)
    inputs = {"x": normal(2, 6)}
    (y,) = Runner(model)(inputs)
    example = Example(inputs, [y + normal(2, 2, seed=1)], None)
    (found,) = derivatives(model, copy, [["w"]], VALUES, example)
    assert found.error < 1e-2
    assert abs(found.analytic) > 1e-3


# --- shape arithmetic ------------------------------------------------------------------------------------------

THROUGH_FLOATS = """net (float[1,2,4,5] x) => (float[1,2,6,7] y)
    <int64[1] start = {0}, int64[1] two = {2}, int64[1] four = {4}, float factor = {1.5}>
    {
        h = Relu (x)
        s = Shape (h) a = Slice (s, two, four) f = Cast <to = 1> (a) m = Mul (f, factor) l = Floor (m)
        i = Cast <to = 7> (l) n = Slice (s, start, two) t = Concat <axis = 0> (n, i)
        y = Resize <mode = "linear"> (h, , , t)
    }"""


def test_shapes_computed_at_run_time_become_constants() -> None:
    folded, notes = lower_shapes.run(parsed(13, THROUGH_FLOATS))
    assert operators(folded) == ["Relu", "Resize"]
    values = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in folded.graph.initializer}
    assert values["t"] == [1, 2, 6, 7]
    assert "Floor Floor_5 made a constant: all shapes are fixed" in notes


def test_shapes_that_are_not_fixed_stay() -> None:
    model = parsed(
        13, THROUGH_FLOATS.replace("float[1,2,4,5]", "float[1,2,h,w]").replace("float[1,2,6,7]", "float[a,b,c,d]")
    )
    assert lower_shapes.run(model) == (model, [])


def test_a_weight_that_meets_a_shape_stays_a_weight() -> None:
    model = parsed(
        13,
        "net (float[2,3,3] x) => (float[2,3,3] y) { s = Shape (x) v = Expand (w, s) m = Cast <to = 1> (s)"
        " k = Mul (u, m) a = Mul (x, v) y = Add (a, k) }",
    )
    model.graph.initializer.append(numpy_helper.from_array(normal(3, 3), "w"))
    model.graph.initializer.append(numpy_helper.from_array(normal(3, 3, seed=1), "u"))
    folded, _ = lower_shapes.run(model)
    assert {"w", "u"} <= {name for node in folded.graph.node for name in node.input}
    (after,), (before,) = (Runner(m)({"x": normal(2, 3, 3)}) for m in (folded, model))
    np.testing.assert_array_equal(after, before)


# --- models of the wild ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seg_deeplabv3_tf2onnx", "style_mosaic_coreml", "superres_subpixel_pytorch"])
def test_real_models_compute_the_same(name: str, shared: Path) -> None:
    """Upsample of opset 9, operators without a schema, a shuffle of pixels."""
    model = load(shared / "models" / f"{name}.onnx").model
    copy = training_copy(model, 1)
    (value,) = copy.graph.input
    inputs = {value.name: normal(*(dim.dim_value for dim in value.type.tensor_type.shape.dim))}
    check_training_copy(model, copy, inputs, 1)
    left = {"Upsample", "Resize", "Crop", "ImageScaler", "Affine", "ConvTranspose", "DepthToSpace"}
    assert left.isdisjoint(operators(copy))
    assert operators(copy).count("Conv") >= operators(model).count("Conv")
