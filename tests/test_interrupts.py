"""Ctrl-C and SIGTERM end a run within two seconds, wherever it is, with one line that says how to go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from onnxneutrino.interrupts import GRACE

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SOON = 2.0
PATIENCE = 120.0  # on a busy machine, for imports and the like
WORDS = "onnxneutrino: interrupted; "

HANDLED = """
import sys, threading, time
from onnxneutrino import clock, interrupts

def stuck():
    try:
        while True:
            time.sleep(3600)
    except BaseException:
        time.sleep(3600)

def swallowed():
    try:
        time.sleep(3600)
    except BaseException:
        pass
    clock.now()
    sys.exit(5)

def ended():
    time.sleep(3600)

try:
    with interrupts.handled():
        interrupts.leave("continue with care")
        print("ready", flush=True)
        {what}()
except KeyboardInterrupt:
    interrupts.tell()
    sys.exit(1)
"""


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A process that takes SIGINT, also where this one was started by a shell in the background and ignores it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def waited(process: subprocess.Popen[str], sign: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not sign():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["ended", "swallowed", "stuck"])
def test_a_signal_ends_what_goes_on(tmp_path: Path, what: str, number: signal.Signals) -> None:
    process = started([sys.executable, "-c", HANDLED.replace("{what}", what)], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - begun < SOON + (what != "stuck")  # where it ends by itself, an interpreter ends too
    assert process.returncode == 1
    assert error == f"{WORDS}continue with care\n"


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = started([sys.executable, "-c", HANDLED.replace("{what}", "stuck")], tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - begun < 1.0
    assert (process.returncode, error) == (1, f"{WORDS}continue with care\n")


def test_an_ignored_signal_stays_ignored() -> None:
    from onnxneutrino import interrupts

    before = {own: signal.getsignal(own) for own in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert {own: signal.getsignal(own) for own in before} == before


def recorded_after(path: Path) -> bool:
    """Whether a record follows a file: what is said of the file is left only after its folder is on the disk."""
    if not path.exists():
        return False
    written = path.stat().st_mtime_ns
    return any(record.stat().st_mtime_ns > written for record in path.parent.glob("*.npz"))


@pytest.mark.parametrize(
    ("sign", "kept"),
    [("digits.onnx.lock", False), ("best.onnx", True)],
)
def test_a_run_is_interrupted(tmp_path: Path, sign: str, kept: bool) -> None:
    for suffix in ("onnx", "toml", "npz"):
        shutil.copy(FIXTURES / f"digits.{suffix}", tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "onnxneutrino", "compress", "digits.onnx", "out.onnx", "--threads", "1"]
    process = started([*command, "--time-limit", "10m"], tmp_path)
    run = tmp_path / "out.onnx.run"
    waited(process, (lambda: recorded_after(run / sign)) if kept else run.exists)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=PATIENCE)
    spent = time.monotonic() - begun
    assert spent < SOON + 1.0  # that of the interpreter's end on a busy machine
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    if not kept:
        assert last == f"{WORDS}nothing was written"
        # On a machine so busy that the run is ended from outside, a folder to begin anew in may stay.
        stays = {run.name} if spent >= GRACE else set()
        assert {path.name for path in tmp_path.iterdir()} - stays == before
        assert not list(run.glob("*.npz"))
        return
    assert last.startswith(f"{WORDS}continue with --resume (best so far: ")
    assert last.endswith(": out.onnx.run/best.onnx)")
    onnx.checker.check_model(onnx.load(run / "best.onnx"), full_check=True)
    assert not (tmp_path / "out.onnx").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    for suffix in ("onnx", "toml", "npz"):
        shutil.copy(FIXTURES / f"digits.{suffix}", tmp_path)
    command = [sys.executable, "-m", "onnxneutrino", "compress", "digits.onnx", "out.onnx", "--threads", "1"]
    process = started([*command, "--time-limit", "10m"], tmp_path)
    lock = tmp_path / "out.onnx.run" / "lock"
    waited(process, lambda: lock.exists() and lock.read_text() == f"{process.pid}\n")
    second = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert second.returncode == 1
    assert f"out.onnx.run: another run, process {process.pid}, is at work there" in second.stderr
    assert second.stderr.count("\n") == 1
