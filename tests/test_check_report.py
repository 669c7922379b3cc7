"""The truth of a report: an independent check finds nothing, and finds each figure that is changed by hand."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console
from slow_time import SlowTime

from onnxneutrino import clock, console
from onnxneutrino.cli import main
from onnxneutrino.cli_output import PIPE_WIDTH
from onnxneutrino.report import Report

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checker() -> Iterator[ModuleType]:
    """`benchmarks/check_report.py`, which imports scripts that lie beside it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("check_report")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the digits and what a run without training made of them, and what the command printed."""
    folder = tmp_path_factory.mktemp("digits")
    for name in ("digits.onnx", "digits.npz", "digits.toml"):
        shutil.copy(ROOT / "fixtures" / name, folder)
    files = [str(folder / name) for name in ("digits.onnx", "out.onnx")]
    options = ["--delta", "1", "--trainer", "none", "--time-limit", "40s", "--threads", "1", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "time", SlowTime(0.05))
        done = CliRunner().invoke(main, ["compress", *files, *options], catch_exceptions=False)
    assert done.exit_code == 0
    return folder, done.output


def found(checker: ModuleType, folder: Path, report: dict[str, Any], written: str = "out.onnx") -> list[str]:
    return list(checker.faults(report, folder / "digits.onnx", folder / written, folder / "digits.npz"))


def told(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out.report.json").read_text(encoding="utf-8"))
    return report


def test_a_true_report_has_no_faults(checker: ModuleType, run: tuple[Path, str]) -> None:
    report = told(run[0])
    assert report["compressed"]
    assert found(checker, run[0], report) == []


SIX = ("metric", "params", "size_bytes", "macs", "memory_bytes", "latency_ms")
CHOSEN = "chosen"
FIGURES: list[tuple[str | int, ...]] = [
    *((stage, name) for stage in ("original", "stage2") for name in SIX),
    *(("enhancement", name) for name in ("drop", *SIX[1:])),
    ("drop",),
    *((name, end) for name in ("drop_interval", "drop_select", "drop_report") for end in ("value", "low", "high")),
    ("deciding", "count"),
    *(("agreement", name) for name in ("value", "both_right", "only_original", "only_compressed", "both_wrong")),
    ("agreement", "confusions", 0, "count"),
    *(("layers", 1, name) for name in ("params_before", "params_after", "macs_before", "macs_after")),
    *(("candidates", CHOSEN, name) for name in ("metric", "drop", "cost")),
]


def chosen(report: dict[str, Any]) -> int:
    """Where the candidate that was written stands."""
    plan = {row["name"]: (row["form"], row["ranks"]) for row in report["layers"] if row["form"] is not None}
    plans = [{name: (own["form"], own["ranks"]) for name, own in row["plan"].items()} for row in report["candidates"]]
    return max(index for index, own in enumerate(plans) if own == plan)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: ".".join(map(str, figure)))
def test_every_figure_is_checked(checker: ModuleType, run: tuple[Path, str], figure: tuple[str | int, ...]) -> None:
    report = told(run[0])
    place: Any = report
    for key in figure[:-1]:
        place = place[chosen(report) if key == CHOSEN else key]
    place[figure[-1]] += 1
    assert found(checker, run[0], report)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(sha256="0" * 64),
        lambda report: report.update(compressed=False),
        lambda report: report["layers"].pop(0),
        lambda report: report["layers"][0].update(name="another"),
        lambda report: next(row for row in report["layers"] if row["form"]).update(ranks=[1]),
        lambda report: next(row for row in report["layers"] if row["form"]).update(form="cp"),
        lambda report: report.update(delta=-5.0),
        lambda report: report["candidates"].clear(),
    ],
    ids=["sha256", "compressed", "layer", "name", "ranks", "form", "delta", "candidates"],
)
def test_what_is_no_figure_is_checked(
    checker: ModuleType, run: tuple[Path, str], change: Callable[[dict[str, Any]], Any]
) -> None:
    report = copy.deepcopy(told(run[0]))
    change(report)
    assert found(checker, run[0], report)


def test_one_bit_of_one_weight_is_noticed(checker: ModuleType, run: tuple[Path, str]) -> None:
    folder = run[0]
    model = onnx.load(folder / "out.onnx")
    data = bytearray(model.graph.initializer[0].raw_data)
    data[0] ^= 1
    model.graph.initializer[0].raw_data = bytes(data)
    onnx.save(model, folder / "bit.onnx")
    assert any(line.startswith("sha256: ") for line in found(checker, folder, told(folder), "bit.onnx"))


def test_the_command_ends_with_one_where_a_figure_is_off(
    checker: ModuleType, run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run[0]
    files = ["--original", str(folder / "digits.onnx"), "--data", str(folder / "digits.npz")]
    monkeypatch.setattr(sys, "argv", ["check_report.py", str(folder / "out.report.json"), *files])
    with pytest.raises(SystemExit) as end:
        checker.main()
    assert end.value.code == 0
    report = told(folder)
    report["drop"] += 0.5
    (folder / "false.report.json").write_text(json.dumps(report), encoding="utf-8")
    shutil.copy(folder / "out.onnx", folder / "false.onnx")
    monkeypatch.setattr(sys, "argv", ["check_report.py", str(folder / "false.report.json"), *files])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        checker.main()
    assert end.value.code == 1
    assert capsys.readouterr().out.startswith("drop: the report says ")


def test_what_the_console_shows_is_the_report_and_nothing_else(run: tuple[Path, str]) -> None:
    folder, printed = run
    report = Report.from_json((folder / "out.report.json").read_text(encoding="utf-8"))
    screen = Console(highlight=False, width=PIPE_WIDTH)
    with screen.capture() as shown:
        screen.print(console.summary(report))
    lines = [line.rstrip() for line in shown.get().splitlines()]
    wrote = f"Wrote {folder}/out.onnx, {folder}/out.report.json and {folder}/out.report.html."
    assert printed.splitlines() == [*lines, wrote]
