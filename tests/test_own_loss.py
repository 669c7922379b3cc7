"""A loss of the user's: as an onnxblock and as a graph, its gradients, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

import onnxneutrino
from onnxneutrino import selfcheck
from onnxneutrino.cli import main
from onnxneutrino.errors import NeutrinoError, TrainingError, UsageError
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.graph import TensorType
from onnxneutrino.losses import Loss
from onnxneutrino.own_loss import load_loss, prepared
from onnxneutrino.report import Report
from onnxneutrino.runtime import Runner
from onnxneutrino.training_plan import plan_training

BATCH = 4
NAMES = ["w1", "b1", "w2"]
HEAD = "from onnxruntime.training import onnxblock\n\n\n"
BLOCKS = {
    "squared": "class Own(onnxblock.ForwardBlock):\n"
    "    def build(self, outputs, teacher, labels):\n"
    "        return onnxblock.loss.MSELoss()(outputs[0], teacher[0])\n",
    "labels": "class Own(onnxblock.Block):\n"
    "    def build(self, outputs, teacher, labels):\n"
    "        return onnxblock.loss.CrossEntropyLoss()(outputs[0], labels)\n",
    "both": "class Own(onnxblock.Block):\n"
    "    def build(self, outputs, teacher, labels):\n"
    "        entropy = onnxblock.loss.CrossEntropyLoss()(outputs[0], labels)\n"
    "        return onnxblock.blocks.Add()(entropy, onnxblock.loss.L1Loss()(outputs[0], teacher[0]))\n",
}
SQUARED = """<ir_version: 8, opset_import: ["": 13]> loss (float[N, 3] y, float[N, 3] "teacher/y") => (float loss) {
    d = Sub (y, "teacher/y")  q = Mul (d, d)  loss = ReduceMean <keepdims = 0> (q) }"""
WEIGHTED = """<ir_version: 8, opset_import: ["": 17]> loss (float[N, 3] y, float[N, 2, 3] labels) => (float s)
    <int64[1] first = {0}, int64[1] second = {1}> {
    l = Slice (labels, first, second, second)  f = Flatten (l)  d = Sub (y, f)  a = Abs (d)  e = Exp (a)
    s = ReduceMean <keepdims = 0> (e) }"""


def network(middle: str = "Tanh", opset: int = 17) -> ModelProto:
    model = parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}]> net (float[{BATCH}, 6] x) => (float[{BATCH}, 3] y) {{
        h = Gemm (x, w1, b1)  t = {middle} (h)  y = MatMul (t, w2) }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (6, 5)), ("b1", (5,)), ("w2", (5, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


def graph(text: str) -> ModelProto:
    """Names of the form `teacher/y`, which the parser does not take, are put in afterwards."""
    model = parse_model(text.replace('"teacher/y"', "teacher_y"))
    for value in (*model.graph.input, *(node for node in model.graph.node)):
        if isinstance(value, onnx.NodeProto):
            value.input[:] = ["teacher/y" if name == "teacher_y" else name for name in value.input]
        elif value.name == "teacher_y":
            value.name = "teacher/y"
    return model


def example(labels: Any = None) -> Example:
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((BATCH, size)).astype(np.float32) for size in (6, 3))
    return Example({"x": x}, [y], labels)


CLASSES = np.array([0, 2, 1, 2])
MAPS = np.random.default_rng(5).standard_normal((BATCH, 2, 3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(reference: str, labels: Any = None) -> Loss:
    own = load_loss(reference)
    assert own is not None
    return prepared(own, {"y": example().teacher[0]}, labels)


def block(kind: str, labels: Any = None) -> Loss:
    Path("own.py").write_text(HEAD + BLOCKS[kind])
    return made("own.py:Own", labels)


def gradients(loss: Loss, labels: Any = None, opset: int = 17) -> tuple[float, dict[str, Any]]:
    own = example(labels)
    with Trainer(network(opset=opset), NAMES, loss, 1) as trainer:
        found = trainer.gradients(own)
        return trainer.step(own, 0.0), found


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_a_graph_and_a_block_equal_to_the_built_in_loss_have_its_gradients(folder: Path, opset: int) -> None:
    onnx.save(graph(SQUARED), "loss.onnx")
    wanted, slopes = gradients(Loss("values", ("y",)), opset=opset)
    for own in (made("loss.onnx"), block("squared")):
        assert own.outputs == ("y",)
        assert own.label_weight == 0
        value, found = gradients(own, opset=opset)
        assert value == pytest.approx(wanted, rel=1e-6)
        for name in NAMES:
            np.testing.assert_allclose(found[name], slopes[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "labels"), [("squared", None), ("labels", CLASSES), ("both", CLASSES)])
def test_gradients_of_a_block_are_those_of_finite_differences(folder: Path, kind: str, labels: Any) -> None:
    loss = block(kind, labels)
    assert loss.label_weight == float(labels is not None)
    for found in derivatives(network(), network(), [NAMES, *([name] for name in NAMES)], loss, example(labels)):
        assert abs(found.analytic) > 1e-3
        assert found.error < 1e-2


def test_labels_may_be_maps_of_floats(folder: Path) -> None:
    onnx.save(graph(WEIGHTED), "loss.onnx")
    loss = made("loss.onnx", MAPS)
    own = example(MAPS)
    value, _ = gradients(loss, MAPS)
    y = Runner(network())(own.inputs)[0]
    assert value == pytest.approx(np.mean(np.exp(np.abs(y - MAPS[:, 0]))), rel=1e-5)
    for found in derivatives(network(), network(), [NAMES], loss, own):
        assert found.error < 1e-2


def test_the_self_check_in_its_child_process_takes_labels(folder: Path) -> None:
    loss = block("both", CLASSES)
    verdict = selfcheck.gradient_check(network(), [["w1", "b1"], ["w2"]], loss, example(CLASSES))
    assert (verdict.fault, verdict.note) == (None, "")
    assert verdict.directions == 3


WRONG = {
    "nothing": ("def own():\n    pass\n", "own.py, line 4: own must return an onnxblock"),
    "raises": ("def own():\n    return 1 / 0\n", "own.py, line 5: own failed with ZeroDivisionError"),
    "build": (
        "class own(onnxblock.Block):\n    def build(self, outputs, teacher, labels):\n        return outputs[3]\n",
        "own.py, line 6: own failed with IndexError",
    ),
    "number": (
        "class own(onnxblock.Block):\n    def build(self, outputs, teacher, labels):\n        return 3\n",
        "own.py, line 4: own gave an onnxblock whose build must return the name of the loss, not 3",
    ),
    "shape": (
        "class own(onnxblock.Block):\n    def build(self, outputs, teacher, labels):\n"
        "        return onnxblock.blocks.Abs()(outputs[0])\n",
        "own.py, line 4: own gave a loss that is float32 of shape [4, 3] on a batch; it must be one float32, a scalar",
    ),
    "nan": (
        "class own(onnxblock.Block):\n    def build(self, outputs, teacher, labels):\n"
        "        log = onnxblock.blocks.Log()(outputs[0])\n"
        "        return onnxblock.blocks.ReduceMean(keepdims=False)(log)\n",
        "own.py, line 4: own gave a loss that is nan on a batch",
    ),
    "teacher": (
        "class own(onnxblock.Block):\n    def build(self, outputs, teacher, labels):\n"
        "        return onnxblock.blocks.ReduceMean(keepdims=False)(teacher[0])\n",
        "own.py, line 4: own gave a loss that reads no output of the network; its outputs are y",
    ),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_function_that_gives_no_loss_is_named_with_its_line(folder: Path, kind: str) -> None:
    text, words = WRONG[kind]
    Path("own.py").write_text(HEAD + text)
    with pytest.raises(TrainingError) as caught:
        made("own.py:own")
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "labels", "words"),
    [
        (SQUARED.replace("teacher/y", "z"), None, "reads 'z', which is not known; known are y, teacher/y"),
        (WEIGHTED, None, "reads labels, and there are none: the data has no targets, or --no-labels is given"),
        (WEIGHTED, CLASSES, "takes labels of shape ['N', 2, 3]; the data gives [4]"),
        (SQUARED.replace("[N, 3]", "[N, 7]"), None, "cannot be computed on a batch: "),
        (SQUARED.replace("(float loss)", "(float loss, float q)"), None, "has the outputs loss, q; it must have one"),
        (SQUARED.replace("Mul (d, d)", "Celu (d)"), None, "ONNX Runtime training has no right gradient for Celu"),
    ],
)
def test_a_graph_that_is_no_loss_is_refused(folder: Path, text: str, labels: Any, words: str) -> None:
    text = text.replace('"z"', "z")
    onnx.save(graph(text), "loss.onnx")
    with pytest.raises(TrainingError) as caught:
        made("loss.onnx", labels)
    assert str(caught.value).startswith("loss.onnx: the loss ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["none.onnx", "none.py:own"])
def test_a_file_that_is_not_there_is_said_at_once(folder: Path, reference: str) -> None:
    with pytest.raises(TrainingError, match=r"none\.\w+: no"):
        load_loss(reference)


# --- whole runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(folder: Path) -> Any:
    """Compresses a small classifier with these options."""
    model = parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 24] x) => (float[N, 3] y) {
        [f1] h = MatMul (x, w1)  r = Relu (h)  [f2] y = MatMul (r, w2) }"""
    )
    rng = np.random.default_rng(0)
    low = rng.standard_normal((24, 24)) * np.linspace(1, 0.02, 24) ** 3 @ rng.standard_normal((24, 48))
    for name, array in (("w1", low), ("w2", rng.standard_normal((48, 3)))):
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    x = rng.standard_normal((768, 24)).astype(np.float32)
    y = Runner(model)({"x": x})[0].argmax(1)
    np.savez("data.npz", x_train=x[:512], y_train=y[:512], x_test=x[512:], y_test=y[512:])

    onnx.save(model, "in.onnx")

    def compress(**options: Any) -> Any:
        given = {"data": "data.npz", "delta": 10.0, "threads": 1, "time_limit": 5.0, **options}
        return onnxneutrino.compress(model, **given).report

    return compress


def test_a_run_trains_by_it_and_is_repeated_bit_for_bit(run: Any) -> None:
    Path("own.py").write_text(HEAD + BLOCKS["both"])
    Path("in.toml").write_text(
        "[data]\npath = 'data.npz'\n[train]\nloss = 'own.py:Own'\noptimizer = 'sgd'\nlearning-rate = 0.01\n"
        "schedule = 'step'\nweight-average = 0.9\n"
    )
    given = ["--delta", "10", "--threads", "1", "--stage", "1", "--time-limit", "11s"]
    for target, options in (("out.onnx", given), ("again.onnx", ["--replay", "out.report.json"])):
        result = CliRunner().invoke(main, ["compress", "in.onnx", target, "--quiet", *options])
        assert result.exit_code == 0, result.output
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    report = Report.from_json(Path("again.report.json").read_text())
    assert report.settings["train"]["loss"] == "own.py:Own"
    training = report.training[0]
    assert training.learning_rate == 0.01
    losses = [point.loss for point in training.curve]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"trainer": "reconstruct"}, UsageError, "loss goes with --trainer ort alone; 'reconstruct'"),
        ({"labels": False}, TrainingError, "labels is None: the data has no targets, or --no-labels"),
    ],
)
def test_what_does_not_go_with_it(run: Any, options: Any, error: type[NeutrinoError], words: str) -> None:
    Path("own.py").write_text(HEAD + BLOCKS["labels"])
    with pytest.raises(error, match=words):
        run(loss="own.py:Own", **options)


def test_where_gradients_end_it_is_refused(folder: Path) -> None:
    inputs = {"x": np.zeros((BATCH, 6), np.float32)}
    types = {"x": TensorType((1, 6), np.dtype(np.float32))}
    for reconstruct, words in (
        (False, "no gradient behind Floor"),
        (True, "needs a network that is trained as a whole"),
    ):
        with pytest.raises(TrainingError, match=words):
            plan_training(
                network("Floor"),
                types,
                (),
                NAMES,
                block("squared"),
                inputs,
                batch=BATCH,
                reconstruct=reconstruct,
                threads=1,
            )
