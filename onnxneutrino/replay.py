"""Repeat a run bit for bit: the options of its report, and every reading of time that decided something in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxneutrino.config import Config, load_config
from onnxneutrino.errors import OutputError, UsageError
from onnxneutrino.report import Report
from onnxneutrino.summary import versions


def repeated(model_path: Path | None, report: Report, given: Mapping[str, Any]) -> Config:
    """The configuration of the run that `report` tells of.

    Args:
        model_path: the model, beside which its TOML file may lie.
        report: of the run.
        given: options that were given beside the report, which go before its own.

    Raises:
        UsageError: the report holds no readings of time, or see `load_config`.
    """
    if not report.clock:
        raise UsageError(f"the report of {report.model} holds no readings of time; it cannot be replayed")
    now = versions()
    other = [f"{name} {was} (now {now[name]})" for name, was in report.versions.items() if now.get(name, was) != was]
    if other:
        raise UsageError(f"the report of {report.model} was made with {', '.join(other)}; other versions end elsewhere")
    settings = dict(report.settings)
    data, train = settings.pop("data", {}), settings.pop("train", {})
    if not (isinstance(data, Mapping) and isinstance(train, Mapping)):
        raise UsageError(f"the report of {report.model} has settings of its data that are no object; it is damaged")
    options = {**settings, **train, **data, "data": data.get("path")}
    options.pop("path", None)
    plain = load_config(model_path, {})
    # What the TOML file says already is left to it: its paths start from its own folder.
    for name, own in (("data", plain.data.path), ("metric", plain.metric)):
        if options.get(name) == own:
            options.pop(name)
    return load_config(model_path, {**options, **given, "clock": report.clock})


def check_repeated(before: Report, after: Report, target: Path) -> None:
    """Refuse a repetition that wrote another model.

    Raises:
        OutputError: gives what differs most likely.
    """
    if before.sha256 and before.sha256 != after.sha256:
        raise OutputError(f"{target}: is not the model of the report: another processor, model or data")
