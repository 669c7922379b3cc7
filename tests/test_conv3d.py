"""3-D convolutions from the graph to a whole run: found, counted, rewritten, differentiated, compressed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from models_drawn import build, random
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import cost
from onnxneutrino.calibrate import calibrate, outputs_at, patches, sample_positions
from onnxneutrino.candidates import point, rank_grid
from onnxneutrino.cli import main
from onnxneutrino.finetune import Example
from onnxneutrino.forms import applicable, decompose, full_ranks
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.graph import arrays, fixed_shapes, tensor_types, with_batch
from onnxneutrino.losses import Loss
from onnxneutrino.passes.factorize import factorize, last_stage, read_factors, stage_arrays, stage_names
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Choice, Form, Frozen, Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy


def found(model: ModelProto) -> list[Layer | Frozen]:
    return find_layers(model, tensor_types(model, fixed_shapes(model, {})))


CONVS = {
    "plain": ("group = 1", (3, 2, 4)),
    "strided": ("strides = [2, 1, 3], pads = [1, 0, 2, 2, 1, 0]", (3, 3, 3)),
    "dilated": ("dilations = [1, 3, 2], pads = [0, 2, 1, 1, 3, 2]", (2, 3, 3)),
    "same upper": ('auto_pad = "SAME_UPPER", strides = [2, 3, 1]', (3, 3, 2)),
    "same lower": ('auto_pad = "SAME_LOWER", strides = [2, 2, 2]', (2, 3, 4)),
    "one axis": ("strides = [2, 1, 2], pads = [1, 0, 1, 1, 2, 0]", (3, 1, 1)),
    "one element": ("strides = [1, 2, 2]", (1, 1, 1)),
}
CASES = [(name, form) for name, (_, kernel) in CONVS.items() for form in applicable((8, 6, *kernel))]


def conv(name: str) -> tuple[ModelProto, Layer]:
    attributes, kernel = CONVS[name]
    inputs = 48 if math.prod(kernel) == 1 else 6
    model = build(
        f"[c] y = Conv <{attributes}> (x, w, b)",
        f"float[N, {inputs}, 7, 8, 9] x",
        w=random(18, inputs, *kernel),
        b=random(18, seed=1),
    )
    (layer,) = found(model)
    assert isinstance(layer, Layer), layer
    return model, layer


def images(layer: Layer, count: int, seed: int = 3) -> NDArray[np.float32]:
    return random(count, layer.weight.shape[1], 7, 8, 9, seed=seed)


@pytest.mark.parametrize("name", CONVS)
def test_patches_times_weight_are_the_outputs_of_the_runtime(name: str) -> None:
    model, layer = conv(name)
    assert (layer.kind, layer.input_size, layer.weight_shape) == ("conv3d", (7, 8, 9), layer.weight.shape)
    x = images(layer, 3)
    (y,) = Runner(model)({"x": x})
    assert layer.positions == math.prod(y.shape[2:])
    assert layer.geometry.output_size(7, 8, 9) == y.shape[2:]
    positions = sample_positions(layer, 3, layer.positions, seed=0)
    rows = patches(layer, layer.geometry, x, positions) @ layer.weight.reshape(18, -1).T + layer.bias
    np.testing.assert_allclose(rows, outputs_at(layer, y, positions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_calibrated_chain_at_full_rank_is_the_layer(name: str, form: Form) -> None:
    model, layer = conv(name)
    moments, _ = calibrate(lambda feed: [feed["x"]], ["x"], [layer], [{"x": images(layer, 8)}], 8, seed=0)
    fitted = decompose(form, layer.weight, layer.bias, moments["c"])
    factors = fitted.factors(full_ranks(form, layer.weight.shape))
    result = factorize(model, [layer], {"c": factors})
    onnx.checker.check_model(result, full_check=True)
    ordered = {"Concat", "Gather"} if form == "interpolative" else set()
    assert {node.op_type for node in result.graph.node} == {"Conv"} | ordered
    x = images(layer, 2, seed=5)
    np.testing.assert_allclose(Runner(result)({"x": x})[0], Runner(model)({"x": x})[0], rtol=1e-3, atol=1e-3)
    # Trained values come back by name, and the last stage is a product at each position.
    trained = {name: value + random(*value.shape, seed=7) for name, value in stage_arrays(layer, factors).items()}
    back = stage_arrays(layer, read_factors(layer, factors, trained))
    assert tuple(back) == stage_names(layer, factors)
    assert all(np.array_equal(back[name], trained[name]) for name in trained)
    if form != "input":
        fed, y = Runner(result, last_stage(layer, factors))({"x": x})
        inner = factors.inner_bias if factors.direct else 0
        last = (np.moveaxis(fed, 1, -1) - inner) @ factors.stages[-1].weight.reshape(18, -1).T + factors.bias
        np.testing.assert_allclose(np.moveaxis(y, 1, -1), last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_choice_costs_what_its_graph_costs(name: str, form: Form) -> None:
    model, layer = conv(name)
    assert rank_grid(layer, form) or form == "interpolative"
    ranks = (4, 5) if form == "tucker2" else (4,)
    moments, _ = calibrate(lambda feed: [feed["x"]], ["x"], [layer], [{"x": images(layer, 4)}], 4, seed=0)
    factors = decompose(form, layer.weight, layer.bias, moments["c"]).factors(ranks)
    result = factorize(model, [layer], {"c": factors})
    priced = point(layer, Choice(form, ranks))
    assert priced.params == cost.params(result)
    assert priced.macs == cost.macs(result, tensor_types(result, fixed_shapes(result, {})))
    assert layer.macs == cost.macs(model, tensor_types(model, fixed_shapes(model, {})))


def network() -> ModelProto:
    """`(N, 2, 6, 8, 8)` to four outputs; the layer `c2` has rank 3."""
    low = (random(24, 3, seed=4) @ random(3, 24 * 27, seed=5)).reshape(24, 24, 3, 3, 3) / np.float32(45)
    return build(
        "[c1] a = Conv <pads = [1, 1, 1, 1, 1, 1], strides = [1, 2, 2]> (x, w1, b1) [r1] r = Relu (a) "
        "[c2] b = Conv <pads = [1, 1, 1, 1, 1, 1]> (r, w2) [r2] s = LeakyRelu (b) "
        "[pool] p = MaxPool <kernel_shape = [2, 2, 2], strides = [2, 2, 2]> (s) "
        "[flat] f = Flatten (p) [f3] y = Gemm (f, w3)",
        "float[N, 2, 6, 8, 8] x",
        w1=random(24, 2, 3, 3, 3, seed=1) / np.float32(7),
        b1=random(24, seed=2),
        w2=low,
        w3=random(288, 4, seed=3),
    )


@pytest.mark.parametrize("form", ["channel", "interpolative", "input", "tucker2"])
def test_gradients_of_factors_equal_finite_differences(form: Form) -> None:
    model = network()
    layers = {layer.name: layer for layer in found(model) if isinstance(layer, Layer)}
    layer, x = layers["c2"], random(4, 2, 6, 8, 8, seed=8)
    run = Runner(model, [layer.input])
    moments, _ = calibrate(run, [layer.input], [layer], [{"x": x}], 4, seed=0)
    ranks = (4, 5) if form == "tucker2" else (4,)
    factors = decompose(form, layer.weight, layer.bias, moments["c2"]).factors(ranks)
    result = factorize(model, [layer], {"c2": factors})
    names = stage_names(layer, factors)
    example = Example({"x": x}, [random(4, 4, seed=9)], None)
    seen = derivatives(
        with_batch(result, 4),
        training_copy(result, 4),
        [[name] for name in (*names, "w1")],
        Loss("values", ("y",)),
        example,
    )
    assert [own.names for own in seen] == [(name,) for name in (*names, "w1")]
    for own in seen:
        assert abs(own.analytic) > 1e-4
        assert own.error < 2e-2, own


@pytest.mark.parametrize("trainer", ["ort", "none"])
def test_the_command_compresses_a_3d_network(trainer: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    model = network()
    onnx.save(model, source)
    options = ["--data", "random", "--metric", "agreement", "--delta", "8", "--threads", "1"]
    options += ["--time-limit", "12s", "--trainer", trainer]
    done = CliRunner().invoke(main, ["compress", str(source), str(target), *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert report["compressed"]
    assert bool(report["training"]) == (trainer == "ort")
    assert "c2" in {layer["name"] for layer in report["layers"] if layer["form"]}
    written = onnx.load(target)
    assert cost.params(written) < cost.params(model) / 3
    assert set(arrays(written)).isdisjoint({"w2"})
    x = random(500, 2, 6, 8, 8, seed=11)  # a few alone may lie far off
    wanted, got = Runner(model)({"x": x})[0], Runner(target)({"x": x})[0]
    assert np.linalg.norm(got - wanted) < 0.3 * np.linalg.norm(wanted)
