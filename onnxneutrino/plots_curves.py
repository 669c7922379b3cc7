"""Curves of the HTML report: how sensitive each layer is, and how each fine-tune went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxneutrino.formats import format_metric, format_tick
from onnxneutrino.plots import COLOURS, Axes, Figure, draw, guide, log_ticked, ticked
from onnxneutrino.report import Sensitivity, Training

NAMED_OF_MANY = 7
LOG_LOSS = 20.0  # a loss that falls further is drawn on a logarithmic axis
LINES: tuple[tuple[str, str, str, bool], ...] = (
    ("blue", "o", "\N{BLACK CIRCLE}", True),
    ("vermillion", "s", "\N{BLACK SQUARE}", True),
    ("green", "^", "\N{BLACK UP-POINTING TRIANGLE}", True),
    ("purple", "D", "\N{BLACK DIAMOND}", True),
    ("orange", "v", "\N{BLACK DOWN-POINTING TRIANGLE}", True),
    ("sky", "P", "\N{HEAVY GREEK CROSS}", True),
    ("plum", "X", "\N{HEAVY MULTIPLICATION X}", True),
    ("blue", "s", "\N{WHITE SQUARE}", False),
    ("vermillion", "o", "\N{WHITE CIRCLE}", False),
    ("green", "D", "\N{WHITE DIAMOND}", False),
)


class Named(NamedTuple):
    """A layer's line: colour, Matplotlib's marker, the same as a letter, and whether it is filled."""

    layer: str
    colour: str
    marker: str
    letter: str
    filled: bool


Line = list[tuple[float, float]]


def _lines(curves: Sequence[Sensitivity]) -> list[tuple[str, Line]]:
    """What can be drawn on logarithmic axes: points with a positive error and divergence, layers that have one."""
    found = []
    for curve in curves:
        points = [(p.error, p.divergence) for p in curve.points if _positive(p.error) and _positive(p.divergence)]
        if points:
            found.append((curve.layer, points))
    return found


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def by_sensitivity(curves: Sequence[Sensitivity]) -> list[str]:
    """Layers by falling divergence at one relative error, the geometric middle of all that were measured.

    Between its points a curve is read off along straight lines in log-log, outside at its nearest point.
    """
    lines = _lines(curves)
    if not lines:
        return []
    middle = float(np.mean([math.log(error) for _, points in lines for error, _ in points]))

    def at_middle(line: tuple[str, Line]) -> float:
        errors, divergences = zip(*((math.log(error), math.log(value)) for error, value in line[1]), strict=True)
        return float(np.interp(middle, errors, divergences))

    return [name for name, _ in sorted(lines, key=at_middle, reverse=True)]


def named(curves: Sequence[Sensitivity]) -> list[Named]:
    """The layers that are told apart, most sensitive first: all of up to ten, else the seven most sensitive."""
    order = by_sensitivity(curves)
    told = order if len(order) <= len(LINES) else order[:NAMED_OF_MANY]
    return [Named(name, *line) for name, line in zip(told, LINES, strict=False)]


def sensitivity_curves(curves: Sequence[Sensitivity], key: str) -> str:
    """Draw divergence over relative error, one line for each layer; empty without points."""
    lines = _lines(curves)
    if not lines:
        return ""
    known = {own.layer: own for own in named(curves)}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.8)
        for which, index in (("x", 0), ("y", 1)):
            values = [point[index] for _, points in lines for point in points]
            log_ticked(axes, which, min(values), max(values))
        axes.set_xlabel("relative error of the layer's output")
        axes.set_ylabel("divergence of the network's outputs")
        for name, points in lines:
            own = known.get(name)
            errors, divergences = zip(*points, strict=True)
            if own is None:
                axes.plot(errors, divergences, color=COLOURS["kept"], linewidth=0.9, alpha=0.6, zorder=2)
                continue
            colour = COLOURS[own.colour]
            face = colour if own.filled else COLOURS["bg"]
            style = {"color": colour, "linewidth": 1.8, "marker": own.marker, "markersize": 6.5}
            axes.plot(errors, divergences, markerfacecolor=face, zorder=3, **style)  # type: ignore[arg-type]

    return draw(500, 350, paint, "Sensitivity: divergence over the relative error of one layer", key)


def training_curves(training: Training, metric_name: str, key: str) -> str:
    """Draw the loss over the steps, and below it the metric where it was looked at; empty without a curve."""
    losses = [(p.step, p.loss) for p in training.curve if math.isfinite(p.loss)]
    looks = [(p.step, p.metric) for p in training.curve if p.metric is not None and math.isfinite(p.metric)]
    if not losses and not looks:
        return ""
    panels = [kind for kind, points in (("loss", losses), ("metric", looks)) if points]

    def paint(figure: Figure) -> None:
        for row, kind in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, row + 1)
            axes.grid(True, linewidth=0.8)
            steps, values = zip(*(losses if kind == "loss" else looks), strict=True)
            ticked(axes, "y", format_tick, count=4)
            if kind == "loss":
                if min(values) > 0 and max(values) > LOG_LOSS * min(values):
                    log_ticked(axes, "y", min(values), max(values))
                axes.plot(steps, values, color=COLOURS["blue"], linewidth=1.7, **_dot(len(values)))  # type: ignore[arg-type]
                axes.set_ylabel("loss")
            else:
                axes.plot(steps, values, color=COLOURS["green"], linewidth=1.5, marker="o", markersize=5)
                axes.set_ylabel(metric_name[:16])
                _floor(axes, values, training.floor)
            axes.set_xlim(0, max(training.steps, *steps, 1) * 1.02)
            ticked(axes, "x", format_tick, count=4)
            if row < len(panels) - 1:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel("step")

    title = f"Fine-tune {training.name}: {' and '.join(panels)} over steps"
    return draw(360, 150 * len(panels) + 50, paint, title, key)


def _dot(count: int) -> dict[str, object]:
    """One point alone makes no line: it is drawn as a dot."""
    return {"marker": "o", "markersize": 5} if count == 1 else {}


def _floor(axes: Axes, values: Sequence[float], floor: float | None) -> None:
    """The metric that must be reached, with room for its name."""
    known = [*values, *([] if floor is None else [floor])]
    room = 0.14 * ((max(known) - min(known)) or 1.0)
    axes.set_ylim(min(known) - room, max(known) + room)
    if floor is not None:
        guide(axes, floor, f"floor {format_metric(floor)}")
