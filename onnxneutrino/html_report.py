"""A report as one HTML page: no scripts, no other files, no network; light and dark, on a phone and on paper."""

from __future__ import annotations

from onnxneutrino.html_agreement import agreement
from onnxneutrino.html_elements import Html, element, escape
from onnxneutrino.html_layers import layers, sensitivity
from onnxneutrino.html_result import header, headline, results
from onnxneutrino.html_run import run
from onnxneutrino.html_search import search, training
from onnxneutrino.html_style import STYLE
from onnxneutrino.report import Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SECTIONS = (header, results, search, layers, sensitivity, training, agreement, run)


def to_html(report: Report) -> str:
    """Write the page; what the report does not have is left out, and the same report gives the same text."""
    body = element("main", *(part(report) for part in SECTIONS), _footer(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(f"{report.model}: {headline(report)}")}</title>
<style>
{STYLE}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _footer(report: Report) -> Html:
    version = report.versions.get("onnxneutrino", "")
    return element("footer", f"Written by onnxneutrino {version}".rstrip() + ".")
