"""Functions before and after a candidate, and what they are told, refuse and break; a whole run with each."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

import onnxneutrino
from onnxneutrino.bench import Candidate, Settings, accepted, recorder
from onnxneutrino.config import TrainConfig
from onnxneutrino.errors import TrainingError
from onnxneutrino.hooks import Hooks
from onnxneutrino.metrics import Drop
from onnxneutrino.runtime import Runner

SETTINGS = Settings(delta=1.0, z=0.8, stage=2, time_limit=60.0, train=True, dry_run=False, seed=0)
CANDIDATE = Candidate("stage 1, plan", None, {}, 40.0, 0.1, Drop(0.5, 0.25, 0.0, 1.0), 3.0, 2, 4.5)


def model() -> ModelProto:
    return parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Tanh (x) }')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hooks(text: str) -> Hooks:
    Path("own.py").write_text(text)
    named = {own: f"own.py:{own}" for own in ("before", "after") if f"def {own}" in text}
    return Hooks(TrainConfig(**named))  # type: ignore[arg-type]


def test_they_are_told_plain_values_and_the_graph(folder: Path) -> None:
    own = hooks(
        "import json\nfrom pathlib import Path\n"
        "def before(candidate, model):\n    Path('before.json').write_text(json.dumps(candidate))\n"
        "def after(candidate, model):\n    Path(model.graph.node[0].op_type).write_text(json.dumps(candidate))\n"
    )
    own.before(CANDIDATE, 100.0, model)
    assert not own.after(CANDIDATE, 100.0, True, model)
    told = json.loads(Path("Tanh").read_text())
    assert told == {
        "name": "stage 1, plan",
        "stage": 2,
        "cost": 40.0,
        "ratio": 2.5,
        "trained": 3.0,
        "seconds": 4.5,
        "drop": 0.5,
        "standard_error": 0.25,
        "accepted": True,
    }
    assert json.loads(Path("before.json").read_text()) == {**told, "accepted": None}


@pytest.mark.parametrize(("answer", "refused"), [("None", False), ("True", False), ("False", True)])
def test_after_refuses_with_false(folder: Path, answer: str, refused: bool) -> None:
    own = hooks(f"def after(candidate, model):\n    return {answer}\n")
    assert own.after(CANDIDATE, 100.0, True, model) is refused


def test_a_refused_candidate_is_not_accepted_whatever_its_drop() -> None:
    assert accepted(CANDIDATE, SETTINGS)
    tried, record = recorder(SETTINGS, lambda candidate, ok: ok and candidate.name != CANDIDATE.name)
    assert record(CANDIDATE).refused
    assert not accepted(tried[0], SETTINGS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "own.py, line 2: after failed with ZeroDivisionError"),
        ("return 'no'", "own.py, line 1: after must return True, False or None, not str"),
        ("return 0.5", "own.py, line 1: after must return True, False or None, not float"),
    ],
)
def test_the_first_call_that_fails_ends_the_run(folder: Path, body: str, words: str) -> None:
    own = hooks(f"def after(candidate, model):\n    {body}\n")
    with pytest.raises(TrainingError) as caught:
        own.after(CANDIDATE, 100.0, True, model)
    assert str(caught.value).startswith(words)


def test_before_returns_nothing(folder: Path) -> None:
    own = hooks("def before(candidate, model):\n    return model\n")
    with pytest.raises(TrainingError, match=r"own.py, line 1: before must return None, not ModelProto"):
        own.before(CANDIDATE, 100.0, model)


def test_a_later_failure_is_a_warning_and_the_last_call(folder: Path) -> None:
    own = hooks(
        "calls = []\n"
        "def after(candidate, model):\n"
        "    calls.append(model.graph.name)\n"
        "    return len(calls) < 2 or calls[9]\n"
    )
    assert [own.after(CANDIDATE, 100.0, True, model) for _ in range(4)] == [False] * 4
    assert own.warnings == [
        "own.py, line 4: after failed with IndexError: list index out of range; it was not called again"
    ]


def test_a_missing_function_is_said_before_anything_is_done(folder: Path) -> None:
    Path("own.py").write_text("def log(candidate, model):\n    pass\n")
    with pytest.raises(TrainingError, match=r"own.py: has no function 'before' \(it has log\)"):
        Hooks(TrainConfig(before="own.py:before"))


# --- whole runs --------------------------------------------------------------------------------

LOOP = """
import numpy as np
import onnx
from onnx import numpy_helper

calls = []


def train(candidate, original, seconds):
    calls.append(seconds)
    if len(calls) > 1:
        raise RuntimeError("no more")
    return candidate


def log(candidate, model):
    with open("log.txt", "a") as file:
        print(candidate["name"], candidate["accepted"], len(model.graph.node), file=file)


def small(candidate, model):
    log(candidate, model)
    return candidate["ratio"] < 1.8


def broken(candidate, original, seconds):
    raise RuntimeError("broken")
"""


DOCS = Path(__file__).resolve().parent.parent / "docs" / "howto-hooks.md"


@pytest.fixture
def network(folder: Path) -> dict[str, Any]:
    """A classifier as `in.onnx`, data on which it is always right, and options."""
    made = parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 24] x) => (float[N, 4] y) {
        [f1] h = MatMul (x, w1)  r = Relu (h)  [f2] y = Gemm (r, w2, b2) }"""
    )
    rng = np.random.default_rng(0)
    values = np.linspace(1, 0.02, 24) ** 3
    for name, array in (
        ("w1", rng.standard_normal((24, 24)) * values @ rng.standard_normal((24, 48))),
        ("w2", rng.standard_normal((48, 4))),
        ("b2", np.zeros(4)),
    ):
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(made, "in.onnx")
    x = rng.standard_normal((768, 24)).astype(np.float32)
    y = Runner(made)({"x": x})[0].argmax(1)
    np.savez("data.npz", x_train=x[:512], y_train=y[:512], x_test=x[512:], y_test=y[512:])
    Path("own.py").write_text(LOOP)
    return {"data": "data.npz", "delta": 20.0, "threads": 1, "time_limit": 60.0}


def test_a_run_with_a_loop_of_its_own_and_hooks(network: dict[str, Any]) -> None:
    """The first network comes back as it was, the second call fails: the run ends with the best there is."""
    own = {"trainer": "own.py:train", "before": "own.py:log", "after": "own.py:small"}
    report = onnxneutrino.compress("in.onnx", **network, **own).report
    assert report.compressed
    assert [(row.steps, row.curve) for row in report.training] == [(0, ())]
    assert report.enhancement is not None
    assert report.enhancement.params < 1.8
    refused = [row for row in report.candidates if row.note.startswith("refused by own.py:small")]
    assert refused
    assert not any(row.accepted for row in refused)
    assert any("own.py, line 12: train failed with RuntimeError: no more" in own for own in report.warnings)
    lines = Path("log.txt").read_text().splitlines()
    measured = [line for line in lines if " None " not in line]
    assert len(measured) == len(report.candidates)
    assert sum(" None " in line for line in lines) == 2
    settings = report.settings
    assert settings["trainer"] == "own.py:train"
    assert settings["train"]["after"] == "own.py:small"
    from onnxneutrino.console import summary
    from onnxneutrino.html_report import to_html

    assert summary(report)
    assert "own.py:small" in to_html(report)


def test_a_loop_that_fails_at_once_ends_the_run(network: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"own.py, line \d+: broken failed with RuntimeError: broken"):
        onnxneutrino.compress("in.onnx", **network, trainer="own.py:broken")


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "loss.py:Loss", "before": "hooks.py:log", "after": "hooks.py:wide_enough", "stage": 1},
        {"trainer": "loop.py:train"},
        {"trainer": f"command: {sys.executable} loop_command.py {{candidate}} {{trained}} {{original}} {{seconds}}"},
    ],
    ids=["loss", "function", "command"],
)
def test_the_examples_of_the_page_train(network: dict[str, Any], options: dict[str, Any]) -> None:
    """With the time that a test of all pages cannot give them."""
    blocks = re.findall(r"<!-- file: (\S+) -->\n\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert {name for name, _ in blocks} == {"loss.py", "hooks.py", "loop.py", "loop_command.py"}
    for name, text in blocks:
        assert len(text.splitlines()) <= 20
        Path(name).write_text(
            text.replace("digits.npz", "data.npz")
            .replace("[10]", "[4]")
            .replace("[:256, None].astype(np.float32) / 16", "[:256]")
            .replace('"input"', '"x"')
        )
    report = onnxneutrino.compress("in.onnx", **{**network, "time_limit": 14.0}, **options).report
    assert report.training
    assert report.compressed
    if "loss" in options:
        logged = [json.loads(line) for line in Path("candidates.jsonl").read_text().splitlines()]
        assert len(logged) == len(report.candidates) + len(report.training)
