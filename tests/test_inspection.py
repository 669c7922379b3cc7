"""`analyze`, `profile` and `evaluate`: numbers against a count by hand, tables and JSON; the model stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxneutrino import inspection
from onnxneutrino.cli import main
from onnxneutrino.config import Config, load_config
from onnxneutrino.errors import ModelError
from onnxneutrino.runtime import Runner

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 8, 8] x) => (float[N, 5] y) {
    [first] h = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (h)
    [depth] d = Conv <kernel_shape = [3, 3], group = 16, pads = [1, 1, 1, 1]> (r, w2)
    f = Flatten (d)
    [last] y = Gemm (f, w3, b3) }"""
TRAIN = 1500  # five rows for each of the 256 inputs of the Gemm
SHAPES = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "w3": (256, 5), "b3": (5,)}
PARAMS = 16 * 27 + 16 + 16 * 9 + 256 * 5 + 5
MACS = 16 * (16 * 27) + 16 * (16 * 9) + 256 * 5


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A working directory with `in.onnx` and `data.npz`; w1 has rank 2. The configuration of a run without data."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    model = parser.parse_model(TEXT)
    weights = {name: generator.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in SHAPES.items()}
    weights["w1"] = (generator.standard_normal((16, 2)) @ generator.standard_normal((2, 27))).reshape(SHAPES["w1"])
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(model, "in.onnx")
    images = generator.standard_normal((TRAIN + 20, 8, 8, 3)).astype(np.float32)
    labels = Runner(model)({"x": images.transpose(0, 3, 1, 2)})[0].argmax(1)
    labels[-4:] = (labels[-4:] + 1) % 5  # four of the twenty test images are wrong
    np.savez("data.npz", x_train=images[:TRAIN], y_train=labels[:TRAIN], x_test=images[TRAIN:], y_test=labels[TRAIN:])
    return load_config(None, {"threads": 1})


def with_data(**options: Any) -> Config:
    return load_config(None, {"threads": 1, "data": "data.npz", **options})


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints, after checking that it succeeds, says nothing else and writes nothing."""
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--threads", "1"])
    printed = capfd.readouterr()
    assert exit_.value.code == 0, printed.err
    assert printed.err == ""
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    return printed.out


def test_analyze(config: Config) -> None:
    first, depth, last = inspection.analyze(Path("in.onnx"), config)
    assert (first.name, first.op, first.weight_shape, first.params) == ("first", "Conv", (16, 3, 3, 3), 448)
    assert (first.macs, first.reason, first.sensitivity) == (6912, None, None)
    assert {"channel", "spatial_hv", "tucker2"} <= set(first.forms)
    assert (depth.forms, depth.reason) == ((), "depthwise convolution")
    assert (last.params, last.macs) == (1285, 1280)


def test_analyze_with_data_measures_sensitivity(config: Config) -> None:
    first, depth, last = inspection.analyze(Path("in.onnx"), with_data())
    assert first.sensitivity == pytest.approx(0, abs=1e-4)  # rank 2 costs less than half
    assert depth.sensitivity is None
    assert last.sensitivity is not None
    assert 1e-3 < last.sensitivity < 1  # random weights of full rank


def test_excluded_layer_has_its_reason(config: Config) -> None:
    layers = inspection.analyze(Path("in.onnx"), with_data(exclude=["la*"]))
    assert [layer.reason for layer in layers] == [None, "depthwise convolution", "excluded by --exclude 'la*'"]


def test_profile_counts(config: Config) -> None:
    (found,) = inspection.profile([Path("in.onnx")], config)
    assert (found.metrics.params, found.metrics.macs) == (PARAMS, MACS)
    assert found.metrics.size_bytes == Path("in.onnx").stat().st_size
    # Weights, and the largest pair: the first Conv's output beside its Relu's or the depthwise Conv's.
    assert found.metrics.memory_bytes == 4 * (PARAMS + 2 * 256)
    assert found.metrics.metric is None
    assert found.metrics.latency_ms > 0
    assert [(node.name, node.macs) for node in found.nodes if node.macs] == [
        ("first", 6912),
        ("depth", 2304),
        ("last", 1280),
    ]


def test_profile_compares_on_the_same_data(config: Config) -> None:
    onnx.save(onnx.load("in.onnx"), "other.onnx")
    one, two = inspection.profile([Path("in.onnx"), Path("other.onnx")], with_data())
    assert one.metrics.metric == two.metrics.metric == pytest.approx(80)
    assert one.metric_name == "top1"


def test_profile_refuses_models_of_other_inputs(config: Config) -> None:
    model = onnx.load("in.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7
    onnx.save(model, "other.onnx")
    with pytest.raises(ModelError, match=r"other\.onnx: its inputs differ from those of in\.onnx"):
        inspection.profile([Path("in.onnx"), Path("other.onnx")], config)


def test_evaluate(config: Config) -> None:
    found = inspection.evaluate(Path("in.onnx"), with_data())
    assert (found.metric, found.examples) == ("top1", 20)
    assert found.value == pytest.approx(80)


def test_evaluate_with_another_metric(config: Config) -> None:
    found = inspection.evaluate(Path("in.onnx"), with_data(metric="agreement"))
    assert (found.metric, found.value) == ("agreement", 100)


def test_analyze_command(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    lines = shown(capfd, "analyze", "in.onnx").splitlines()
    assert lines[0].split() == ["Layer", "Op", "Weight", "#Params", "MACs", "Forms", "or", "reason"]
    assert "frozen: depthwise convolution" in lines[2]
    assert lines[-1] == "2 of 3 layers marked, 1.73 k of 1.88 k params in them."
    assert "Sens." in shown(capfd, "analyze", "in.onnx", "--data", "data.npz").splitlines()[0]


def test_profile_command(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in shown(capfd, "profile", "in.onnx").splitlines()]
    assert ["top1", "-"] in lines
    assert ["#Params", "1.88", "k"] in lines
    assert ["last", "Gemm", "1.28", "k", "1.28", "k", "1x5"] in lines
    compared = shown(capfd, "profile", "in.onnx", "--compare", "in.onnx", "--data", "data.npz")
    assert ["top1", "80.00", "80.00", "-"] in [line.split() for line in compared.splitlines()]


def test_evaluate_command(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(capfd, "evaluate", "in.onnx", "--data", "data.npz") == "top1 80.00 on 20 test examples\n"


@pytest.mark.parametrize("command", ["analyze", "profile", "evaluate"])
def test_json_to_standard_output(config: Config, capfd: pytest.CaptureFixture[str], command: str) -> None:
    found = json.loads(shown(capfd, command, "in.onnx", "--data", "data.npz", "--json", "-"))
    if command == "evaluate":
        assert found == {"metric": "top1", "value": pytest.approx(80), "examples": 20, "warnings": []}
    elif command == "analyze":
        assert [layer["name"] for layer in found] == ["first", "depth", "last"]
    else:
        assert found[0]["metrics"]["params"] == PARAMS


def test_json_file(config: Config) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["analyze", "in.onnx", "--json", "layers.json"])
    assert exit_.value.code == 0
    assert [layer["params"] for layer in json.loads(Path("layers.json").read_text())] == [448, 144, 1285]


def test_table_beside_a_pipe_is_not_cut(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("in.onnx")
    model.graph.node[0].name = "/" + "block/" * 20 + "conv"
    onnx.save(model, "in.onnx")
    assert model.graph.node[0].name in shown(capfd, "analyze", "in.onnx")


def spoiled(labels: int) -> None:
    """`other.onnx`: in.onnx with the bias of one class raised, so that other images fall to it."""
    model = onnx.load("in.onnx")
    for initializer in model.graph.initializer:
        if initializer.name == "b3":
            bias = numpy_helper.to_array(initializer).copy()
            bias[0] += labels
            initializer.CopyFrom(numpy_helper.from_array(bias, "b3"))
    onnx.save(model, "other.onnx")


def test_compare_counts_drop_agreement_and_disagreements(config: Config) -> None:
    spoiled(1)
    found = inspection.compare(Path("in.onnx"), Path("other.onnx"), with_data())
    data = np.load("data.npz")
    inputs, right = {"x": data["x_test"].transpose(0, 3, 1, 2)}, data["y_test"]
    said, says = (Runner(onnx.load(name))(inputs)[0].argmax(1) for name in ("in.onnx", "other.onnx"))
    assert (said != says).any()
    before, after = (100 * np.mean(own == right) for own in (said, says))
    assert [own.metrics.metric for own in found.profiles] == pytest.approx([before, after])
    assert found.drop.value == pytest.approx(before - after)
    assert found.drop.low <= found.drop.value <= found.drop.high
    assert found.examples == 20
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(100 * np.mean(said == says))
    cells = (
        found.agreement.both_right,
        found.agreement.only_original,
        found.agreement.only_compressed,
        found.agreement.both_wrong,
    )
    a, b = said == right, says == right
    assert cells == (sum(a & b), sum(a & ~b), sum(~a & b), sum(~a & ~b))
    counted = {(own.original, own.compressed): own.count for own in found.agreement.confusions}
    assert counted == {(i, j): n for i in range(5) for j in range(5) if (n := int(sum((said == i) & (says == j))))}


def test_compare_of_a_regression_agrees_by_the_relative_error(config: Config) -> None:
    spoiled(1)
    found = inspection.compare(Path("in.onnx"), Path("other.onnx"), with_data(metric="mse", data="random"))
    assert found.agreement is not None
    assert found.agreement.classes is None
    assert 0 < found.agreement.value < 100
    same = inspection.compare(Path("in.onnx"), Path("in.onnx"), with_data(metric="mse", data="random"))
    assert same.agreement is not None
    assert same.agreement.value == 100
    assert same.drop.value == 0


def test_compare_fails_a_pipeline_above_the_largest_drop(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    spoiled(9)
    text = shown(capfd, "compare", "in.onnx", "other.onnx", "--data", "data.npz")
    assert "Drop on 20 test examples" in text
    for allowed, code in ((100, 0), (1, 3)):
        with pytest.raises(SystemExit) as exit_:
            main(["compare", "in.onnx", "other.onnx", "--data", "data.npz", "--max-drop", str(allowed), "--json", "-"])
        printed = capfd.readouterr()
        assert exit_.value.code == code
        assert json.loads(printed.out)["drop"]["value"] > 1
        assert ("more than --max-drop 1.00" in printed.err) == (code == 3)


def test_a_quantized_model_is_evaluated_and_nothing_else(config: Config) -> None:
    model = onnx.load("in.onnx")
    model.graph.node[0].input[0] = "x_again"
    for name, value in (("scale", np.float32(0.02)), ("zero", np.uint8(128))):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_int"]),
        onnx.helper.make_node("DequantizeLinear", ["x_int", "scale", "zero"], ["x_again"]),
        *model.graph.node,
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, "int8.onnx")
    found = inspection.evaluate(Path("int8.onnx"), with_data())
    assert found.value == pytest.approx(80, abs=10)  # four of twenty labels are wrong; a pixel is off by at most 0.01
    with pytest.raises(ModelError, match="already quantized"):
        inspection.profile([Path("int8.onnx")], config)


def test_compare_wants_the_same_inputs(config: Config) -> None:
    model = onnx.load("in.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    onnx.save(model, "named.onnx")
    with pytest.raises(ModelError, match=r"named.onnx: its inputs are called pixels, not x"):
        inspection.compare(Path("in.onnx"), Path("named.onnx"), with_data())
