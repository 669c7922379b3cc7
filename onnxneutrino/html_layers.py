"""What became of each layer, in the HTML report: bars, the whole table, frozen layers, sensitivity."""

from __future__ import annotations

from onnxneutrino.formats import format_count, format_exact, format_ratio, format_shape
from onnxneutrino.html_elements import Html, element, figure, folded, join, legend, paragraph, section, table
from onnxneutrino.plots_curves import named, sensitivity_curves
from onnxneutrino.plots_layers import form_and_ranks, largest, macs_bars, params_bars
from onnxneutrino.report import LayerRow, Report, by_reason, ratio


def layers(report: Report) -> Html:
    """Bars of params and multiply-accumulates before and after, the table of all layers, the frozen ones and why."""
    rows = report.layers
    if not rows:
        return Html()
    factorized, frozen = sum(row.form is not None for row in rows), sum(row.reason is not None for row in rows)
    shown = largest(rows)
    told = f"{format_exact(factorized)} of {format_exact(len(rows))} layers factorized, {format_exact(frozen)} frozen."
    narrowed = sum(row.narrowed_shape is not None for row in rows)
    if narrowed:
        told += f" Channels were removed from the weights of {format_exact(narrowed)}."
    if len(shown) < len(rows):
        told += f" Drawn are the {format_exact(len(shown))} largest; the table has all."
    keys = [
        ("", "before", "original"),
        *([("", "blue", "factorized, with form and ranks")] if factorized else []),
        *([("", "kept", "narrowed, or as it was" if narrowed else "as it was")] if factorized < len(rows) else []),
    ]
    bars = element("div", figure(params_bars(shown, "params")), figure(macs_bars(shown, "macs")), class_="pair")
    return section("Layers", paragraph(told), legend(keys, "legend row"), bars, _all(rows), _frozen(rows))


def _all(rows: tuple[LayerRow, ...]) -> Html:
    def amounts(before: int, after: int) -> list[str]:
        return [format_count(before), format_count(after), format_ratio(ratio(before, after))]

    cells = [
        [
            row.name,
            row.op,
            " → ".join(format_shape(own) for own in (row.weight_shape, row.narrowed_shape) if own is not None),
            form_and_ranks(row),
            *amounts(row.params_before, row.params_after),
            *amounts(row.macs_before, row.macs_after),
        ]
        for row in rows
    ]
    fields = ("params_before", "params_after", "macs_before", "macs_after")
    total = [sum(getattr(row, field) for row in rows) for field in fields]
    cells.append(["All layers", "", "", "", *amounts(*total[:2]), *amounts(*total[2:])])
    columns = (
        ("Layer", "name"),
        ("Operator", ""),
        ("Weight", "short"),
        ("Form and ranks", "short"),
        ("Params", "n"),
        ("after", "n"),
        ("ratio", "n"),
        ("MACs", "n"),
        ("after", "n"),
        ("ratio", "n"),
    )
    return folded("All layers", table(columns, cells, "All layers", [(len(cells) - 1, "total")]))


def _frozen(rows: tuple[LayerRow, ...]) -> Html:
    cells = [[reason, format_exact(len(names)), ", ".join(names)] for reason, names in by_reason(rows).items()]
    if not cells:
        return Html()
    columns = (("Why", "name"), ("Layers", "n"), ("Names", "names"))
    return folded("Frozen layers, and why", table(columns, cells, "Frozen layers, and why"))


def sensitivity(report: Report) -> Html:
    """The curves of all layers, the most sensitive named."""
    curves = report.sensitivities
    drawing = sensitivity_curves(curves, "sens")
    if not drawing:
        return Html()
    told = "How far the outputs of the whole network move when one layer alone is factorized, over that layer's error."
    known = named(curves)
    keys = [(own.letter, own.colour, own.layer) for own in known]
    title = "Most sensitive first"
    if len(known) < len(curves):
        keys.append(("\N{HORIZONTAL BAR}", "kept", f"{format_exact(len(curves) - len(known))} less sensitive layers"))
        title = "Most sensitive"
    beside = element("div", join(element("h3", title), legend(keys)), class_="legend")
    return section("Sensitivity", paragraph(told), element("div", figure(drawing), beside, class_="beside"))
