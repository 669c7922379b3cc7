"""What became of each layer: bars of its params or multiply-accumulates, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxneutrino.formats import format_ratio, format_tick
from onnxneutrino.plots import COLOURS, FONT, Figure, draw, shortened, ticked
from onnxneutrino.report import LayerRow, ratio

MOST = 40
ROW, MARGIN = 21.0, 56.0  # height of a layer, and of the axis with its title


def largest(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """The 40 layers with the largest share of all params or all multiply-accumulates, in the order of the graph."""
    params = max(sum(row.params_before for row in layers), 1)
    macs = max(sum(row.macs_before for row in layers), 1)
    by_share = sorted(layers, key=lambda row: -max(row.params_before / params, row.macs_before / macs))
    chosen = {id(row) for row in by_share[:MOST]}
    return [row for row in layers if id(row) in chosen]


def form_and_ranks(row: LayerRow) -> str:
    """What became of a layer in words: `tucker2 12, 20`, `narrowed`, `frozen` or `kept`."""
    if row.form is None:
        if row.narrowed_shape is not None:
            return "narrowed"
        return "kept" if row.reason is None else "frozen"
    return f"{row.form} {', '.join(map(str, row.ranks))}".rstrip()


def params_bars(layers: Sequence[LayerRow], key: str) -> str:
    """Draw params before and after, with form and ranks; empty without layers."""
    return _bars(
        layers,
        [(row.params_before, row.params_after) for row in layers],
        form_and_ranks,
        "Parameters of each layer, before and after",
        "params",
        key,
    )


def macs_bars(layers: Sequence[LayerRow], key: str) -> str:
    """Draw multiply-accumulates before and after, with the ratio; empty without layers."""
    return _bars(
        layers,
        [(row.macs_before, row.macs_after) for row in layers],
        lambda row: format_ratio(ratio(row.macs_before, row.macs_after)) if row.form else form_and_ranks(row),
        "Multiply-accumulates of each layer, before and after",
        "MACs",
        key,
    )


def _bars(
    layers: Sequence[LayerRow],
    values: Sequence[tuple[int, int]],
    told: Callable[[LayerRow], str],
    title: str,
    unit: str,
    key: str,
) -> str:
    """Horizontal bars, the first layer on top: a wide pale one before, a narrow one after, then words."""
    if not layers:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = range(len(layers))
        axes.grid(True, axis="x", linewidth=0.8)
        axes.barh(rows, [before for before, _ in values], height=0.74, color=COLOURS["before"], linewidth=0)
        colours = [COLOURS["blue" if row.form else "kept"] for row in layers]
        axes.barh(rows, [after for _, after in values], height=0.4, color=colours, linewidth=0)
        longest = max(max(pair) for pair in values) or 1
        for index, (row, pair) in enumerate(zip(layers, values, strict=True)):
            axes.annotate(
                told(row),
                (max(pair), index),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS["ink" if row.form else "muted"],
                fontsize=FONT - 1.5,
            )
        axes.set_yticks(rows, [shortened(row.name) for row in layers], fontsize=FONT - 1.5, color=COLOURS["ink"])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlim(0, 1.42 * longest)
        axes.spines["left"].set_visible(False)
        ticked(axes, "x", lambda value: format_tick(value) if value <= longest else "", count=6)
        axes.set_xlabel(unit)

    return draw(430, ROW * len(layers) + MARGIN, paint, title, key)
