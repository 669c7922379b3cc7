"""Every form: exact at full rank, its error what is measured, its cost what is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxneutrino.factor_fit import Problem, balanced
from onnxneutrino.factor_interpolative import interpolated, parts_of, with_parts
from onnxneutrino.factors import Factors, Moments, Stage, chain_product, stage_geometries
from onnxneutrino.forms import METHODS, applicable, decompose, decompose_all, full_ranks, skeleton
from onnxneutrino.moments import MomentSum
from onnxneutrino.plan import FORMS, Array, Form, Geometry
from onnxneutrino.runtime import Runner

KERNELS = {"square": (6, 5, 3, 3), "wide": (9, 4, 2, 3), "tall": (5, 6, 3, 1), "flat": (5, 6, 1, 3)}
DEEP = ((6, 5, 3, 2, 2), (5, 6, 3, 1, 1), (6, 9, 1, 1, 1))  # kernels of 3-D convolutions
CASES = [(form, shape) for shape in (*KERNELS.values(), (6, 9, 1, 1), *DEEP) for form in applicable(shape)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated_rows(count: int, size: int, seed: int = 0) -> Array:
    """Patches after a ReLU, neighbouring elements correlated, mean away from zero."""
    mixing = normal(size, size, seed=seed + 1) / np.arange(1, size + 1, dtype=np.float32)
    return np.maximum(normal(count, size, seed=seed) @ mixing.T + np.float32(0.3), 0)


def moments_of(rows: Array) -> Moments:
    total = MomentSum(rows.shape[1])
    total.add(rows)
    return total.moments()


def layer(shape: tuple[int, ...], count: int = 900) -> tuple[Array, Array, Array, Moments]:
    """Weight, bias, rows and their moments; weight rows decay, as trained ones do."""
    decay = 1 / np.sqrt(np.arange(1, shape[0] + 1, dtype=np.float32))
    weight = normal(*shape, seed=7) * decay.reshape(-1, *[1] * (len(shape) - 1))
    rows = correlated_rows(count, int(np.prod(shape[1:])))
    return weight, normal(shape[0], seed=8), rows, moments_of(rows)


def measured(rows: Array, weight: Array, bias: Array, factors: Factors, weighting: Array | None = None) -> float:
    """`|G^½(Y - Y')|² / |G^½(Y - mean Y)|²` on the rows, by running the layer and the chain."""
    data = rows.astype(np.float64)
    wanted = data @ weight.reshape(len(weight), -1).T + bias
    got = data @ factors.product().reshape(len(weight), -1).T + factors.bias
    metric = np.eye(len(weight)) if weighting is None else weighting.astype(np.float64)
    centred = wanted - wanted.mean(axis=0)
    missed = wanted - got
    return float(np.sum((missed @ metric) * missed) / np.sum((centred @ metric) * centred))


def model(stages: tuple[Stage, ...], bias: Array, geometry: Geometry, channels: int) -> onnx.ModelProto:
    nodes, arrays, value = [], [numpy_helper.from_array(bias, "bias")], "x"
    for index, (stage, own) in enumerate(zip(stages, stage_geometries(stages, geometry), strict=True)):
        arrays.append(numpy_helper.from_array(np.ascontiguousarray(stage.weight), f"w{index}"))
        inputs = [value, f"w{index}"] + (["bias"] if index == len(stages) - 1 else [])
        value = "y" if index == len(stages) - 1 else f"v{index}"
        nodes.append(
            helper.make_node(
                "Conv",
                inputs,
                [value],
                kernel_shape=own.kernel,
                strides=own.strides,
                pads=own.pads,
                dilations=own.dilations,
                group=stage.groups,
            )
        )
    free = [f"{axis}" for axis in range(len(geometry.kernel))]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, *free])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(bias), *(f"{axis} out" for axis in free)])],
        arrays,
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(built, full_check=True)
    return built


def full(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    return full_ranks(form, shape)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_full_rank_is_the_layer(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, _, moments = layer(shape)
    factors = decompose(form, weight, bias, moments).factors(full(form, shape))
    np.testing.assert_allclose(factors.product(), weight, atol=3e-3 if form == "cp" else 1e-4)
    np.testing.assert_allclose(factors.bias, bias, atol=3e-3 if form == "cp" else 1e-4)
    assert factors.error < 1e-5


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_full_rank_is_the_layer_in_the_runtime(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, _, moments = layer(shape)
    kernel = shape[2:]
    axes = len(kernel)
    covers = [int(k > 1) for k in kernel]
    geometry = Geometry(
        kernel,
        strides=(2, 1, 3)[:axes],
        pads=tuple(n * own for n, own in zip((*(1, 0, 2)[:axes], *(2, 1, 0)[:axes]), covers * 2, strict=True)),
        dilations=tuple(1 + own * n for n, own in zip((0, 1, 1), covers, strict=False)),
    )
    image = normal(2, shape[1], *(9, 8, 7)[:axes], seed=4)
    factors = decompose(form, weight, bias, moments).factors(full(form, shape))
    (wanted,) = Runner(model((Stage(weight),), bias, geometry, shape[1]))({"x": image})
    (got,) = Runner(model(factors.stages, factors.bias, geometry, shape[1]))({"x": image})
    np.testing.assert_allclose(got, wanted, atol=2e-2 if form == "cp" else 1e-3)


@pytest.mark.parametrize("count", [900, 20], ids=["sigma", "rows"])
@pytest.mark.parametrize(("form", "shape"), CASES)
def test_the_error_is_the_one_measured_on_the_rows(form: Form, shape: tuple[int, ...], count: int) -> None:
    weight, bias, rows, moments = layer(shape, count)
    fitted = decompose(form, weight, bias, moments)
    tops = full(form, shape)
    grid = sorted({tuple(max(1, top * step // 4) for top in tops) for step in (1, 2, 3)})
    for ranks, error in zip(grid, fitted.errors(grid), strict=True):
        factors = fitted.factors(ranks)
        assert factors.ranks == ranks
        assert factors.error == pytest.approx(error, abs=1e-9)
        assert error == pytest.approx(measured(rows, weight, bias, factors), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("form", ["channel", "input", "spatial_hv", "spatial_vh", "tucker2"])
def test_lower_ranks_served_after_higher_ones_are_the_same(form: Form) -> None:
    weight, bias, _, moments = layer(KERNELS["square"])
    tops = full(form, weight.shape)
    low = tuple(2 for _ in tops)
    fitted, alone = (decompose(form, weight, bias, moments) for _ in range(2))
    before = fitted.errors([low])
    fitted.factors(tops)
    np.testing.assert_allclose(fitted.errors([low]), before, atol=1e-6)
    np.testing.assert_allclose(fitted.factors(low).product(), alone.factors(low).product(), atol=1e-4)


@pytest.mark.parametrize(("form", "shape"), [("channel", KERNELS["square"]), ("svd", (6, 9, 1, 1))])
def test_the_error_of_an_output_projection_is_the_discarded_spectrum(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, rows, moments = layer(shape)
    outputs = rows.astype(np.float64) @ weight.reshape(len(weight), -1).T
    spectrum = np.linalg.svd(outputs - outputs.mean(axis=0), compute_uv=False) ** 2
    ranks = range(1, full(form, shape)[0])
    errors = decompose(form, weight, bias, moments).errors([(rank,) for rank in ranks])
    expected = [spectrum[rank:].sum() / spectrum.sum() for rank in ranks]
    np.testing.assert_allclose(errors, expected, rtol=1e-3, atol=1e-6)


def low_rank_by_weight(form: Form, weight: Array, rank: int) -> Array:
    """The truncated SVD of the weight itself, arranged as the form needs it."""
    outputs, inputs, kh, kw = weight.shape
    axes: dict[str, tuple[int, ...]] = {
        "channel": (0, 1, 2, 3),
        "input": (1, 0, 2, 3),
        "spatial_hv": (0, 3, 1, 2),
        "spatial_vh": (0, 2, 1, 3),
    }
    rows = {"channel": outputs, "input": inputs, "spatial_hv": outputs * kw, "spatial_vh": outputs * kh}[form]
    moved = weight.transpose(axes[form])
    left, values, right = np.linalg.svd(moved.reshape(rows, -1), full_matrices=False)
    low = (left[:, :rank] * values[:rank]) @ right[:rank]
    return low.reshape(moved.shape).transpose(np.argsort(axes[form]))


@pytest.mark.parametrize("form", ["channel", "input", "spatial_hv", "spatial_vh"])
@pytest.mark.parametrize("count", [900, 30])
def test_a_fit_to_the_outputs_beats_one_to_the_weights(form: Form, count: int) -> None:
    weight, bias, rows, moments = layer(KERNELS["square"], count)
    fitted = decompose(form, weight, bias, moments)
    for rank in (1, 2, 4):
        plain = low_rank_by_weight(form, weight, rank)
        missing = (weight - plain).reshape(len(weight), -1)
        shifted = bias + missing @ moments.mean
        chain = Factors("svd", (rank,), (Stage(plain),), shifted)
        assert fitted.factors((rank,)).error <= measured(rows, weight, bias, chain) + 1e-6


@pytest.mark.parametrize("form", ["channel", "input", "spatial_hv", "spatial_vh", "tucker2", "cp"])
def test_an_output_weighting_lowers_the_error_it_weights(form: Form) -> None:
    weight, bias, rows, moments = layer(KERNELS["square"])
    if form == "cp":  # alternating least squares take the taps of a patch for uncorrelated
        rows = normal(900, 45, seed=5)
        moments = moments_of(rows)
    mixing = normal(6, 6, seed=3) * np.array([9, 3, 1, 1, 0.3, 0.1], np.float32)[:, None]
    weighting = mixing.T @ mixing
    # The method weights with a slightly regularised G: so does the comparison.
    metric = weighting + np.float32(1e-3 * np.trace(weighting) / 6) * np.eye(6, dtype=np.float32)
    ranks = (2, 2) if form == "tucker2" else (3,)
    plain = decompose(form, weight, bias, moments).factors(ranks)
    weighted = decompose(form, weight, bias, moments, weighting).factors(ranks)
    assert weighted.error == pytest.approx(measured(rows, weight, bias, weighted, metric), rel=1e-3)
    assert weighted.error < 0.95 * measured(rows, weight, bias, plain, metric)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_few_and_repeated_rows_do_not_blow_the_weights_up(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, rows, _ = layer(shape, 3)
    rows = np.concatenate([rows, rows])
    rows[:, ::2] = 1
    fitted = decompose(form, weight, bias, moments_of(rows))
    ranks = tuple(max(1, top // 2) for top in full(form, shape))
    factors = fitted.factors(ranks)
    assert np.linalg.norm(factors.product()) < 5 * np.linalg.norm(weight)
    assert max(np.abs(stage.weight).max() for stage in factors.stages) < 10


@pytest.mark.parametrize("form", ["channel", "input", "tucker2"])
def test_an_input_that_never_varies_leaves_a_fit_to_the_weights(form: Form) -> None:
    weight, bias, _, _ = layer(KERNELS["square"])
    fitted = decompose(form, weight, bias, moments_of(np.ones((200, 45), np.float32)))
    np.testing.assert_allclose(fitted.factors(full(form, weight.shape)).product(), weight, atol=1e-4)
    low = fitted.factors(tuple(2 for _ in full(form, weight.shape)))
    assert low.error == 0
    assert np.linalg.norm(low.product() - weight) < np.linalg.norm(weight)


@pytest.mark.parametrize("shape", [(6, 9, 1, 1), (9, 4, 1, 1), (40, 3, 3, 3), (5, 2, 2, 2, 2)])
def test_interpolation_keeps_the_product_in_fewer_numbers(shape: tuple[int, ...]) -> None:
    """The chain of the same rank, less r² numbers: r outputs are the inner channels."""
    weight, bias, _, moments = layer(shape)
    plain = decompose(applicable(shape)[0], weight, bias, moments)
    for rank in range(1, plain.limit[0] + 1):
        before, after = plain.factors((rank,)), decompose("interpolative", weight, bias, moments).factors((rank,))
        np.testing.assert_allclose(after.product(), before.product(), atol=1e-4)
        assert after.params == before.params - rank * rank
        last = after.stages[-1].weight.reshape(shape[0], rank)
        np.testing.assert_array_equal(last[list(after.direct)], np.eye(rank))
        assert np.abs(last).max() < 10  # column pivoting keeps the combinations small
        again = with_parts(after, *zip(*parts_of(after), strict=True))
        np.testing.assert_allclose(again.product(), after.product(), atol=1e-6)
        np.testing.assert_allclose(again.bias, after.bias, atol=1e-5)


def test_inner_channels_that_say_nothing_are_left_out_of_all_combinations() -> None:
    last = normal(7, 4)
    last[:, 2] = 0
    last[:, 3] = last[:, 0]
    chain = Factors("svd", (4,), (Stage(normal(4, 5, 1, 1)), Stage(last.reshape(7, 4, 1, 1))), normal(7))
    own = interpolated(chain)
    np.testing.assert_allclose(own.product(), chain.product(), atol=1e-5)
    assert np.abs(own.stages[1].weight).max() < 10
    nothing = replace(chain, stages=(chain.stages[0], Stage(np.zeros((7, 4, 1, 1), np.float32))))
    np.testing.assert_array_equal(interpolated(nothing).product(), np.zeros((7, 5, 1, 1)))


def test_balancing_keeps_the_product_and_evens_the_norms() -> None:
    stages = (
        Stage(normal(3, 4, 1, 1) * np.float32(100)),
        Stage(normal(3, 1, 3, 1, seed=1), groups=3),
        Stage(normal(5, 3, 1, 2, seed=2)),
    )
    even = balanced(stages)
    np.testing.assert_allclose(chain_product(even), chain_product(stages), rtol=1e-4, atol=1e-3)
    pair = balanced((stages[0], stages[2]))
    before = np.linalg.norm(pair[0].weight.reshape(3, -1), axis=1)
    after = np.linalg.norm(pair[1].weight.swapaxes(0, 1).reshape(3, -1), axis=1)
    np.testing.assert_allclose(before, after, rtol=1e-5)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_a_skeleton_has_the_shapes_of_the_chain(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, _, moments = layer(shape)
    ranks = tuple(2 for _ in full(form, shape))
    stages = decompose(form, weight, bias, moments).factors(ranks).written
    bones = skeleton(form, shape, ranks)
    assert [(s.weight.shape, s.groups) for s in bones] == [(s.weight.shape, s.groups) for s in stages]


@pytest.mark.parametrize(("form", "shape"), [*CASES, ("tucker2", (9, 1, 2, 2)), ("tucker2", (1, 9, 2, 2))])
def test_the_limit_of_a_decomposition_is_the_full_rank(form: Form, shape: tuple[int, ...]) -> None:
    weight, bias, _, moments = layer(shape)
    fitted = decompose(form, weight, bias, moments)
    assert fitted.limit == full_ranks(form, shape)
    for ranks in (tuple(0 for _ in fitted.limit), tuple(top + 1 for top in fitted.limit)):
        with pytest.raises(ValueError, match="ranks"):
            fitted.factors(ranks)


def test_the_table_has_every_form_and_every_kernel_its_forms() -> None:
    assert tuple(METHODS) == FORMS
    assert applicable((4, 3, 1, 1)) == applicable((4, 3, 1, 1, 1)) == ("svd", "interpolative")
    whole = ("channel", "interpolative", "input", "tucker2")
    assert applicable((4, 3, 5, 5, 5)) == applicable((4, 3, 1, 5, 1)) == whole
    assert applicable((4, 3, 5, 1)) == (*whole, "cp")
    assert set(applicable((4, 3, 3, 3))) == set(FORMS) - {"svd"}
    weight, bias, _, moments = layer(KERNELS["square"])
    assert tuple(decompose_all(weight, bias, moments)) == applicable(weight.shape)
    with pytest.raises(ValueError, match="not a form"):
        decompose("svd", weight, bias, moments)


def test_shapes_that_do_not_agree_are_refused() -> None:
    weight, bias, _, moments = layer(KERNELS["square"])
    with pytest.raises(ValueError, match="dimension 45"):
        Problem(weight[:, :4], bias, moments)
    with pytest.raises(ValueError, match="6 outputs"):
        Problem(weight, bias, moments, np.eye(5, dtype=np.float32))
    assert Problem(weight, bias, replace(moments, count=10)).ridge > Problem(weight, bias, moments).ridge
