"""What a run shows while it goes on: plain lines without a terminal, one view of 80 columns on one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnxneutrino.events import Event, TrainingStatus
from onnxneutrino.progress import WIDTH, Progress

STATUS = TrainingStatus("stage 2, 30.3x", 1200, 4000, 3.25, 0.0123, "top1", 84.1, 84.47)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_a_phase_and_one_in_ten_seconds() -> None:
    file, clock = io.StringIO(), Clock()
    with Progress(quiet=False, terminal=False, file=file, clock=clock) as progress:
        for second in range(25):
            clock.now = float(second)
            progress(Event("fine-tune", f"step {second}", float(second), 25.0 - second))
        progress(Event("verify", elapsed=25.0))
        progress.message("done")
    assert file.getvalue().splitlines() == [
        "fine-tune: step 0 (0.0 s, about 25 s left)",
        "fine-tune: step 10 (10 s, about 15 s left)",
        "fine-tune: step 20 (20 s, about 5.0 s left)",
        "verify (25 s)",
        "done",
    ]


def test_quiet_writes_nothing() -> None:
    file = io.StringIO()
    for terminal in (False, True):
        with Progress(quiet=True, terminal=terminal, file=file) as progress:
            progress(Event("fine-tune", "step 1"))
            progress.message("done")
    assert file.getvalue() == ""


def test_on_a_terminal_one_short_line_that_goes_away(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    with Progress(quiet=False, terminal=True, file=file, clock=Clock()) as progress:
        progress(Event("fine-tune", "x" * 200, 5.0, 90.0))
        progress.message("original top1 85.47")
        print("{}")
    shown = file.getvalue()
    assert "original top1 85.47" in shown
    assert "(5.0 s, about 1 min 30 s left)" in shown
    assert "x" * 80 not in shown
    assert shown.endswith("\x1b[2K")
    assert capsys.readouterr().out == "{}\n"


def view(event: Event) -> list[str]:
    """The lines of the live view, as a terminal of 80 columns shows them."""
    progress = Progress(quiet=False, terminal=True, file=io.StringIO(), clock=Clock())
    with progress:
        progress(event)
        console = Console(file=io.StringIO(), width=WIDTH, record=True)
        console.print(progress._view())
    return console.export_text().splitlines()


def test_the_view_of_a_fine_tune_fits_80_columns() -> None:
    event = Event("search", STATUS.candidate, 125.0, 355.0, training=STATUS, best="18.2 times smaller, drop 0.223")
    first, second, third, fourth = (line.rstrip() for line in view(event))
    assert first == "search: stage 2, 30.3x (2 min 05 s, about 5 min 55 s left)"
    assert second.endswith("step 1200 of 4000, epoch 3.2, loss 0.0123")
    assert third == "  top1 84.10 on the way, 84.47 needed"
    assert fourth == "  best so far: 18.2 times smaller, drop 0.223"


def test_long_names_are_cut_and_never_wrapped() -> None:
    status = TrainingStatus("x" * 90, 10**7, 10**7, 1e4, 1e4, "own.py:" + "m" * 90, -1e6, 1e6)
    lines = view(Event("search", "x" * 90, 5.0, 5.0, training=status, best="y" * 200))
    assert len(lines) == 4
    assert all(len(line.rstrip()) < WIDTH for line in lines)


def test_without_a_delta_no_floor_is_shown() -> None:
    status = TrainingStatus("plan", 1, 2, 0.5, 0.1, "top1", 84.1, None)
    assert [line.strip() for line in view(Event("search", "plan", training=status))][2] == "top1 84.10 on the way"


def test_lines_tell_the_step_of_a_fine_tune() -> None:
    file = io.StringIO()
    with Progress(quiet=False, terminal=False, file=file, clock=Clock()) as progress:
        progress(Event("search", STATUS.candidate, 5.0, 10.0, training=STATUS))
    assert file.getvalue() == "stage 2, 30.3x, step 1200 of 4000 (5.0 s, about 10 s left)\n"


def test_asides_are_for_verbose() -> None:
    for verbose in (False, True):
        file = io.StringIO()
        with Progress(quiet=False, terminal=False, file=file, clock=Clock(), verbose=verbose) as progress:
            progress(Event("normalize", message="BatchNormalization folded", aside=True))
        assert ("folded" in file.getvalue()) == verbose
