"""The table `quality` as Markdown, from the JSON of its cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cells import versions_line

METHODS: Mapping[str, str] = {
    "ours": "onnxneutrino",
    "teacher": "onnxneutrino, teacher alone",
    "svd": "SVD, one ratio",
    "vbmf": "VBMF, Tucker-2",
    "greedy": "greedy, spatial SVD",
    "pruning": "filter pruning",
    "reference": "original, fine-tuned",
}

HEADING = """# Ours beside what a user would pick instead

Made by `python benchmarks/quality.py`; what the methods are stands in `benchmarks/README.md`. Objective {objective},
delta {delta:g} in the metric's units, {minutes:g} minutes for every cell, {threads}, seed {seed}. Ratios are original /
result. The drop is that on the whole test split with its paired 95 % interval: half of the split decided
which network is taken, and all of it that its drop is within delta. `original, fine-tuned` is the original trained
for the whole time with the same loss: what training alone gives. Minutes are those of the whole process.
"""

COLUMNS = (
    "| method | params | ratio | MACs | ratio | size, kB | ratio | latency ratio | drop | 95 % interval | minutes |"
)
ALIGNED = "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"


def document(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """Heading, a table for every model, and what a reader must know about single cells."""
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    lines = [HEADING.format(**{**settings, "threads": threads}).rstrip()]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += ["", f"## {model}", "", *original_line(own), COLUMNS, ALIGNED, *map(table_line, own)]
        notes = [note for row in own for note in notes_of(row)]
        lines += ["", *notes] if notes else []
    lines += ["", f"Versions: {versions_line(rows)}."]
    return "\n".join(lines) + "\n"


def original_line(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Metric and costs of the original."""
    row = next((row for row in rows if "original" in row), None)
    if row is None:
        return []
    own = row["original"]
    name = row["report"].get("metric_name", "metric")
    told = f"{_count(own['params'])} params, {_count(own['macs'])} MACs, {own['size_bytes'] / 1000:.0f} kB"
    return [f"Original: {name} {own['metric']:.2f}, {told}.", ""]


def table_line(row: dict[str, Any]) -> str:
    """One method; a method without a result has a line that says so."""
    name = METHODS[row["method"]]
    if "result" not in row:
        return f"| {name} | {'skipped' if 'skipped' in row else 'failed'} |" + " |" * 9
    before, after = row["original"], row["result"]
    cells = [name]
    for key, text in (
        ("params", _count(after["params"])),
        ("macs", _count(after["macs"])),
        ("size_bytes", f"{after['size_bytes'] / 1000:.0f}"),
    ):
        cells += [text, _ratio(before[key], after[key])]
    cells.append(_ratio(before["latency_ms"], after["latency_ms"]))
    spread = row["drop_interval"]
    cells.append(f"{row['drop']:.2f}")
    cells.append("-" if spread is None else f"{spread['low']:.2f} to {spread['high']:.2f}")
    cells.append(f"{row['process_seconds'] / 60:.1f}")
    return f"| {' | '.join(cells)} |"


def notes_of(row: dict[str, Any]) -> list[str]:
    """Why there is no result, and the warnings of its report."""
    name = METHODS[row["method"]]
    told = row.get("skipped") or row.get("failed")
    if told:
        return [f"- {name}: {told}"]
    found = [f"- {name}: {warning}" for warning in row["report"]["warnings"]]
    if row["method"] != "reference" and not row["compressed"]:
        found.append(f"- {name}: no smaller network was accepted; the line is the original")
    return found


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x"
