"""What a run was, in the HTML report: command, settings, time, versions; enough to do it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from onnxneutrino.formats import format_percent, format_seconds
from onnxneutrino.html_elements import Html, element, folded, join, section, table
from onnxneutrino.report import Report


def run(report: Report) -> Html:
    """Command, environment, time by phase, settings and what normalization changed."""
    return section(
        "This run", _command(report), _facts(report), _time(report), _settings(report), _normalization(report)
    )


def _command(report: Report) -> Html:
    return element("pre", element("code", report.command)) if report.command else Html()


def _facts(report: Report) -> Html:
    facts = [("Data", report.data)] if report.data else []
    facts += [("Objective", report.objective), ("Seed", str(report.seed))]
    facts += [("Machine", report.machine)] if report.machine else []
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    facts += [("Versions", versions)] if versions else []
    facts += [("SHA-256", report.sha256)] if report.sha256 else []
    return element("dl", *(join(element("dt", name), element("dd", told)) for name, told in facts), class_="words")


def _time(report: Report) -> Html:
    known = {name: value for name, value in report.seconds.items() if math.isfinite(value)}
    whole = sum(known.values())
    if not whole > 0:
        return Html()
    rows = [
        [name, format_seconds(value), format_percent(value / whole), _meter(value / whole)]
        for name, value in known.items()
    ]
    rows.append(["All", format_seconds(whole), "", ""])
    columns = (("Phase", ""), ("Time", "n"), ("Share", "n"), ("", "bar"))
    shown = table(columns, rows, "Time by phase", [(len(rows) - 1, "total")])
    return folded("Time by phase", element("div", shown, class_="wide"))


def _meter(share: float) -> Html:
    """A bar as wide as the share; its number stands beside it."""
    return element("span", class_="meter", style=f"width:{100 * share:.2f}%", aria_hidden="true")


def _settings(report: Report) -> Html:
    rows = [[name, value] for name, value in _flat(report.settings)]
    return folded("Settings", table((("Option", "short"), ("Value", "name")), rows, "Settings")) if rows else Html()


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Settings by name, those of a group as `data.layout`; its values in words."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _words(value)


def _words(value: Any) -> str:
    """A JSON value without quotes and brackets; `-` for none."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "-"
    if value is None or value == {}:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _normalization(report: Report) -> Html:
    if not report.normalization:
        return Html()
    return folded("What normalization changed", element("ul", *(element("li", note) for note in report.normalization)))
