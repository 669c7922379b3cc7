"""Training elsewhere: what a function or a command gets, what is read back, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino import external
from onnxneutrino.errors import TrainingError
from onnxneutrino.external import TRAINABLE, load_external
from onnxneutrino.graph import arrays, with_arrays

NAMES = ["w1", "w2"]
SCRIPT = """
import sys
import onnx
from onnx import numpy_helper
candidate, trained, original, seconds = sys.argv[1:]
assert onnx.load(original).graph.name == "original"
model = onnx.load(candidate)
for tensor in model.graph.initializer:
    if tensor.name in "w1 w2":
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + float(seconds), tensor.name))
onnx.save(model, trained)
"""


def network(name: str = "candidate") -> ModelProto:
    model = parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> {name} (float[N, 6] x) => (float[N, 3] y) {{
        h = MatMul (x, w1)  t = Tanh (h)  z = MatMul (t, w2)  y = Mul (z, fixed) }}"""
    )
    rng = np.random.default_rng(0)
    for own, shape in (("w1", (6, 5)), ("w2", (5, 3)), ("fixed", (1,))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), own))
    return model


def trained(trainer: str, seconds: float = 7.0) -> dict[str, Any]:
    loop = load_external(trainer)
    assert loop is not None
    return loop.trained(network(), network("original"), NAMES, seconds)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_trainers_are_none_of_these() -> None:
    assert [load_external(own) for own in ("ort", "reconstruct", "none")] == [None] * 3


def test_a_command_gets_files_and_seconds_and_its_arrays_come_back(folder: Path) -> None:
    Path("train.py").write_text(SCRIPT)
    found = trained(f"command: {sys.executable} train.py {{candidate}} {{trained}} {{original}} {{seconds}}")
    assert sorted(found) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(found[name], arrays(network())[name] + 7)


@pytest.mark.parametrize("returns", ["model", "candidate"])
def test_a_function_gives_a_model_or_the_path_of_one(folder: Path, returns: str) -> None:
    Path("loop.py").write_text(
        "import onnx\nfrom onnx import numpy_helper\n"
        "def train(candidate, original, seconds):\n"
        "    model = onnx.load(candidate)\n"
        "    entries = {entry.key: entry.value for entry in model.metadata_props}\n"
        f"    names = entries['{TRAINABLE}'].split()\n"
        "    for tensor in model.graph.initializer:\n"
        "        if tensor.name in names:\n"
        "            tensor.CopyFrom(numpy_helper.from_array(2.0 * numpy_helper.to_array(tensor), tensor.name))\n"
        "    onnx.save(model, candidate)\n"
        f"    return {returns}\n"
    )
    for name, array in trained("loop.py:train").items():
        np.testing.assert_array_equal(array, 2 * arrays(network())[name])
        assert array.dtype == np.float32


def changed(changes: dict[str, Any]) -> ModelProto:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(numpy_helper.from_array(changes[tensor.name], tensor.name))
    return model


BROKEN: dict[str, ModelProto] = {
    "without": parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Tanh (x) }'),
    "shape": changed({"w2": np.zeros((3, 5), np.float32)}),
    "type": changed({"w2": np.zeros((5, 3), np.int64)}),
    "nan": changed({"w1": np.full((6, 5), np.nan, np.float32)}),
    "other": changed({"fixed": np.zeros(1, np.float32)}),
}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "train must return the path of a trained model or an onnx.ModelProto, not NoneType"),
        ("'none.onnx'", "train gave no trained model: none.onnx: no such file"),
        ("onnx.load('without.onnx')", "train gave a model without the initializer 'w1'"),
        ("onnx.load('shape.onnx')", "train gave 'w2' as float32 of shape [3, 5]; it must stay float32 of shape [5, 3]"),
        ("onnx.load('type.onnx')", "train gave 'w2' as int64 of shape [5, 3]; it must stay float32"),
        ("onnx.load('nan.onnx')", "train gave 'w1' with values that are not finite"),
        ("onnx.load('other.onnx')", "train changed 'fixed', which is not among"),
    ],
)
def test_what_comes_back_must_be_a_trained_candidate(folder: Path, returned: str, words: str) -> None:
    for name, model in BROKEN.items():
        onnx.save(model, f"{name}.onnx")
    Path("loop.py").write_text(f"import onnx\n\n\ndef train(candidate, original, seconds):\n    return {returned}\n")
    with pytest.raises(TrainingError) as caught:
        trained("loop.py:train")
    assert str(caught.value).startswith(f"loop.py, line 4: {words}")
    assert "\n" not in str(caught.value)


def test_a_function_that_raises_is_named_with_its_line(folder: Path) -> None:
    Path("loop.py").write_text("def train(candidate, original, seconds):\n    return 1 / 0\n")
    with pytest.raises(TrainingError, match=r"loop.py, line 2: train failed with ZeroDivisionError: division by zero"):
        trained("loop.py:train")


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ("loop.py:train", "loop.py: not found"),
        ("command: no-such-program {candidate} {trained}", "there is no program 'no-such-program'"),
        ("command: 'sh {candidate} {trained}", "cannot be split into words: No closing quotation"),
    ],
)
def test_what_is_not_there_is_said_at_once(folder: Path, trainer: str, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        load_external(trainer)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", "failed with exit code 3; what it says stands above"),
        ("kill -9 $$", "failed with signal 9"),
        ("true", "gave no trained model: .*trained.onnx: no such file"),
    ],
)
def test_a_command_that_fails(folder: Path, script: str, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        trained(f"command: sh -c '{script}' {{candidate}} {{trained}}")


def ended(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_command_that_takes_too_long_is_stopped_with_all_that_it_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(TrainingError, match="was stopped after 1 s, it had 0"):
        trained("command: sh -c 'sleep 60 & echo $! > child; wait' {candidate} {trained}", 0.4)
    assert time.monotonic() - start < 20
    assert ended(int(Path("child").read_text()))


def test_an_interrupt_stops_the_command(folder: Path) -> None:
    code = (
        "from onnxneutrino.external import _run\n"
        "_run(['sh', '-c', 'sleep 60 & echo $! > child.part; mv child.part child; wait'], 60.0)\n"
    )
    # What runs in the background of a script ignores SIGINT, and so would its children.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not Path("child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in error
    assert ended(int(Path("child").read_text()))


def test_float16_candidates_stay_float16(folder: Path) -> None:
    loop_text = "def train(candidate, original, seconds):\n    return 'wide.onnx'\n"
    loop_text = "def train(candidate, original, seconds):\n    return 'wide.onnx'\n"
    Path("loop.py").write_text(loop_text)
    onnx.save(network(), "wide.onnx")
    narrow = with_arrays(network(), {})
    for tensor in narrow.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    loop = load_external("loop.py:train")
    assert loop is not None
    for name, array in loop.trained(narrow, narrow, ["w1"], 1.0).items():
        np.testing.assert_array_equal(array, arrays(narrow)[name])
        assert array.dtype == np.float16
