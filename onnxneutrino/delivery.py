"""From file to file: compress, write the model in one piece, read it back, and write the report beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnxneutrino import cost, run_directory
from onnxneutrino.conductor import Result, compress
from onnxneutrino.config import Config
from onnxneutrino.errors import ModelError, OutputError, UsageError
from onnxneutrino.events import Event
from onnxneutrino.formats import format_seconds
from onnxneutrino.graph import Source, check, check_writable, load, save
from onnxneutrino.journal import UNKEPT, Journal
from onnxneutrino.phases import Tell
from onnxneutrino.report import Report
from onnxneutrino.runtime import Runner, random_inputs
from onnxneutrino.summary import with_file_size


def compress_file(
    source: Path,
    target: Path,
    config: Config,
    tell: Tell = lambda event: None,
    command: str = "",
    run_dir: Path | None = None,
    resume: bool = False,
) -> Report:
    """Compress a file into a file, with the report beside it as `target.report.json` and `target.report.html`.

    Args:
        source: the model.
        target: where the compressed one goes.
        config: what was asked for.
        tell: progress.
        command: for the report.
        run_dir: where the run is kept while it goes on; None for `target.run`. A dry run and a repetition keep nothing.
        resume: go on with the run that lies there, if there is one; where it is finished its report is all there is.

    Raises:
        NeutrinoError: nothing is written then.
    """
    if not config.dry_run:
        check_writable(target)
        for kind in ("json", "html"):
            check_writable(target.with_suffix(f".report.{kind}"))
        if target.exists() and source.exists() and target.samefile(source):
            raise OutputError(f"{target}: is the input itself; give another output path")
    given = load(source)
    if config.dry_run or config.clock is not None:
        return _compressed(given, source, target, config, tell, command, UNKEPT, "")
    own = run_directory.identity(source, config)
    folder = run_dir or run_directory.default(target)
    with run_directory.opened(folder, own, resume) as journal:
        before = finished(target, own) if resume else None
        if before is not None:
            tell(Event("", message=f"{target}: this run is finished already"))
            return before
        if journal.worth:
            tell(Event("", message=f"{folder}: going on after {format_seconds(journal.elapsed)}"))
        return _compressed(given, source, target, config, tell, command, journal, own.digest)


def finished(target: Path, own: run_directory.Identity) -> Report | None:
    """The report beside `target` where both come from this very run; else None."""
    try:
        report = Report.from_json(target.with_suffix(".report.json").read_text(encoding="utf-8"))
        same = report.run == own.digest and report.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError, UsageError):
        return None
    return report if same else None


def _compressed(
    given: Source, source: Path, target: Path, config: Config, tell: Tell, command: str, journal: Journal, run: str
) -> Report:
    """Compress and write; see `compress_file`."""
    size = cost.size_bytes(source)
    result = compress(given.model, config, name=source.name, size_bytes=size, tell=tell, journal=journal)
    result = dataclasses.replace(result, report=dataclasses.replace(result.report, command=command, run=run))
    if result.model is None:
        return result.report
    report_path, page_path = (target.with_suffix(f".report.{kind}") for kind in ("json", "html"))
    from onnxneutrino.html_report import to_html

    with _pending(report_path) as draft:
        # Before the model takes its place: where the disk cannot hold the report, nothing is written.
        _write(draft, result.report.to_json(), report_path)
        save(result.model, target, given.external)
        verify_file(target, result, config)
        report = with_file_size(result.report, cost.size_bytes(target))
        report = dataclasses.replace(report, sha256=hashlib.sha256(target.read_bytes()).hexdigest())
        with _pending(page_path) as page:
            _write(page, to_html(report), page_path)
            os.replace(page, page_path)
        # Last: where it stands, the run is finished.
        _write(draft, report.to_json(), report_path)
        os.replace(draft, report_path)
    return report


@contextlib.contextmanager
def _pending(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written first; it is gone afterwards, whatever happens."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _write(draft: Path, text: str, path: Path) -> None:
    try:
        draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def verify_file(path: Path, result: Result, config: Config) -> None:
    """Load the written file again, check it and compare what it computes with the model that was measured.

    Raises:
        OutputError: the file does not give the same outputs; it is removed.
    """
    written = load(path).model
    model = result.model
    assert model is not None
    inputs = random_inputs(written, result.shapes, config.seed)
    names = [value.name for value in model.graph.output]
    try:
        check(written, path.name)
        got, wanted = Runner(path, threads=config.threads)(inputs), Runner(model, threads=config.threads)(inputs)
    except ModelError as error:
        path.unlink()
        raise OutputError(f"{path}: the written file does not run ({error}); it was removed") from error
    for name, a, b in zip(names, got, wanted, strict=True):
        if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            path.unlink()
            raise OutputError(f"{path}: output '{name}' of the written file differs; it was removed")
