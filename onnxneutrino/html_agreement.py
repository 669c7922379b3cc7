"""Original and compressed network on the same examples, in the HTML report."""

from __future__ import annotations

from onnxneutrino.formats import format_exact, format_percent
from onnxneutrino.html_elements import Html, element, figure, folded, join, paragraph, section, table
from onnxneutrino.plots_agreement import confusion_map
from onnxneutrino.report import Agreement, Report

FREQUENT = 20


def agreement(report: Report) -> Html:
    """The share that agrees, right and wrong against right and wrong, and where the classes differ."""
    own = report.agreement
    if own is None:
        return Html()
    share, count = format_percent(own.value / 100), format_exact(own.examples)
    told = (
        f"The networks give the same class for {share} of the first {count} test examples."
        if own.classes
        else f"The outputs on the first {count} test examples agree to {share}: 100 % less their relative error."
    )
    drawing = confusion_map(own, "agree")
    beside = join(_quadrants(own), _disagreements(own, drawn=bool(drawing)))
    if not drawing:
        return section("Agreement with the original", paragraph(told), beside)
    caption = "Disagreements are orange, the stronger the more frequent; agreement is grey."
    drawn = element("div", figure(drawing, caption), element("div", beside), class_="pair")
    return section("Agreement with the original", paragraph(told), drawn)


def _quadrants(own: Agreement) -> Html:
    counts = (own.both_right, own.only_original, own.only_compressed, own.both_wrong)
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return Html()
    whole = sum(known)
    right, lost, gained, wrong = (
        f"{format_exact(count)} ({format_percent(count / whole if whole else None)})" for count in known
    )
    columns = (("", "short"), ("Compressed right", "n"), ("Compressed wrong", "n"))
    rows = [["Original right", right, lost], ["Original wrong", gained, wrong]]
    return table(columns, rows, "Right and wrong of both networks")


def _disagreements(own: Agreement, drawn: bool) -> Html:
    pairs = sorted((pair for pair in own.confusions if pair.original != pair.compressed), key=lambda pair: -pair.count)
    if not pairs:
        return Html()
    rows = [[str(pair.original), str(pair.compressed), format_exact(pair.count)] for pair in pairs[:FREQUENT]]
    columns = (("Original says class", "n"), ("Compressed says", "n"), ("Examples", "n"))
    title = "Most frequent disagreements"
    shown = table(columns, rows, title)
    return folded(title, shown) if drawn else join(element("h3", title), shown)
