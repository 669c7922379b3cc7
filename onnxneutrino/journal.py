"""The journal of a run: its finished steps in a folder, from which an interrupted run goes on.

All that a run does follows from its inputs, its seed and its readings of time. So a run goes on by being repeated with
the readings of the record that was written last; the results of long steps are taken from their records, and a step
without a record is made again, to the same end. A record holds all readings up to its own end: none of what was read
after the last record is needed, and nothing of an unfinished record is ever read.

    run.json         what the run was started with
    lock             held while the run goes on; the number of its process
    3.npz            record of the fourth step; 3.1.npz of the second one within it, while the fourth goes on
    3.training.npz   how far the training within it is, replaced from time to time
    best.onnx        the smallest network that was accepted so far
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from onnx import ModelProto

from onnxneutrino import clock, interrupts
from onnxneutrino.errors import OutputError, UsageError
from onnxneutrino.graph import save
from onnxneutrino.records import Arrays, packed, read_arrays, read_head, unpacked, write_record

Value = TypeVar("Value")
RECORD = re.compile(r"\d+(\.\w+)*\.npz")
BEST = "best.onnx"
RECORD_BYTES = 2**29  # of a step that is worth keeping
COST_SHARE = 1 / 300  # of the time, that keeping how far a training is may take
LEAST_PAUSE = 1.0


class Journal:
    """The journal of a run that keeps none: every step is made."""

    readings: Sequence[float] = ()
    seconds = 0.0  # spent on writing
    warnings: tuple[str, ...] = ()

    def step(self, name: str, made: Callable[[], Value]) -> Value:
        """Make a step, or take it from its record.

        Args:
            name: of the step.
            made: makes it; steps within it are steps of their own.

        Returns:
            What was made, in the form in which a record gives it back; see `records`.
        """
        return cast(Value, unpacked(*packed(made())))

    def keep(self, name: str, value: Callable[[], Any]) -> None:
        """Keep how far the step that is being made is, unless that was done a short while ago."""

    def kept(self, name: str) -> Any:
        """What `keep` kept of this step; None for nothing."""

    def resume(self, name: str) -> None:
        """Go on where `keep` kept."""

    def forget(self) -> None:
        """Make the step that is being made from its beginning: nothing that was recorded within it counts."""

    def best(self, model: Callable[[], ModelProto], told: str) -> None:
        """Keep the best network so far."""


UNKEPT = Journal()


class RunJournal(Journal):
    """A journal in a folder, which belongs to this run alone."""

    def __init__(self, folder: Path) -> None:
        """Read the heads of all records; damaged ones are as good as none."""
        self.folder = folder
        heads = {path.stem: read_head(path) for path in folder.iterdir() if RECORD.fullmatch(path.name)}
        self._heads = {key: head for key, head in heads.items() if head is not None}
        last = max(self._heads.values(), key=lambda head: len(head["clock"]), default=None)
        self.readings = () if last is None else tuple(last["clock"])
        self.elapsed = 0.0 if last is None else last["moment"] - last["clock"][0]
        self._within, self._count = "", 0
        self._due = 0.0
        self._best = ""

    @property
    def worth(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self._heads)

    def step(self, name: str, made: Callable[[], Value]) -> Value:
        """Make a step and record it, or take it from its record.

        Raises:
            UsageError: the record is of another step.
        """
        key = f"{self._within}{self._count}"
        self._count += 1
        found = self._read(key, name)
        if found is not None:
            self._jump(key)
            return cast(Value, unpacked(*found))
        outer, self._within, self._count = (self._within, self._count), f"{key}.", 0
        self._due = 0.0
        try:
            plain, arrays = packed(made())
        finally:
            self._within, self._count = outer
        if self._write(key, name, plain, arrays):
            self._delete_within(f"{key}.")
        return cast(Value, unpacked(plain, arrays))

    def keep(self, name: str, value: Callable[[], Any]) -> None:
        """Keep how far the step is; all that takes at most a three hundredth of the time."""
        begun = time.perf_counter()
        if begun >= self._due:
            self._write(self._within + name, name, *packed(value()))
            end = time.perf_counter()
            self._due = end + max((end - begun) / COST_SHARE, LEAST_PAUSE)

    def kept(self, name: str) -> Any:
        """What `keep` kept of the step that is being made; None for nothing."""
        found = self._read(self._within + name, name)
        return None if found is None else unpacked(*found)

    def resume(self, name: str) -> None:
        """Set the clock to where `keep` kept."""
        self._jump(self._within + name)

    def forget(self) -> None:
        """Delete the records within the step that is being made."""
        self._delete_within(self._within)
        self._heads = {key: head for key, head in self._heads.items() if not key.startswith(self._within)}
        self._count = 0

    def best(self, model: Callable[[], ModelProto], told: str) -> None:
        """Keep the best network so far, and what is said of it at an interrupt."""

        def write() -> None:
            save(model(), self.folder / BEST, external=False)
            self._best = f" (best so far: {told}: {self.folder / BEST})"

        self._try(write)

    def _read(self, key: str, name: str) -> tuple[Any, Arrays] | None:
        head = self._heads.get(key)
        arrays = None if head is None else read_arrays(self.folder / f"{key}.npz")
        if head is None or arrays is None:
            return None
        if head["name"] != name:
            raise UsageError(
                f"{self.folder}: its run went another way ('{head['name']}' stands there instead of '{name}'); delete "
                "that folder to start anew"
            )
        return head["value"], arrays

    def _jump(self, key: str) -> None:
        clock.current().jump(self._heads[key]["clock"], self._heads[key]["moment"])
        self._leave_words()

    def _write(self, key: str, name: str, plain: Any, arrays: Arrays) -> bool:
        """Whether the record was written: not where it is too large, or holds what only pickle could write."""
        if sum(array.nbytes for array in arrays) > RECORD_BYTES or any(array.dtype.hasobject for array in arrays):
            return False
        tape = clock.current()
        head = {"name": name, "clock": tape.readings, "moment": tape.shown(), "value": plain}

        def write() -> None:
            write_record(self.folder / f"{key}.npz", head, arrays)
            self._heads[key] = head

        self._try(write)
        return not self.warnings

    def _delete_within(self, within: str) -> None:
        for path in self.folder.glob(f"{within}*.npz"):
            path.unlink()

    def _try(self, write: Callable[[], None]) -> None:
        """Write, and count the time; a run whose journal cannot be written goes on without."""
        if self.warnings:
            return
        begun = time.perf_counter()
        try:
            write()
        except (OSError, OutputError) as error:
            told = error.strerror if isinstance(error, OSError) else error
            self.warnings = (f"{self.folder}: cannot be written ({told}); the run went on without a journal",)
        self.seconds += time.perf_counter() - begun
        self._leave_words()

    def _leave_words(self) -> None:
        interrupts.leave(f"continue with --resume{self._best}")
