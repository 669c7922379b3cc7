"""Runs that are killed go on, and end in the bytes of a run that was not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from slow_time import SlowTime

from onnxneutrino import clock, delivery, finetune, interrupts, journal, kept_training, run_directory
from onnxneutrino.config import load_config
from onnxneutrino.errors import DataError, UsageError
from onnxneutrino.events import Event
from onnxneutrino.finetune import Example, Trainer, fine_tune
from onnxneutrino.journal import RunJournal
from onnxneutrino.kept_training import KeptTraining
from onnxneutrino.losses import Loss
from onnxneutrino.report import Report

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
PATIENCE = 300.0
KILLS = 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for suffix in ("onnx", "toml", "npz"):
        shutil.copy(FIXTURES / f"digits.{suffix}", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    interrupts.leave()


# --- real processes ---------------------------------------------------------------------------------------------


def process(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "onnxneutrino", "compress", "digits.onnx", *arguments, "--threads", "1", "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(*arguments: str) -> str:
    """Run to the end; standard error."""
    own = process(*arguments)
    _, error = own.communicate(timeout=PATIENCE)
    assert own.returncode == 0, error.decode()
    return error.decode()


def killed(when: Callable[[], bool], after: float) -> None:
    """Start, and kill a while after something has come true, unless the run ends before."""
    own = process("out.onnx", "--resume", "--time-limit", "12s")
    end = time.monotonic() + PATIENCE
    while not when() and own.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(after)
    own.kill()
    _, error = own.communicate(timeout=PATIENCE)
    assert own.returncode in (0, -9), error.decode()


def test_a_run_survives_being_killed(folder: Path) -> None:
    old = Path("digits.onnx").read_bytes()
    target, run = folder / "out.onnx", folder / "out.onnx.run"
    target.write_bytes(old)
    drawn = random.Random(5)
    signs: list[Callable[[], bool]] = [
        lambda: (run / "0.npz").exists(),
        lambda: len(list(run.glob("*.npz"))) > 6,
        lambda: any(run.glob("*.training.npz")) or target.read_bytes() != old,
    ]
    assert len(signs) == KILLS
    for sign in signs:
        killed(sign, drawn.uniform(0, 1))
        found = target.read_bytes()
        if found != old:
            onnx.checker.check_model(onnx.load_from_string(found), full_check=True)
    ended("out.onnx", "--resume", "--time-limit", "12s")
    assert not run.exists()
    report = Report.from_json(Path("out.report.json").read_text(encoding="utf-8"))
    assert report.candidates
    assert report.compressed
    ended("again.onnx", "--replay", "out.report.json")
    assert Path("again.onnx").read_bytes() == target.read_bytes() != old
    again = json.loads(Path("again.report.json").read_text())
    for key in ("clock", "candidates", "training", "drop", "sensitivities"):
        assert again[key] == json.loads(report.to_json())[key], key


# --- in this process: stopped after so many records -------------------------------------------------------------


class StoppedError(BaseException):
    """In the place of a kill."""


def compressed(folder: Path, said: list[str] | None = None, **options: Any) -> Report:
    given = {"threads": 1, "time_limit": 40.0, "delta": 2.0, **options}
    config = load_config(Path("digits.onnx"), given)
    told: list[str] = [] if said is None else said

    def tell(event: Event) -> None:
        told.append(event.message)

    resume = config.clock is None
    return delivery.compress_file(Path("digits.onnx"), folder / "out.onnx", config, tell, resume=resume)


@pytest.mark.parametrize(("trainer", "every"), [("ort", 6), ("reconstruct", 7)])
def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, every: int
) -> None:
    real, written = journal.write_record, list[str]()

    def stopping(path: Path, *record: Any) -> None:
        real(path, *record)
        written.append(path.stem)
        if len(written) % every == 0:
            raise StoppedError

    monkeypatch.setattr(journal, "write_record", stopping)
    monkeypatch.setattr(journal, "LEAST_PAUSE", 0.03)
    monkeypatch.setattr(journal, "COST_SHARE", 1.0)
    monkeypatch.setattr(clock, "time", SlowTime())
    stops = 0
    while True:
        try:
            report = compressed(folder, trainer=trainer)
            break
        except StoppedError:
            stops += 1
            assert not (folder / "out.onnx").exists()
    assert stops > 1
    assert any(name.endswith(".training") for name in written)
    first = (folder / "out.onnx").read_bytes()
    assert not (folder / "out.onnx.run").exists()
    again = compressed(folder, trainer=trainer, clock=report.clock)
    assert (folder / "out.onnx").read_bytes() == first
    assert again.clock == report.clock
    assert again.candidates == report.candidates
    assert again.training == report.training
    assert again.sensitivities == report.sensitivities


def test_a_finished_run_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compressed(folder, trainer="none")
    written = (folder / "out.onnx").stat().st_mtime_ns
    said: list[str] = []
    assert compressed(folder, said, trainer="none").to_json() == report.to_json()
    assert said == [f"{folder / 'out.onnx'}: this run is finished already"]
    assert (folder / "out.onnx").stat().st_mtime_ns == written
    assert not (folder / "out.onnx.run").exists()
    # Another run is not that one, and neither is this where its result is not there any more.
    assert compressed(folder, trainer="none", seed=1).run != report.run
    assert compressed(folder, trainer="none").run == report.run
    (folder / "out.onnx").write_bytes(b"")
    compressed(folder, trainer="none")
    assert (folder / "out.onnx").stat().st_size > 0


def test_an_error_midway_keeps_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise DataError("data.npz: has vanished")

    with monkeypatch.context() as patch:
        patch.setattr("onnxneutrino.conductor.choose", broken)
        patch.setattr(run_directory, "LITTLE", 0.0)
        with pytest.raises(DataError):
            compressed(folder, trainer="none")
    assert "continue with --resume (best so far: " in interrupts.left()
    assert (folder / "out.onnx.run" / "best.onnx").exists()
    with pytest.raises(UsageError, match=r"started with seed 0 \(now 1\); give the same"):
        compressed(folder, trainer="none", seed=1)
    said: list[str] = []
    assert compressed(folder, said, trainer="none").compressed
    assert said[0].startswith(f"{folder / 'out.onnx.run'}: going on after ")


# --- one fine-tune ----------------------------------------------------------------------------------------------

NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[8,16] x) => (float[8,4] y) { h = Gemm <transB = 1> (x, w0) r = Relu (h) y = Gemm <transB = 1> (r, w1) }
"""
STEPS = 24


def trainer(state: Any = None) -> Trainer:
    model = parser.parse_model(NET)
    rng = np.random.default_rng(0)
    for name, shape in (("w0", (32, 16)), ("w1", (4, 32))):
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return Trainer(model, ["w0", "w1"], Loss("values", ("y",)), 1, state=state)


def batches(begin: int = 0) -> Iterator[Example]:
    for number in range(begin, 1000):
        rng = np.random.default_rng(number)
        given, wanted = (rng.normal(size=(8, size)).astype(np.float32) for size in (16, 4))
        yield Example({"x": given}, [wanted], None)


def test_a_trainer_goes_on_to_the_bit() -> None:
    with trainer() as own:
        losses = [own.step(example, 1e-2) for example, _ in zip(batches(), range(6), strict=False)]
        state = own.state()
        losses += [own.step(example, 1e-2) for example, _ in zip(batches(6), range(6), strict=False)]
        arrays = own.arrays()
    with trainer(state) as other:
        again = [other.step(example, 1e-2) for example, _ in zip(batches(6), range(6), strict=False)]
        assert all(np.array_equal(array, arrays[name]) for name, array in other.arrays().items())
    assert again == losses[6:]
    with trainer() as anew:  # the moments matter: without them it goes elsewhere
        anew._state.parameters["w0"] = arrays["w0"]
        assert anew.step(next(batches(12)), 1e-2) != losses[-1]


@pytest.mark.parametrize("stop", [3, 5, 6, 12, 18, 23])
def test_a_fine_tune_goes_on_with_its_looks_and_refreshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(journal, "LEAST_PAUSE", 0.0)
    monkeypatch.setattr(journal, "COST_SHARE", 1e9)
    calls: list[tuple[str, int]] = []
    made: list[int] = []

    def run(own: RunJournal, end: int) -> tuple[Sequence[float], finetune.Arrays]:
        seen: dict[int, float] = {}

        def look(arrays: Any, step: int, share: float) -> bool:
            calls.append(("look", step))
            seen[step] = float(np.sum(arrays["w0"]))
            return False

        def refresh(arrays: Any) -> None:
            calls.append(("refresh", round(1e3 * float(np.sum(arrays["w0"])))))

        kept = KeptTraining(own, look, seen, refresh)
        with trainer(kept.state) as raw:
            real = raw.step

            def step(example: Example, rate: float) -> float:
                if kept.made + len(made) == end:
                    raise StoppedError
                made.append(1)
                return real(example, rate)

            monkeypatch.setattr(raw, "step", step)
            result = fine_tune(
                kept.on(raw),  # type: ignore[arg-type]
                kept.examples(batches(kept.made)),
                seconds=100.0,
                learning_rate=1e-2,
                steps=STEPS,
                look=kept.look,
                refresh=kept.refresh,
            )
        assert list(seen) == [6, 12, 18]
        return result.losses, result.arrays

    def kept_run(own: RunJournal, end: int) -> tuple[Sequence[float], finetune.Arrays]:
        return own.step("fine-tune", lambda: run(own, end))

    with clock.recording((), onward=True):
        losses, arrays = kept_run(_journal(tmp_path / "whole"), -1)
    wanted = list(calls)
    calls.clear()
    made.clear()
    with clock.recording((), onward=True), pytest.raises(StoppedError):
        kept_run(_journal(tmp_path / "run"), stop)
    before = len(made)
    made.clear()
    own = RunJournal(tmp_path / "run")
    with clock.recording(own.readings, onward=True):
        again, others = kept_run(own, -1)
    assert (before, len(made)) == (stop, STEPS - stop)
    assert again == losses
    assert all(np.array_equal(array, arrays[name]) for name, array in others.items())
    assert set(calls) == set(wanted)


def _journal(folder: Path) -> RunJournal:
    folder.mkdir()
    return RunJournal(folder)


def test_names_of_what_is_kept_are_those_of_records() -> None:
    assert journal.RECORD.fullmatch(f"3.1.{kept_training.NAME}.npz")
