"""A run of the digits, repeated from its report: the same bytes, or a clear line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from slow_time import SlowTime

from onnxneutrino import clock
from onnxneutrino.cli import main
from onnxneutrino.errors import OutputError
from onnxneutrino.finetune import Trainer
from onnxneutrino.replay import check_repeated
from onnxneutrino.report import Report

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "in.onnx", *arguments, "--quiet"])
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits, a compressed model and its report."""
    folder = tmp_path_factory.mktemp("replay")
    for suffix in ("onnx", "toml"):
        shutil.copy(FIXTURES / f"digits.{suffix}", folder / f"in.{suffix}")
    shutil.copy(FIXTURES / "digits.npz", folder / "digits.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(clock, "time", SlowTime())
        assert run("out.onnx", "--time-limit", "40", "--seed", "3", "--delta", "2", "--threads", "2") == 0
    return folder


@pytest.fixture
def folder(first: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(first)
    return first


def test_the_same_bytes_come_out(folder: Path) -> None:
    report = json.loads(Path("out.report.json").read_text())
    assert report["clock"]
    assert any(own["trained"] for own in report["candidates"])
    assert run("again.onnx", "--replay", "out.report.json") == 0
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    again = json.loads(Path("again.report.json").read_text())
    for key in ("clock", "candidates", "settings", "training", "sha256", "drop"):
        assert again[key] == report[key], key


def test_a_run_whose_memory_was_short_is_repeated_where_it_is_not(folder: Path) -> None:
    """What does not fit is trained with half the batch; the repetition begins with the batch that did fit."""
    whole, most = Trainer._run, 20

    def short(self: Trainer, *given: Any) -> float:
        if self.batch > most:
            raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 64")
        return whole(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_run", short)
        patch.setattr(clock, "time", SlowTime())
        assert run("small.onnx", "--time-limit", "40", "--delta", "2", "--threads", "2") == 0
    report = json.loads(Path("small.report.json").read_text())
    assert {own["batch_size"] for own in report["training"]} == {16}
    lack = "there is not enough memory for a training step of {} examples; {} from now on"
    assert report["warnings"][:2] == [lack.format(64, 32), lack.format(32, 16)]
    assert run("again.onnx", "--replay", "small.report.json") == 0
    assert Path("again.onnx").read_bytes() == Path("small.onnx").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clock": []}, "holds no readings of time"),
        ({"clock": [0.0, 1.0]}, "goes another way"),
        ({"versions": {"numpy": "0"}}, "was made with numpy 0 (now "),
    ],
)
def test_what_cannot_be_repeated_is_one_clear_line(
    folder: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(Path("out.report.json").read_text())
    Path("other.json").write_text(json.dumps({**report, **change}))
    assert run("other.onnx", "--replay", "other.json") in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("other.onnx").exists()


def test_another_model_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report.from_json(Path("out.report.json").read_text())
    check_repeated(report, report, Path("out.onnx"))
    other = dataclasses.replace(report, sha256="0" * 64)
    with pytest.raises(OutputError, match="not the model of the report: another processor, model or data"):
        check_repeated(report, other, Path("out.onnx"))


def test_a_report_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other.onnx", "--replay", "none.json") == 2
    assert "none.json: cannot be read as a report" in capsys.readouterr().err
