"""The command line: what `compress` writes and keeps, its options, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper, parser
from PIL import Image

from onnxneutrino.cli import main
from onnxneutrino.report import COST_FIELDS, Report, SixMetrics
from onnxneutrino.runtime import Runner, random_inputs
from onnxneutrino.shapes import fixed_shapes

COMMANDS = tuple(name for name, own in main.commands.items() if not isinstance(own, click.Group))
COUNT = 64
# Section 2 of the design, in its order.
# fmt: off
REPORT_FIELDS = {
    "original", "stage1", "stage2", "enhancement", "drop", "drop_interval", "drop_select", "drop_report", "delta",
    "objective", "compressed", "layers", "normalization", "candidates", "seconds", "seed", "versions", "warnings",
}
# fmt: on
MLP = "[f1] h = Gemm (x, w1, b1)\n r = Relu (h)\n [f2] y = Gemm (r, w2, b2)"
TEXTS = {
    "symbolic": f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 24] x) => (float[N, 4] y) {{ {MLP} }}',
    "fixed": f'<ir_version: 7, opset_import: ["": 7]> g (float[1, 24] x) => (float[1, 4] y) {{ {MLP} }}',
    "metadata": f"""<ir_version: 9, opset_import: ["": 21], producer_name: "maker", producer_version: "3",
        domain: "org.example", model_version: 7, doc_string: "about it">
        g (float[batch, 24] x) => (float[batch, 4] y) {{ {MLP} }}""",
    "conv1d": """<ir_version: 8, opset_import: ["": 13]> g (float[N, 4, 20] x) => (float[N, 4] y) {
        [c] h = Conv <kernel_shape = [5], strides = [2], dilations = [2], pads = [1, 2]> (x, k1, b1)
        r = Relu (h)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        [f2] y = Gemm <transB = 1> (f, w2t, b2) }""",
    "tensorflow": """<ir_version: 3, opset_import: ["": 9]> g (float[unk__1, 4, 4, 2] x) => (float[unk__1, 4] y) {
        t = Transpose <perm = [0, 3, 1, 2]> (x)
        [c] h = Conv <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (t, k2)
        hb = Add (h, b4)
        r = Relu (hb)
        t2 = Transpose <perm = [0, 2, 3, 1]> (r)
        f = Reshape (t2, shape)
        [m] d = MatMul (f, w3)
        y = Add (d, b2) }""",
}


def low(rows: int, columns: int, rank: int) -> NDArray[np.float32]:
    """A matrix of this rank, but for noise."""
    generator = np.random.default_rng([rows, columns, rank])
    product = generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, columns))
    noisy = product / np.sqrt(rank * rows) + 1e-4 * generator.standard_normal((rows, columns))
    return np.asarray(noisy, np.float32)


ARRAYS = {
    "w1": low(24, 32, 4),
    "b1": np.linspace(-0.1, 0.1, 32, dtype=np.float32),
    "w2": low(32, 4, 2),
    "w2t": low(32, 4, 2).T,
    "b2": np.zeros(4, np.float32),
    "k1": low(32, 20, 2).reshape(32, 4, 5),
    "k2": low(16, 18, 2).reshape(16, 2, 3, 3),
    "b4": np.linspace(-0.1, 0.1, 16, dtype=np.float32).reshape(1, 16, 1, 1),
    "shape": np.array([-1, 256]),
    "w3": low(256, 4, 2),
}


def network(name: str) -> ModelProto:
    """One of TEXTS with its weights; below IR 4 they are inputs too, and there is metadata."""
    model = parser.parse_model(TEXTS[name])
    for used in dict.fromkeys(tensor for node in model.graph.node for tensor in node.input if tensor in ARRAYS):
        array = numpy_helper.from_array(np.ascontiguousarray(ARRAYS[used]), used)
        model.graph.initializer.append(array)
        if model.ir_version < 4:
            model.graph.input.append(helper.make_tensor_value_info(used, array.data_type, list(array.dims)))
    if name in ("metadata", "tensorflow"):
        helper.set_model_props(model, {"key": "value"})
    return model


def write(model: ModelProto) -> None:
    """The model as `in.onnx`, and data on which it is always right: `data.npz`, and without labels `bare.npz`."""
    onnx.save(model, "in.onnx")
    size = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    inputs = np.random.default_rng(5).standard_normal((2 * COUNT, *size)).astype(np.float32)
    run = Runner(model, threads=1)
    labels = np.array([run({"x": row[None]})[0].argmax() for row in inputs])
    halves = {"x_train": inputs[:COUNT], "x_test": inputs[COUNT:]}
    np.savez("bare.npz", **halves)  # type: ignore[arg-type]
    np.savez("data.npz", **halves, y_train=labels[:COUNT], y_test=labels[COUNT:])  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, data, and a temporary folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(network("symbolic"))
    return tmp_path


def names() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def done(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--threads", "1"])
    assert exit_.value.code == code


def compressed(*arguments: str, model: str = "in.onnx", more: int = 0) -> Report:
    """Compress quietly, delta 20; the report, after checking everything that the output promises."""
    before = names()
    given = arguments if "--time-limit" in arguments else (*arguments, "--trainer", "none")
    done("compress", model, "out.onnx", "--delta", "20", "--quiet", *given)
    new = names() - before
    data = {name for name in new if re.fullmatch(r"out\.onnx\.[0-9a-f]{16}\.data", name)}
    assert new - data == {"out.onnx", "out.report.json", "out.report.html"}
    assert len(data) == more
    text = Path("out.report.json").read_text(encoding="utf-8")
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(Report)} >= REPORT_FIELDS
    report = Report.from_json(text)
    written = onnx.load("out.onnx")
    onnx.checker.check_model(written, full_check=True)
    check_kept(onnx.load(model), written)
    Runner(written, threads=1)(random_inputs(written, fixed_shapes(written, {}), 0))
    last = report.stage2 or report.stage1
    assert last is not None
    assert (last.params, report.original.params) == (floats(written), floats(onnx.load(model)))
    assert last.size_bytes == sum(Path(name).stat().st_size for name in {"out.onnx", *data})
    assert report.drop is not None
    assert report.drop <= 20
    assert report.compressed
    return report


def floats(model: ModelProto) -> int:
    kept = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    return sum(int(np.prod(tensor.dims)) for tensor in kept)


def check_kept(before: ModelProto, after: ModelProto) -> None:
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(before, field)
    assert after.opset_import == before.opset_import
    assert after.metadata_props == before.metadata_props
    assert after.graph.output == before.graph.output
    assert {node.domain for node in after.graph.node} <= {"", "ai.onnx"}
    ours, theirs = ({tensor.name for tensor in model.graph.initializer} for model in (before, after))
    fed = [value for value in before.graph.input if value.name not in ours]
    assert [value for value in after.graph.input if value.name not in theirs] == fed
    listed = {value.name for value in after.graph.input}
    assert after.ir_version >= 4 or theirs <= listed


@pytest.mark.parametrize("name", TEXTS)
def test_what_the_output_keeps(name: str) -> None:
    write(network(name))
    report = compressed("--data", "data.npz", *(["--layout", "NHWC"] if name == "tensorflow" else []))
    assert report.original.metric == 100
    assert report.enhancement is not None
    assert report.enhancement.params > 1.5
    assert {layer.name: layer.form for layer in report.layers if layer.form}


def test_bare_command(capfd: pytest.CaptureFixture[str]) -> None:
    Path("in.toml").write_text(
        '[data]\npath = "data.npz"\n[compress]\ndelta = 20\ntrainer = "none"\n', encoding="utf-8"
    )
    done("compress", "in.onnx", "out.onnx")
    shown = capfd.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()[1:5]] == ["Original", "Stage", "Stage", "Enh."]
    assert shown.out.endswith("Wrote out.onnx, out.report.json and out.report.html.\n")
    assert "in.onnx: top1 100.00 on 64 test examples" in shown.err
    assert names() == {"in.onnx", "in.toml", "data.npz", "bare.npz", "out.onnx", "out.report.json", "out.report.html"}
    page = Path("out.report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "in.onnx" in page


@pytest.mark.parametrize("objective", ["params", "macs", "size", "memory"])
def test_objective(objective: str) -> None:
    report = compressed("--data", "data.npz", "--objective", objective)
    assert report.objective == objective
    assert report.enhancement is not None
    assert getattr(report.enhancement, COST_FIELDS[objective]) > 1.5


def test_a_network_that_gets_no_faster_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxneutrino.choice.measured_latencies", lambda models, *rest: [1.0] * len(models))
    given = (
        "--data",
        "data.npz",
        "--objective",
        "latency",
        "--delta",
        "20",
        "--trainer",
        "none",
        "--time-limit",
        "60s",
    )
    done("compress", "in.onnx", "out.onnx", "--quiet", *given)
    report = Report.from_json(Path("out.report.json").read_text(encoding="utf-8"))
    assert not report.compressed
    assert report.seconds["measure latencies"] > 0
    assert floats(onnx.load("out.onnx")) == floats(onnx.load("in.onnx"))


def targeted(*arguments: str, code: int = 0, trainer: str = "none") -> Report:
    """Compress quietly without training; the report, after seeing that it is about the written model."""
    given = ("--data", "data.npz", "--quiet", "--trainer", trainer, *arguments)
    done("compress", "in.onnx", "out.onnx", *given, code=code)
    report = Report.from_json(Path("out.report.json").read_text(encoding="utf-8"))
    assert report.written.params == floats(onnx.load("out.onnx"))
    assert report.written.size_bytes == Path("out.onnx").stat().st_size
    assert bool(report.missed()) == (code == 3)
    return report


def test_hard_targets_are_met_alone_and_together(capfd: pytest.CaptureFixture[str]) -> None:
    whole = targeted("--max-params", "932").original
    for given in (("--max-params", "0.5k"), ("--max-macs", "450", "--max-size", "3KB", "--max-memory", "2.5KB")):
        report = targeted(*given)
        assert report.compressed
        assert report.delta is None
        limits = {row.name: row.limit for row in report.targets}
        assert len(limits) == len(given) // 2
        for name, limit in limits.items():
            assert getattr(report.written, COST_FIELDS[name]) <= limit < getattr(whole, COST_FIELDS[name])
    assert "onnxneutrino:" not in capfd.readouterr().err


def test_hard_targets_with_training_keep_the_metric() -> None:
    report = targeted("--max-params", "500", "--time-limit", "9s", trainer="ort")
    assert report.training
    assert report.written.params <= 500
    assert report.drop is not None
    assert report.drop <= 20


def test_hard_targets_that_the_original_meets_leave_it_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    report = targeted("--max-params", "1k", "--max-size", "1MB", "--delta", "0.5")
    assert not report.compressed
    assert not report.candidates
    assert report.delta == 0.5
    assert report.written.params == report.original.params
    assert "The original meets all hard targets: the normalized original was written." in capfd.readouterr().out


def test_a_hard_target_below_the_smallest_plan_ends_with_3(capfd: pytest.CaptureFixture[str]) -> None:
    report = targeted("--max-params", "50", "--max-size", "1MB", code=3)
    (row, _) = report.targets
    assert row.least == report.written.params > 50
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("onnxneutrino: hard target not met: params ")
    assert f"instead of 50 (the smallest plan has about {row.least:g})" in error
    assert error.endswith("the best model found was written\n")


def test_a_hard_target_out_of_deltas_reach_ends_with_3(capfd: pytest.CaptureFixture[str]) -> None:
    Path("in.toml").write_text('[compress]\ndelta = 5\nmax-params = "250"\n', encoding="utf-8")
    report = targeted(code=3)
    assert report.compressed
    assert report.drop is not None
    assert report.drop <= report.delta == 5
    assert 250 < report.written.params < report.original.params
    error = capfd.readouterr().err
    assert "hard target not met within delta 5.00: params " in error
    assert "smallest plan" not in error


def test_a_latency_that_the_network_has_is_no_work() -> None:
    report = targeted("--max-latency", "10s", "--time-limit", "60s")
    assert not report.compressed
    assert report.targets[0].limit == 10_000


def test_stage_1_only() -> None:
    report = compressed("--data", "data.npz", "--stage", "1")
    assert report.stage2 is None
    assert isinstance(report.stage1, SixMetrics)


def test_same_seed_same_bytes() -> None:
    written = []
    for seed in ("3", "3"):
        compressed("--data", "data.npz", "--seed", seed)
        written.append(Path("out.onnx").read_bytes())
        for name in ("out.onnx", "out.report.json", "out.report.html"):
            Path(name).unlink()
    assert written[0] == written[1]


def test_external_data_in_and_out() -> None:
    model = network("tensorflow")
    write(model)
    onnx.save(model, "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=1)
    compressed("--data", "data.npz", "--layout", "NHWC", "--only", "c", model="ext.onnx", more=1)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load("out.onnx").graph.initializer}
    assert any(tensor.external_data for tensor in onnx.load("out.onnx", load_external_data=False).graph.initializer)
    np.testing.assert_array_equal(tensors["w3"], ARRAYS["w3"])

    # A model renamed since keeps its data, what the next one writes beside it or not.
    Path("out.onnx").rename("kept.onnx")
    for name in ("out.report.json", "out.report.html"):
        Path(name).unlink()
    compressed("--data", "data.npz", "--layout", "NHWC", model="ext.onnx")
    assert any(
        np.array_equal(numpy_helper.to_array(own), ARRAYS["w3"]) for own in onnx.load("kept.onnx").graph.initializer
    )


@pytest.mark.parametrize("data", ["bare.npz", "random"])
def test_without_labels_the_metric_is_agreement(data: str) -> None:
    report = compressed("--data", data)
    assert (report.metric_name, report.original.metric) == ("agreement", 100)
    assert any("nothing about real data" in line for line in report.warnings) == (data == "random")


def test_trained_with_an_excluded_layer_and_no_labels() -> None:
    write(network("tensorflow"))
    given = ("--data", "data.npz", "--layout", "NHWC", "--no-labels", "--time-limit", "8s")
    report = compressed(*given, "--exclude", "c*")
    assert report.training
    assert report.settings["labels"] is False
    assert {layer.name: layer.reason for layer in report.layers} == {"c": "excluded by --exclude 'c*'", "m": None}
    weights = {tensor.name: tensor.raw_data for tensor in onnx.load("out.onnx").graph.initializer}
    assert weights["k2"] == ARRAYS["k2"].tobytes()
    assert "w3" not in weights


def test_no_time_to_train_is_said() -> None:
    report = compressed("--data", "data.npz", "--time-limit", "1s")
    assert any("no network was fine-tuned" in line for line in report.warnings)


@pytest.mark.parametrize("function", ["right", "wrong"])
def test_own_metric(function: str) -> None:
    Path("metric.py").write_text(
        "def right(outputs, targets):\n    return 100 * float((outputs[0].argmax(1) == targets).mean())\n"
        "def wrong(outputs, targets):\n    return 100 - right(outputs, targets)\nwrong.higher_is_better = False\n",
        encoding="utf-8",
    )
    report = compressed("--data", "data.npz", "--metric", f"metric.py:{function}")
    assert report.original.metric == (100 if function == "right" else 0)
    assert report.stage2 is not None
    assert report.stage2.metric is not None
    assert abs(report.original.metric - report.stage2.metric) == report.drop


def test_regression_with_mse() -> None:
    inputs = np.random.default_rng(5).standard_normal((2 * COUNT, 24)).astype(np.float32)
    targets = Runner(network("symbolic"))({"x": inputs})[0]
    halves = {"train": slice(COUNT), "test": slice(COUNT, None)}
    arrays: dict[str, Any] = {f"x_{name}": inputs[part] for name, part in halves.items()}
    arrays |= {f"y_{name}": targets[part] for name, part in halves.items()}
    np.savez("data.npz", **arrays)
    report = compressed("--data", "data.npz", "--metric", "mse")
    assert report.original.metric == pytest.approx(0, abs=1e-9)
    assert report.stage2 is not None
    assert report.drop == pytest.approx(report.stage2.metric)


def test_image_folder() -> None:
    model = parser.parse_model(TEXTS["symbolic"].replace("float[N, 24]", "float[N, 1, 4, 6]"))
    model.graph.node.insert(0, helper.make_node("Flatten", ["x"], ["flat"]))
    model.graph.node[1].input[0] = "flat"
    columns = np.linspace(-1, 1, 4, dtype=np.float32)
    arrays: dict[str, NDArray[Any]] = {
        "w1": np.ones((24, 32)) / 24,
        "b1": np.zeros(32),
        "w2": np.tile(columns, (32, 1)),
        "b2": -(columns**2) * 8,
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(model, "in.onnx")
    for split in ("train", "test"):
        for label, grey in enumerate((0, 255)):
            Path(f"images/{split}/{label}").mkdir(parents=True)
            for number in range(8):
                Image.new("L", (6, 4), abs(grey - number)).save(f"images/{split}/{label}/{number}.png")
    metric = ("--metric", "agreement")
    report = compressed("--data", "images", "--scale", str(1 / 255), *metric)
    assert any("2 class folders, the model has 4 classes" in line for line in report.warnings)


LOADER = """
import numpy as np
def load():
    print("loading")
    generator = np.random.default_rng(0)
    def batch():
        inputs = {name: generator.standard_normal((16, 24)).astype("float32") for name in "ab"}
        return inputs, None
    return {"train": [batch() for _ in range(4)], "test": [batch() for _ in range(4)]}
"""


def test_json_is_all_of_standard_output_with_a_talkative_loader(capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        TEXTS["symbolic"]
        .replace("float[N, 24] x", "float[N, 24] a, float[N, 24] b")
        .replace("{ ", "{ x = Add (a, b)\n")
    )
    model = parser.parse_model(text)
    model.graph.initializer.extend(network("symbolic").graph.initializer)
    onnx.save(model, "in.onnx")
    Path("loader.py").write_text(LOADER, encoding="utf-8")
    compressed("--data", "loader.py:load", "--json", "-")
    shown = capfd.readouterr()
    assert shown.out == Path("out.report.json").read_text(encoding="utf-8")
    assert shown.err == "loading\n"


@pytest.mark.parametrize(("trainer", "within"), [("ort", "three delta"), ("none", "delta")])
def test_dry_run(capfd: pytest.CaptureFixture[str], trainer: str, within: str) -> None:
    before = names()
    done("compress", "in.onnx", "out.onnx", "--data", "data.npz", "--dry-run", "--delta", "20", "--trainer", trainer)
    shown = capfd.readouterr().out
    assert names() == before
    assert "in.onnx: top1 100.00, 932 params" in shown
    assert "1 of 2 layers can be factorized, 800 params in them." in shown
    gain = re.search(rf"Roughly within reach: ([\d.]+)\S fewer params, .* is within {within}\.", shown)
    assert gain is not None
    assert float(gain[1]) > 1.5
    assert ("training and verifying would take up to " in shown) == (trainer == "ort")
    assert shown.endswith("Dry run: nothing was written.\n")


def test_help_of_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        shown = capfd.readouterr().out
        assert shown.startswith("Usage: ")
        assert "--input-shape" in shown


def test_module_runs() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "onnxneutrino", "--version"], capture_output=True, text=True, check=True
    )
    assert re.search(r"version \d+\.\d+", run.stdout)
    assert run.stderr == ""
