"""Weights that several nodes apply: one layer, one set of factors, its cost and data those of all places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from models_drawn import build, random
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxneutrino import cost
from onnxneutrino.calibrate import calibrate, outputs_at, patches
from onnxneutrino.candidates import point
from onnxneutrino.cli import main
from onnxneutrino.curvature import output_curvature
from onnxneutrino.factors import Moments
from onnxneutrino.finetune import Example
from onnxneutrino.forms import applicable, decompose, full_ranks
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.graph import arrays, fixed_shapes, tensor_types, with_batch
from onnxneutrino.losses import Loss
from onnxneutrino.passes.factorize import factorize, last_stage, stage_names
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Choice, Form, Frozen, Layer
from onnxneutrino.probe import features_at, take_probe
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy


def found(model: ModelProto, **options: tuple[str, ...]) -> list[Layer | Frozen]:
    return find_layers(model, tensor_types(model, fixed_shapes(model, {})), **options)


HEADS = """
[one] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [pool] q = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)
[two] c = Conv <pads = [2, 2, 2, 2], dilations = [2, 2], strides = [2, 2]> (q, w, b)
[ga] d = GlobalAveragePool (a) [gc] e = GlobalAveragePool (c) [sum] s = Add (d, e)
[flat] f = Flatten (s) [last] y = Gemm (f, v)
"""
TOWER = "[one] a = Conv <pads = [1, 1, 1, 1]> (x, w) [r] c = Relu (a) [two] y = Conv <pads = [1, 1, 1, 1]> (c, w)"
SHARED = {
    "conv": (HEADS, (8, 8, 8), {"w": random(12, 8, 3, 3), "b": random(12), "v": random(12, 4)}),
    "in a row": (TOWER, (12, 6, 6), {"w": random(12, 12, 3, 3) / np.float32(10)}),
    "conv1d": (
        "[one] a = Conv <pads = [1, 1]> (x, w) [r] c = Relu (a) [i] u = Identity (w) [two] y = Conv (c, u)",
        (16, 9),
        {"w": random(16, 16, 3) / np.float32(7)},
    ),
    "gemm": (
        "[one] a = Gemm <transB = 1> (x, w, b) [r] c = Tanh (a) [two] y = Gemm <transB = 1> (c, w, b)",
        (20,),
        {"w": random(20, 20) / np.float32(4), "b": random(20)},
    ),
    "matmul": (
        "[one] a = MatMul (x, w) [oa] k = Add (a, b) [r] c = Tanh (k) [two] d = MatMul (c, w) [ta] y = Add (b, d)",
        (5, 20),
        {"w": random(20, 20) / np.float32(4), "b": random(20)},
    ),
}
CASES = [
    (name, form)
    for name, kernel in (
        ("conv", (3, 3)),
        ("in a row", (3, 3)),
        ("conv1d", (3, 1)),
        ("gemm", (1, 1)),
        ("matmul", (1, 1)),
    )
    for form in applicable((12, 12, *kernel))
    if form != "cp"
]


def shared(name: str) -> tuple[ModelProto, Layer]:
    body, _, weights = SHARED[name]
    sizes = ", ".join(str(size) for size in SHARED[name][1])
    model = build(body, f"float[N, {sizes}] x", **weights)
    (layer,) = (entry for entry in found(model) if entry.name == "one")
    assert isinstance(layer, Layer), layer
    assert [use.name for use in layer.uses] == ["one", "two"]
    assert [entry.name for entry in found(model)].count("two") == 0
    return model, layer


def images(name: str, count: int, seed: int = 3) -> NDArray[np.float32]:
    return random(count, *SHARED[name][1], seed=seed)


def moments_of(model: ModelProto, layer: Layer, x: NDArray[np.float32]) -> Moments:
    tensors = [use.input for use in layer.uses]
    taken, _ = calibrate(Runner(model, tensors), tensors, [layer], [{"x": x}], len(x), seed=0)
    return taken[layer.name]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_at_full_rank_both_places_are_the_layer_and_the_factors_stand_once(name: str, form: Form) -> None:
    model, layer = shared(name)
    moments = moments_of(model, layer, images(name, 30))
    factors = decompose(form, layer.weight, layer.bias, moments).factors(full_ranks(form, layer.weight.shape))
    result = factorize(model, [layer], {"one": factors})
    onnx.checker.check_model(result, full_check=True)
    x = images(name, 4, seed=5)
    np.testing.assert_allclose(Runner(result)({"x": x})[0], Runner(model)({"x": x})[0], rtol=1e-3, atol=1e-3)
    kept = [tensor.name for tensor in result.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    assert sorted(kept) == sorted([*stage_names(layer, factors), *(["v"] if name == "conv" else [])])
    readers = [node.name for node in result.graph.node if stage_names(layer, factors)[0] in node.input]
    assert readers == [f"one/{form}.0", f"two/{form}.0"]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_params_count_once_and_operations_in_every_place(name: str, form: Form) -> None:
    model, layer = shared(name)
    ranks = (4, 5) if form == "tucker2" else (4,)
    factors = decompose(form, layer.weight, layer.bias, moments_of(model, layer, images(name, 30))).factors(ranks)
    result = factorize(model, [layer], {"one": factors})
    own, after = (
        (cost.params(graph), cost.macs(graph, tensor_types(graph, fixed_shapes(graph, {}))))
        for graph in (model, result)
    )
    priced = point(layer, Choice(form, ranks))
    assert (priced.params - layer.params, priced.macs - layer.macs) == (after[0] - own[0], after[1] - own[1])


@pytest.mark.parametrize("name", SHARED)
def test_moments_are_those_of_the_patches_of_all_places(name: str) -> None:
    model, layer = shared(name)
    x = images(name, 40)
    tensors = [use.input for use in layer.uses]
    values = Runner(model, tensors)({"x": x})
    everywhere = [np.tile(np.arange(use.positions), (len(x), 1)) for use in layer.uses]
    pairs = zip(layer.uses, values, everywhere, strict=True)
    rows = np.concatenate([patches(use, use.geometry, tensor, places) for use, tensor, places in pairs])
    # Asked for all rows from one example, every place gives all it has.
    moments = calibrate(Runner(model, tensors), tensors, [layer], [{"x": x}], 1, seed=0)[0]["one"]
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(moments.matrix(), np.cov(rows.T, bias=True), atol=1e-3)


@pytest.mark.parametrize("name", SHARED)
def test_features_stand_beside_the_targets_of_their_place(name: str) -> None:
    model, layer = shared(name)
    moments = moments_of(model, layer, images(name, 30))
    form = applicable(layer.weight.shape)[0]
    factors = decompose(form, layer.weight, layer.bias, moments).factors(full_ranks(form, layer.weight.shape))
    names = [use.output for use in layer.uses]
    original = Runner(model, names)
    probe = take_probe(
        [{"x": images(name, 6)}, {"x": images(name, 3, seed=9)}],
        [layer],
        [],
        lambda feed: dict(zip(names, original(feed), strict=True)),
        seed=0,
    )
    result = factorize(model, [layer], {"one": factors})
    run = Runner(result, [last_stage(use, factors)[0] for use in layer.uses])
    features = features_at(probe, layer, factors.stages, run)
    last = factors.stages[-1].weight.reshape(len(layer.bias), -1)
    np.testing.assert_allclose(features @ last.T + factors.bias, probe.targets["one"], rtol=1e-3, atol=1e-3)
    # The rows of an example stand together: what is held out is other examples, not another place.
    first = outputs_at(layer.others[0], original({"x": images(name, 6)})[1], probe.positions["two"][0])
    start = probe.positions["one"][0].shape[1]
    np.testing.assert_array_equal(probe.targets["one"][start], first[0])


def test_gradients_of_shared_factors_equal_finite_differences() -> None:
    model, layer = shared("conv")
    factors = decompose("tucker2", layer.weight, layer.bias, moments_of(model, layer, images("conv", 30)))
    chain = factors.factors((4, 5))
    result = with_batch(factorize(model, [layer], {"one": chain}), 4)
    names = stage_names(layer, chain)
    example = Example({"x": images("conv", 4)}, [random(4, 4, seed=9)], None)
    seen = derivatives(result, training_copy(result, 4), [[name] for name in names], Loss("values", ("y",)), example)
    assert [own.names for own in seen] == [(name,) for name in names]
    for own in seen:
        assert abs(own.analytic) > 1e-4
        assert own.error < 2e-2, own


def test_curvature_adds_up_over_the_places() -> None:
    model, layer = shared("conv")
    x = {"x": images("conv", 8)}
    loss, teacher = Loss("classes", ("y",)), Runner(model, ["y"])
    both = output_curvature(model, 8, [layer], loss, [x], teacher, 1, 0)["one"]
    apart = [
        output_curvature(model, 8, [own], loss, [x], teacher, 1, 0)[own.name]
        for own in (Layer(**{**vars(layer), "others": ()}), layer.others[0])
    ]
    assert all(np.abs(own).max() > 0 for own in apart)
    np.testing.assert_allclose(both, sum(apart), rtol=1e-4, atol=1e-7)


IMAGE = "float[N, 8, 9, 9] x"
PAIR = (
    "[c] p = Conv <pads = [1, 1, 1, 1]> (x, w{0}) {1} [d] q = Conv <pads = [1, 1, 1, 1]> (x, w{2}) [s] y = Add (p, q)"
)
WEIGHTS = {"w": random(8, 8, 3, 3), "b": random(8), "k": random(8, seed=1)}
REASONS = {
    "weight shared by 2 nodes with different biases": PAIR.format(", b", "", ", k"),
    "weight shared by 3 nodes, not all of which can be factorized": PAIR.format("", "[e] z = Relu (w)", ""),
    "weight shared by 2 nodes, not all of which can be factorized": (
        "[c] p = Conv <pads = [1, 1, 1, 1]> (x, w) [d] y = ConvTranspose <pads = [1, 1, 1, 1]> (p, w)"
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_rewritten_together_says_why(reason: str) -> None:
    read = {name: value for name, value in WEIGHTS.items() if f" {name})" in REASONS[reason]}
    model = build(REASONS[reason], IMAGE, **{**read, "w": WEIGHTS["w"]})
    frozen = {entry.name: entry.reason for entry in found(model) if isinstance(entry, Frozen)}
    assert frozen["c"] == reason
    assert frozen["d"] in (reason, "transposed convolution")
    assert len(found(model)) == 2


def test_a_matrix_applied_from_both_sides_stays() -> None:
    model = build("[c] p = Gemm (x, w) [d] y = Gemm <transB = 1> (p, w)", "float[N, 20] x", w=random(20, 20))
    reasons = [entry.reason for entry in found(model) if isinstance(entry, Frozen)]
    assert reasons == ["weight shared by 2 nodes that apply it in different ways"] * 2


def test_an_excluded_place_keeps_the_weight() -> None:
    model, _ = shared("conv")
    frozen = {entry.name: entry.reason for entry in found(model, exclude=("two",)) if isinstance(entry, Frozen)}
    assert frozen["one"] == "weight shared by 2 nodes, not all of which can be factorized"
    assert frozen["two"] == "excluded by --exclude 'two'"


def test_a_weight_that_a_body_reads_too_stays() -> None:
    model = build(
        "[c] p = Conv <pads = [1, 1, 1, 1]> (x, w) y = If (t) <"
        " then_branch = yes () => (float[N, 8, 9, 9] m) { m = Conv <pads = [1, 1, 1, 1]> (p, w) },"
        " else_branch = no () => (float[N, 8, 9, 9] n) { n = Identity (p) }>",
        f"{IMAGE}, bool t",
        w=WEIGHTS["w"],
    )
    (entry,) = (entry for entry in found(model) if entry.name == "c")
    assert isinstance(entry, Frozen)
    assert entry.reason == "weight shared by 2 nodes, not all of which can be factorized"


@pytest.mark.parametrize("trainer", ["ort", "reconstruct", "none"])
def test_the_command_compresses_a_network_with_a_shared_layer(trainer: str, tmp_path: Path) -> None:
    low = (random(24, 3, seed=4) @ random(3, 24 * 9, seed=5)).reshape(24, 24, 3, 3) / np.float32(25)
    body = (
        "[c0] h = Conv <pads = [1, 1, 1, 1]> (x, w0) [r] i = Relu (h) "
        + HEADS.replace("(x, w", "(i, w").replace("(x)", "(i)")
        + " "
    )
    body = body.replace(
        "[ga] d = GlobalAveragePool (a)", "[ga] d = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (a)"
    )
    body = body.replace("[gc] e = GlobalAveragePool (c)", "[gc] e = Tanh (c)")
    model = build(
        body,
        "float[N, 3, 8, 8] x",
        w0=random(24, 3, 3, 3, seed=1) / np.float32(5),
        w=low,
        b=random(24, seed=2),
        v=random(96, 4, seed=3),
    )
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    options = ["--data", "random", "--metric", "agreement", "--delta", "20", "--threads", "1"]
    options += ["--time-limit", "8s", "--trainer", trainer]
    done = CliRunner().invoke(main, ["compress", str(source), str(target), *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert report["compressed"]
    assert [layer["name"] for layer in report["layers"] if layer["form"] and layer["name"] in ("one", "two")] == ["one"]
    written = onnx.load(target)
    assert "w" not in arrays(written)
    assert report["stage2"]["params"] == cost.params(written) < cost.params(model) / 2
    x = random(5, 3, 8, 8, seed=11)
    wanted, got = Runner(model)({"x": x})[0], Runner(target)({"x": x})[0]
    assert np.linalg.norm(got - wanted) < 0.4 * np.linalg.norm(wanted)
