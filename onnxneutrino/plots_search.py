"""The path of the search: every network that was tried, by how much smaller it is and what it loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from onnxneutrino.formats import TIMES, format_metric, format_tick
from onnxneutrino.plots import COLOURS, FONT, Axes, Figure, draw, guide, log_steps, log_ticked, ticked
from onnxneutrino.report import COST_FIELDS, CandidateRow, Report

FAR = 4.0  # deltas: drops beyond make the axis logarithmic above delta


class Mark(NamedTuple):
    """How a candidate is drawn: Matplotlib's marker, the same as a letter, and the colour; filled where trained."""

    marker: str
    letter: str
    colour: str
    words: str


MARKS = {
    (True, True): Mark("o", "\N{BLACK CIRCLE}", "blue", "trained, accepted"),
    (True, False): Mark("s", "\N{BLACK SQUARE}", "vermillion", "trained, refused"),
    (True, None): Mark("D", "\N{BLACK DIAMOND}", "kept", "trained, not judged"),
    (False, True): Mark("^", "\N{WHITE UP-POINTING TRIANGLE}", "blue", "untrained, accepted"),
    (False, False): Mark("v", "\N{WHITE DOWN-POINTING TRIANGLE}", "vermillion", "untrained, refused"),
    (False, None): Mark("d", "\N{WHITE DIAMOND}", "kept", "untrained, not judged"),
}
WRITTEN = Mark("o", "\N{LARGE CIRCLE}", "ink", "the network that was written")


class Place(NamedTuple):
    """Where a candidate stands in the drawing."""

    x: float
    drop: float
    row: CandidateRow


def written_candidate(report: Report) -> int | None:
    """Index of the candidate that was written: the last one, accepted where one is, with the layers' own plan."""
    if not report.compressed:
        return None
    plan = {row.name: (row.form, row.ranks) for row in report.layers if row.form is not None}
    plans = [{name: (own.form, own.ranks) for name, own in row.plan.items()} for row in report.candidates]
    same = [index for index, own in enumerate(plans) if plan and own == plan]
    accepted = [index for index in same if report.candidates[index].accepted]
    return max(accepted or same, default=None)


def places(report: Report) -> list[Place]:
    """The candidates that can be drawn, in the order tried.

    `x` is `original / candidate` of the objective, with hard targets the largest share of one that is used.
    """
    whole = getattr(report.original, COST_FIELDS[report.objective])
    found = []
    for row in report.candidates:
        if row.drop is None or not math.isfinite(row.drop) or not row.cost > 0:
            continue
        x = row.cost if report.targets else whole / row.cost
        if math.isfinite(x) and x > 0:
            found.append(Place(x, row.drop, row))
    return found


def marks(report: Report) -> list[Mark]:
    """The marks that occur in the drawing, in the order of `MARKS`."""
    occur = {(place.row.trained, place.row.accepted) for place in places(report)}
    known = [mark for kind, mark in MARKS.items() if kind in occur]
    index = written_candidate(report)
    drawn = index is not None and any(place.row is report.candidates[index] for place in places(report))
    return [*known, WRITTEN] if drawn else known


def search_path(report: Report, key: str) -> str:
    """Draw all candidates that have a cost and a drop; empty where none has."""
    shown = places(report)
    if not shown:
        return ""
    index = written_candidate(report)
    written = None if index is None else report.candidates[index]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.8)
        _axes(axes, report, shown)
        trained = [place for place in shown if place.row.trained]
        path = [place.x for place in trained], [place.drop for place in trained]
        axes.plot(*path, color=COLOURS["kept"], linewidth=1, alpha=0.45, zorder=2)
        for place in shown:
            mark = MARKS[place.row.trained, place.row.accepted]
            axes.plot(
                [place.x],
                [place.drop],
                linestyle="none",
                marker=mark.marker,
                markersize=8,
                markeredgewidth=1.5,
                markeredgecolor=COLOURS[mark.colour],
                markerfacecolor=COLOURS[mark.colour if place.row.trained else "bg"],
                zorder=4,
            )
            if place.row is written:
                _point_out(axes, place)

    return draw(500, 350, paint, "Path of the search: drop of each network tried over its size", key)


def _axes(axes: Axes, report: Report, shown: Sequence[Place]) -> None:
    """Scales, ticks and titles; the lines of delta and of the hard targets."""
    widths = [place.x for place in shown]
    one = [1.0]  # the original, or a target that is just met
    low, high = min(widths + one), max(widths + one)
    log_ticked(axes, "x", low, high, _percent_tick if report.targets else _ratio_tick)
    if report.targets:
        axes.invert_xaxis()
        axes.set_xlabel("largest share of a hard target that is used")
        guide(axes, 1.0, "targets met \N{RIGHTWARDS ARROW}", which="x", colour="kept")
    else:
        axes.set_xlabel(f"times fewer {WORDS[report.objective]} than the original")
    _drops(axes, [place.drop for place in shown], report.delta)
    axes.set_ylabel(f"drop of {report.metric_name.rsplit(':', 1)[-1][:24]} (lower is better)")


WORDS = {"params": "parameters", "macs": "MACs", "size": "bytes", "memory": "bytes of memory", "latency": "ms"}


def _ratio_tick(value: float) -> str:
    return f"{format_tick(value)}{TIMES}"


def _percent_tick(value: float) -> str:
    return f"{format_tick(100 * value)} %"


def _drops(axes: Axes, drops: Sequence[float], delta: float | None) -> None:
    """The axis of drops: linear, but logarithmic above delta where some candidates lose many deltas."""
    low, high = min(*drops, 0.0, delta or 0.0), max(*drops, delta or 0.0)
    if delta and delta > 0 and high > FAR * delta:
        axes.set_yscale("symlog", linthresh=delta, linscale=1.2)
        worst = log_steps(1.6 * delta, high * 1.3)
        below = [-delta, -delta / 2] if low < -delta / 2 else []
        axes.set_yticks([*below, 0.0, delta / 2, *worst])
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        axes.set_ylim(min(low * 1.3, -0.15 * delta), high * 1.35)
    else:
        room = 0.08 * ((high - low) or 1.0)
        axes.set_ylim(low - room, high + room)
        ticked(axes, "y")
    if delta is not None:
        bottom = axes.get_ylim()[0]
        axes.axhspan(bottom, delta, color=COLOURS["green"], alpha=0.08, linewidth=0, zorder=0)
        guide(axes, delta, f"delta {format_metric(delta)}")


def _point_out(axes: Axes, place: Place) -> None:
    """A ring around the network that was written, and its name."""
    ring = {"linestyle": "none", "markersize": 16, "markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.plot([place.x], [place.drop], marker="o", markeredgecolor=COLOURS["ink"], zorder=5, **ring)  # type: ignore[arg-type]
    axes.annotate(
        "written",
        (place.x, place.drop),
        xytext=(0, -12),
        textcoords="offset points",
        ha="center",
        va="top",
        color=COLOURS["ink"],
        fontsize=FONT,
        fontweight="bold",
        zorder=6,
    )
