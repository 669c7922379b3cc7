"""A run in three lines of plain words: what was achieved, what limited it, what to try next. All from its report."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from onnxneutrino.formats import format_metric, format_percent, format_ratio
from onnxneutrino.report import COST_FIELDS, REFUSED, CandidateRow, Report, ratio

UNCERTAIN = 0.5  # of delta, that the uncertainty of the drop alone takes
FROZEN = 0.5  # of what is left, in layers that stay as they are
NORMAL_95 = NormalDist().inv_cdf(0.975)


class Verdict(NamedTuple):
    """One sentence each."""

    achieved: str
    limited: str
    advice: str


def verdict(report: Report) -> Verdict:
    """The three lines about a finished run."""
    return Verdict(_achieved(report), *_limits(report))


def _achieved(report: Report) -> str:
    gain = report.enhancement
    within = "" if report.delta is None else f" within delta {format_metric(report.delta)}"
    if not report.compressed or gain is None:
        met = report.targets and not report.missed()
        why = "The original meets all hard targets" if met else f"No smaller model stays{within}"
        return f"{why}: the normalized original was written."
    gains = ((gain.params, "fewer params"), (gain.macs, "fewer MACs"), (gain.size_bytes, "smaller on disk"))
    told = ", ".join(f"{format_ratio(value)} {what}" for value, what in gains if value >= 1.005)
    allowed = "" if report.delta is None else f", {format_metric(report.delta)} is allowed"
    return f"{told or 'Nothing became smaller'}; {report.metric_name} drops by {format_metric(gain.drop)}{allowed}."


def _limits(report: Report) -> tuple[str, str]:
    """What kept the network from becoming smaller, and what to do about it: the most telling reason."""
    if report.targets and not report.missed():
        return "Hard targets: they are met, and the least drop was looked for.", "Lower targets give a smaller model."
    if any(row.least is not None and row.least > row.limit for row in report.missed()):
        return "Hard targets: not even the smallest plan meets them.", "Larger targets; `analyze` says what is frozen."
    limit = report.settings.get("time_limit")
    longer = f"More time: --time-limit {_minutes(limit)}"
    if report.settings.get("trainer") == "none":
        return "Nothing was trained (--trainer none).", "The same without --trainer none: training brings most of it."
    if not report.training:
        return "Time: no network was trained.", f"{longer}."
    uncertainty, count = _uncertainty(report), report.deciding.count if report.deciding else 0
    if report.delta and uncertainty > UNCERTAIN * report.delta:
        return (
            f"The {count} deciding images: chance alone moves the drop by ± {format_metric(uncertainty)}.",
            "More images to decide with (x_val and y_val), or a larger --delta.",
        )
    left = sum(layer.params_after for layer in report.layers)
    frozen = sum(layer.params_after for layer in report.layers if layer.reason is not None)
    if report.objective in ("params", "size") and left and frozen > FROZEN * left:
        return (
            f"Frozen layers: {format_percent(frozen / left)} of what is left is in layers that stay as they are.",
            "`onnxneutrino analyze` says why each is frozen; --exclude and --only leave layers alone.",
        )
    refused = _next_refused(report)
    if refused is not None and report.delta is not None:
        whole = getattr(report.original, COST_FIELDS[report.objective])
        size = "" if report.targets else f", {format_ratio(ratio(whole, refused.cost))} smaller,"
        if refused.note.startswith(REFUSED):
            return (
                f"Your function: the next network tried{size} was {refused.note}.",
                "Look at what it asks for.",
            )
        return (
            f"Delta: the next network tried{size} lost {format_metric(refused.drop)}.",
            f"{longer}. Or a larger --delta.",
        )
    return "Time: the smallest network that was trained was accepted.", f"{longer}."


def _uncertainty(report: Report) -> float:
    """What is added to the drop on the deciding images before it is compared with delta."""
    drop = report.drop_select
    if drop is None:
        return 0.0
    confidence = float(report.settings.get("confidence", 0.8))
    return NormalDist().inv_cdf(confidence) * (drop.high - drop.value) / NORMAL_95


def _next_refused(report: Report) -> CandidateRow | None:
    """The largest trained network that was refused, of those smaller than the smallest accepted."""
    accepted = min((row.cost for row in report.candidates if row.accepted), default=math.inf)
    refused = [row for row in report.candidates if row.accepted is False and row.trained and row.cost < accepted]
    return max(refused, key=lambda row: row.cost, default=None)


def _minutes(limit: object) -> str:
    """Twice the limit in whole minutes; an hour where it is not known."""
    return f"{max(math.ceil(2 * limit / 60), 1)}m" if isinstance(limit, (int, float)) else "60m"
