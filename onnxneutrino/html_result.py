"""What a run achieved, on top of the HTML report: the headline, the warnings, the six metrics, the drop."""

from __future__ import annotations

from onnxneutrino.console import COSTS, missed, short_metric
from onnxneutrino.formats import format_exact, format_metric, format_ratio
from onnxneutrino.html_elements import Html, element, join, paragraph, table
from onnxneutrino.report import COST_FIELDS, Enhancement, Report, enhancement
from onnxneutrino.verdict import verdict

GAINS = (("params", "parameters", "fewer", "more"), ("macs", "MACs", "fewer", "more"))
VISIBLE = 1.005  # a ratio below is written 1.00


def headline(report: Report) -> str:
    """The run in one line: `30.4× fewer parameters, 18.7× fewer MACs, drop 0.223 of 1.00 allowed`."""
    if not report.compressed:
        if report.targets and not report.missed():
            return "Not compressed: the original meets all hard targets"
        within = "" if report.delta is None else f" within delta {format_metric(report.delta)}"
        return f"Not compressed: no smaller network{within}"
    gain = report.enhancement or enhancement(report.original, report.written, report.drop)
    told = ", ".join([*_gains(gain), _drop(report)])
    late = report.missed()
    return f"Hard target{'s' * (len(late) > 1)} not met: {told}" if late else told


def _gains(gain: Enhancement) -> list[str]:
    told = []
    for field, what, less, more in GAINS:
        value = getattr(gain, field)
        if value >= VISIBLE:
            told.append(f"{format_ratio(value)} {less} {what}")
        elif 0 < value <= 1 / VISIBLE:
            told.append(f"{format_ratio(1 / value)} {more} {what}")
    return told or ["no fewer parameters or MACs"]


def _drop(report: Report) -> str:
    drop, delta = report.drop, report.delta
    if drop is None or drop != drop:
        return "drop not measured"
    if drop <= 0:
        return "no drop" if drop == 0 else f"{short_metric(report.metric_name)} better by {format_metric(-drop)}"
    if delta is None:
        return f"drop {format_metric(drop)}"
    if drop > delta:
        return f"drop {format_metric(drop)}, more than the {format_metric(delta)} allowed"
    return f"drop {format_metric(drop)} of {format_metric(delta)} allowed"


def header(report: Report) -> Html:
    """Model and data, the headline, what limited the run and what to try, and the warnings."""
    source = f"{report.model}, measured with {report.metric_name}" + (f" on {report.data}" if report.data else "")
    title = headline(report)
    return element("header", paragraph(source, "file"), element("h1", title), _verdict(report), _warnings(report))


def _verdict(report: Report) -> Html:
    if report.stage1 is None and report.stage2 is None:
        return Html()
    # Of a compressed network the headline says what was achieved.
    titles = ("" if report.compressed else "Achieved", "Limited by", "To try")
    lines = ((title, told) for title, told in zip(titles, verdict(report), strict=True) if title)
    return element("dl", *(join(element("dt", title), element("dd", told)) for title, told in lines), class_="words")


def _warnings(report: Report) -> Html:
    late = missed(report)
    lines = [*([f"{late[0].upper()}{late[1:]}."] if late else []), *report.warnings]
    if not lines:
        return Html()
    title = element("h3", "Warnings" if len(lines) > 1 else "Warning")
    return element("div", title, *(paragraph(line) for line in lines), class_="warnings", role="note")


def results(report: Report) -> Html:
    """The six metrics of each stage, as on the console; the hard targets; the drop with its intervals."""
    return element(
        "section", element("h2", "Result"), _metrics(report), _targets(report), _drops(report), class_="first"
    )


def _metrics(report: Report) -> Html:
    stages = (("Original", report.original), ("Stage 1", report.stage1), ("Stage 2", report.stage2))
    rows = [
        [name, format_metric(own.metric), *(form(getattr(own, field)) for _, field, form in COSTS)]
        for name, own in stages
        if own is not None
    ]
    gain, marked = report.enhancement, []
    if gain is not None:
        rows.append(
            ["Enh.", f"drop {format_metric(gain.drop)}", *(format_ratio(getattr(gain, f)) for _, f, _ in COSTS)]
        )
        marked.append((len(rows) - 1, "total"))
    columns = [("", "short"), (short_metric(report.metric_name), "n"), *((title, "n") for title, _, _ in COSTS)]
    return element("div", table(columns, rows, "Six metrics of each stage", marked), class_="wide")


def _targets(report: Report) -> Html:
    if not report.targets:
        return Html()
    forms = {field: form for _, field, form in COSTS}
    late = {row.name for row in report.missed()}
    rows = []
    for row in report.targets:
        form, value = forms[COST_FIELDS[row.name]], getattr(report.written, COST_FIELDS[row.name])
        rows.append([row.name, form(row.limit), form(value), "not met" if row.name in late else "met", form(row.least)])
    columns = (("Hard target", ""), ("Limit", "n"), ("Written", "n"), ("", "short"), ("Smallest plan, about", "n"))
    return table(columns, rows, "Hard targets")


def _drops(report: Report) -> Html:
    deciding = report.deciding
    decided = "Images that decided"
    if deciding is not None:
        decided = f"{decided}: {deciding.source}, {format_exact(deciding.count)} examples"
    kinds = (
        ("Whole test split", report.drop_interval),
        (decided, report.drop_select),
        ("Other images, which only report", report.drop_report),
    )
    rows = [
        [name, format_metric(own.value), f"{format_metric(own.low)} to {format_metric(own.high)}"]
        for name, own in kinds
        if own is not None
    ]
    if not rows:
        return Html()
    allowed = "" if report.delta is None else f" Delta, the drop allowed, is {format_metric(report.delta)}."
    note = f"A drop is positive when the network is worse than the original.{allowed}"
    shown = table((("Measured on", "name"), ("Drop", "n"), ("95 % interval", "n")), rows, "Drop and its intervals")
    return join(shown, paragraph(note, "note"))
