"""Readings of time are what they are, what was recorded, or an error: never anything else."""

from __future__ import annotations

import threading
import time

import pytest

from onnxneutrino import clock
from onnxneutrino.errors import UsageError


def test_without_a_tape_time_is_just_read() -> None:
    before = time.perf_counter()
    assert before <= clock.now() <= time.perf_counter()
    assert clock.noted(1.23456789) == 1.23456789


def test_a_run_is_recorded_and_repeated() -> None:
    def run() -> list[float]:
        start = clock.now()
        time.sleep(0.01)
        return [start, clock.now(), clock.noted(0.123456789)]

    with clock.recording() as tape:
        first = run()
    assert tape.readings == first
    assert first[2] == 0.123457
    assert 0.01 <= first[1] - first[0] < 5
    with clock.recording(tape.readings) as again:
        assert run() == first
    assert again.readings == first


def test_a_repetition_that_reads_more_is_refused() -> None:
    with clock.recording([1.0]):
        clock.now()
        with pytest.raises(UsageError, match="another way"):
            clock.now()


def test_other_threads_are_not_recorded() -> None:
    seen: list[float] = []
    with clock.recording() as tape:
        thread = threading.Thread(target=lambda: seen.append(clock.now()))
        thread.start()
        thread.join()
        assert tape.readings == []
    assert len(seen) == 1
