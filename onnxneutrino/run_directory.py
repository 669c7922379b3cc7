"""The folder of a run while it goes on: who may use it, what the run in it was started with, and what is left of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnxneutrino import interrupts
from onnxneutrino.config import Config
from onnxneutrino.data_function import is_function
from onnxneutrino.errors import NeutrinoError, OutputError, UsageError
from onnxneutrino.formats import format_seconds
from onnxneutrino.journal import BEST, RECORD, RunJournal
from onnxneutrino.storage import write_whole
from onnxneutrino.summary import settings, versions
from onnxneutrino.walk import tensors

STARTED = "run.json"
LOCK = "lock"
OWN = re.compile(rf"{STARTED}|{RECORD.pattern}|{re.escape(BEST)}|\..*\.tmp")
LITTLE = 60.0  # seconds of work that a new run may replace without being asked
HASHED_BYTES = 2**28
DIGITS = 12  # of a digest, in messages and in `run.json`


def default(target: Path) -> Path:
    """The folder of the run that writes `target`."""
    return target.with_name(f"{target.name}.run")


@dataclass(frozen=True)
class Identity:
    """What a run follows from, its readings of time aside: options, versions and contents of files, by name."""

    values: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One number for all of it."""
        return hashlib.sha256(json.dumps(sorted(self.values.items())).encode()).hexdigest()

    def differences(self, before: Identity) -> list[str]:
        """What is not as it was before, in words."""
        names = dict.fromkeys((*before.values, *self.values))
        pairs = ((name, before.values.get(name, "unknown"), self.values.get(name, "unknown")) for name in names)
        return [f"{name} {was} (now {now})" for name, was, now in pairs if was != now]


def identity(source: Path, config: Config) -> Identity:
    """The identity of a run on the model at `source`."""
    options = settings(config)
    options |= {**options.pop("data"), **options.pop("train")}
    plain = {name.replace("_", "-"): json.dumps(value) for name, value in options.items()}
    files = {"contents of the model": [source, *_external(source)]}
    for name, path, base in (
        ("data", config.data.path, config.data.base),
        ("metric", config.metric, config.metric_base),
        ("loss", config.train.loss, Path()),
        ("trainer", config.trainer, Path()),
        ("function before", config.train.before, Path()),
        ("function after", config.train.after, Path()),
    ):
        file = base / Path(path.rpartition(":")[0] if is_function(path) else path).expanduser()
        if path and file.exists():
            files[f"contents of the {name}"] = [file]
    return Identity({**plain, **{name: _contents(own) for name, own in files.items()}, **versions()})


def _external(source: Path) -> list[Path]:
    model = onnx.load(source, load_external_data=False)
    locations = (ExternalDataInfo(own).location for own in tensors(model) if uses_external_data(own))
    return [source.parent / location for location in dict.fromkeys(locations)]


def _contents(paths: list[Path]) -> str:
    """A digest of the bytes; of large files, and those of folders, of size and time of change."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file() and path.stat().st_size <= HASHED_BYTES:
            digest.update(path.read_bytes())
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found = file.stat()
            digest.update(f"{file.relative_to(path)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:DIGITS]


@contextlib.contextmanager
def opened(folder: Path, own: Identity, resume: bool) -> Iterator[RunJournal]:
    """The journal in a folder, which is made where it is not there.

    Afterwards the folder is gone, unless an interrupt ended a run that can go on, or an error one that took a while.

    Args:
        folder: of the run.
        own: what the run follows from.
        resume: go on with the run that lies there, if there is one.

    Raises:
        OutputError: the folder cannot be made, another process uses it, or it belongs to something else.
        UsageError: another run lies there, or an unfinished one that nobody asked to go on with.
    """
    with _locked(folder):
        strange = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not OWN.fullmatch(path.name))
        if strange:
            raise OutputError(f"{folder}: holds '{strange[0]}', which is not of a run; give another --run-dir")
        before, journal = _started(folder), RunJournal(folder)
        if before is not None and journal.worth:
            _check(folder, own, before, journal, resume)
        if before is None or not (resume and journal.worth):
            _clear(folder)
            write_whole(folder / STARTED, json.dumps(dataclasses.asdict(own), indent=2).encode())
            journal = RunJournal(folder)
        kept, begun = False, time.perf_counter()
        try:
            yield journal
        except BaseException as error:
            little = journal.elapsed + time.perf_counter() - begun < LITTLE
            # What ends so soon is an input that is refused, and would be again.
            kept = journal.worth and not (little and isinstance(error, NeutrinoError))
            raise
        finally:
            if not kept:
                _clear(folder)
                interrupts.leave()


def _check(folder: Path, own: Identity, before: Identity, journal: RunJournal, resume: bool) -> None:
    """Refuse to go on with another run, and to throw work away."""
    other = own.differences(before)
    if resume and other:
        raise UsageError(
            f"{folder}: the run there was started with {', '.join(other)}; give the same, or delete that folder to "
            "start anew"
        )
    if not resume and journal.elapsed > LITTLE:
        raise UsageError(
            f"{folder}: an unfinished run of {format_seconds(journal.elapsed)} lies there; continue it with --resume, "
            "or delete that folder to start anew"
        )


def _started(folder: Path) -> Identity | None:
    """What the run in the folder was started with; None where there is no run."""
    try:
        values: Any = json.loads((folder / STARTED).read_text(encoding="utf-8"))
        return Identity(dict(values["values"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _clear(folder: Path) -> None:
    """Remove the run; first what makes it one."""
    (folder / STARTED).unlink(missing_ok=True)
    for path in folder.iterdir():
        if OWN.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system takes back when the process ends; remove the folder without a run."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = _lock(folder / LOCK)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used: {error.strerror or error}; give another --run-dir") from error
    try:
        yield
    finally:
        if not (folder / STARTED).exists():
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of the locked file, with the number of this process in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise OutputError(
                f"{path.parent}: another run, process {number or 'unknown'}, is at work there; wait for it or give "
                "another --run-dir"
            ) from None
        # The one that held it may have removed the file meanwhile: then this lock is one on nothing.
        if path.exists() and path.samefile(f"/dev/fd/{descriptor}"):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)
