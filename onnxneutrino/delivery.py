"""From file to file: compress, write the model in one piece, read it back, and write the report beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnxneutrino import cost
from onnxneutrino.conductor import Result, compress
from onnxneutrino.config import Config
from onnxneutrino.errors import ModelError, OutputError
from onnxneutrino.graph import check, check_writable, load, save
from onnxneutrino.phases import Tell
from onnxneutrino.report import Report
from onnxneutrino.runtime import Runner, random_inputs
from onnxneutrino.summary import with_file_size


def compress_file(
    source: Path, target: Path, config: Config, tell: Tell = lambda event: None, command: str = ""
) -> Report:
    """Compress a file into a file, with the report beside it as `target.report.json` and `target.report.html`.

    Args:
        source: the model.
        target: where the compressed one goes.
        config: what was asked for.
        tell: progress.
        command: for the report.

    Raises:
        NeutrinoError: nothing is written then.
    """
    if not config.dry_run:
        check_writable(target)
        report_path, page_path = (target.with_suffix(f".report.{kind}") for kind in ("json", "html"))
        for path in (report_path, page_path):
            check_writable(path)
        if target.exists() and source.exists() and target.samefile(source):
            raise OutputError(f"{target}: is the input itself; give another output path")
    given = load(source)
    result = compress(given.model, config, name=source.name, size_bytes=cost.size_bytes(source), tell=tell)
    result = dataclasses.replace(result, report=dataclasses.replace(result.report, command=command))
    if result.model is None:
        return result.report
    from onnxneutrino.html_report import to_html

    with _pending(report_path) as draft:
        # Before the model takes its place: where the disk cannot hold the report, nothing is written.
        _write(draft, result.report.to_json(), report_path)
        save(result.model, target, given.external)
        verify_file(target, result, config)
        report = with_file_size(result.report, cost.size_bytes(target))
        report = dataclasses.replace(report, sha256=hashlib.sha256(target.read_bytes()).hexdigest())
        _write(draft, report.to_json(), report_path)
        os.replace(draft, report_path)
    with _pending(page_path) as draft:
        _write(draft, to_html(report), page_path)
        os.replace(draft, page_path)
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
