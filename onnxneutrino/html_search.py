"""How a run went, in the HTML report: the networks that were tried, and the fine-tunes."""

from __future__ import annotations

from onnxneutrino.console import COSTS, short_metric
from onnxneutrino.formats import (
    format_exact,
    format_metric,
    format_percent,
    format_ratio,
    format_seconds,
)
from onnxneutrino.html_elements import Html, element, figure, folded, legend, paragraph, section, table
from onnxneutrino.plots_curves import training_curves
from onnxneutrino.plots_search import marks, search_path, written_candidate
from onnxneutrino.report import COST_FIELDS, Report, Training, ratio

HOW_JUDGED = (
    "A network is accepted when its drop on the images that decide, with its uncertainty added, stays within delta; "
    "so a point close below the line may be refused."
)
HOW_JOINED = "The thin line joins the trained networks in the order they came."


def search(report: Report) -> Html:
    """The path of the search, drawn, and the table of all networks tried."""
    rows = report.candidates
    if not rows:
        return Html()
    trained, accepted = sum(row.trained for row in rows), sum(row.accepted is True for row in rows)
    told = (
        f"{format_exact(len(rows))} network{'s' * (len(rows) > 1)} tried, {format_exact(trained)} of them trained; "
        f"{format_exact(accepted)} accepted."
    )
    drawing = search_path(report, "search")
    drawn = Html()
    if drawing:
        key = legend((mark.letter, mark.colour, mark.words) for mark in marks(report))
        notes = [*([HOW_JUDGED] if report.delta is not None else []), *([HOW_JOINED] if trained > 1 else [])]
        words = element("div", key, *(paragraph(note, "note") for note in notes), class_="legend")
        drawn = element("div", figure(drawing), words, class_="beside")
    return section("Path of the search", paragraph(told), drawn, _candidates(report))


def _candidates(report: Report) -> Html:
    field = COST_FIELDS[report.objective]
    whole = getattr(report.original, field)
    form = format_percent if report.targets else next(own for _, name, own in COSTS if name == field)
    title = "Share of target" if report.targets else next(title for title, name, _ in COSTS if name == field)
    written = written_candidate(report)
    rows = []
    for index, row in enumerate(report.candidates):
        verdict = {True: "accepted", False: "refused", None: "-"}[row.accepted]
        rows.append(
            [
                row.name,
                form(row.cost),
                *([] if report.targets else [format_ratio(ratio(whole, row.cost))]),
                format_metric(row.metric),
                format_metric(row.drop),
                "yes" if row.trained else "no",
                format_seconds(row.seconds),
                "written" if index == written else verdict,
                row.note,
            ]
        )
    columns = (
        ("Network", "name"),
        (title, "n"),
        *(() if report.targets else (("Smaller", "n"),)),
        (short_metric(report.metric_name), "n"),
        ("Drop", "n"),
        ("Trained", ""),
        ("Time", "n"),
        ("Verdict", ""),
        ("Note", "name"),
    )
    marked = [] if written is None else [(written, "strong")]
    return folded("All networks tried", table(columns, rows, "All networks tried", marked))


def training(report: Report) -> Html:
    """Each fine-tune: its loss and metric drawn, then all as a table; what was trained by reconstruction."""
    if not report.training:
        return Html()
    metric = short_metric(report.metric_name)
    drawn = []
    for index, own in enumerate(report.training):
        drawing = training_curves(own, metric, f"train{index}")
        if drawing:
            drawn.append(element("div", element("h3", own.name), figure(drawing, _told(own))))
    floor = any(own.floor is not None and any(p.metric is not None for p in own.curve) for own in report.training)
    note = "The floor is the original's metric on the same images less delta." if floor else ""
    return section(
        "Fine-tuning",
        paragraph(note, "note") if note else Html(),
        element("div", *drawn, class_="many") if drawn else Html(),
        _fine_tunes(report),
        _blocks(report),
    )


def _told(own: Training) -> str:
    if not own.steps:
        return "trained elsewhere"
    rate = format_metric(own.learning_rate)
    return f"{format_exact(own.steps)} steps, batch {format_exact(own.batch_size)}, learning rate {rate}"


def _fine_tunes(report: Report) -> Html:
    rows = [
        [
            own.name,
            format_exact(own.steps),
            format_exact(own.batch_size),
            format_exact(own.threads),
            format_metric(own.learning_rate),
            format_metric(own.curve[0].loss if own.curve else None),
            format_metric(own.curve[-1].loss if own.curve else None),
            format_metric(next((p.metric for p in reversed(own.curve) if p.metric is not None), None)),
            format_metric(own.floor),
        ]
        for own in report.training
    ]
    titles = ("Steps", "Batch", "Threads", "Learning rate", "First loss", "Last loss", "Last metric", "Floor")
    columns = (("Fine-tune", "name"), *((title, "n") for title in titles))
    return folded("All fine-tunes", table(columns, rows, "All fine-tunes"))


def _blocks(report: Report) -> Html:
    if not any(own.how == "reconstruction" for own in report.blocks):
        return Html()
    rows = [
        [own.how, format_exact(len(own.layers)), ", ".join(own.learns), ", ".join(own.ended_by) or "-"]
        for own in report.blocks
    ]
    columns = (("Trained", "short"), ("Layers", "n"), ("Learns", "name"), ("No gradient behind, because of", "name"))
    return folded("Layers that were trained together", table(columns, rows, "Layers that were trained together"))
