"""Views of the data for a terminal: the paper's Table 1, the layer and profile tables.

Every function turns values into something that rich can render.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxneutrino.cost import NodeCost
from onnxneutrino.formats import (
    format_bytes,
    format_count,
    format_interval,
    format_metric,
    format_ms,
    format_ratio,
    format_seconds,
    format_shape,
)
from onnxneutrino.plan import FORMS
from onnxneutrino.report import (
    COST_FIELDS,
    Agreement,
    Enhancement,
    Interval,
    Report,
    SixMetrics,
    TargetRow,
    enhancement,
    ratio,
)
from onnxneutrino.verdict import verdict

STAGE_NAME = re.compile(rf"/({'|'.join(FORMS)})\.\w+$")
OUTLOOK_DROP = 3.0  # deltas: about what training brings back
UNITS = {"params": "params", "macs": "MACs", "size": "bytes", "memory": "bytes of memory", "latency": "ms"}
COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("Size", "size_bytes", format_bytes),
    ("MACs", "macs", format_count),
    ("#Params", "params", format_count),
    ("Memory", "memory_bytes", format_bytes),
    ("Latency", "latency_ms", format_ms),
)


@dataclasses.dataclass(frozen=True)
class AnalyzedLayer:
    """One row of `analyze`: the forms a layer can take, or the reason why it is frozen.

    `sensitivity` is the relative output error at half the layer's params; None where it was not measured.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    params: int
    macs: int
    forms: tuple[str, ...]
    sensitivity: float | None
    reason: str | None


def summary(report: Report) -> RenderableType:
    """Show a report in the shape of the paper's Table 1, then the drop, a sentence and the warnings."""
    rows = {"Original": report.original, "Stage 1": report.stage1, "Stage 2": report.stage2}
    table = _table_1(report.metric_name, rows, report.enhancement)
    lines = [Text(line) for line in _drop_lines(report)]
    lines.extend(Text(line) for line in _block_lines(report))
    lines.extend(Text(f"Warning: {warning}") for warning in report.warnings)
    return Group(table, *lines, Text(), *_verdict_lines(report))


def _verdict_lines(report: Report) -> list[RenderableType]:
    """Three lines of plain words, wrapped beside their titles."""
    grid = Table.grid(padding=(0, 1))
    for title, sentence in zip(("Achieved:", "Limited by:", "To try:"), verdict(report), strict=True):
        grid.add_row(Text(title, style="bold"), Text(sentence))
    return [grid]


def _block_lines(report: Report) -> list[str]:
    """A line about the layers that were trained by reconstruction; none where all were trained end to end."""
    blocks = [block for block in report.blocks if block.how == "reconstruction"] if report.training else []
    if not blocks:
        return []
    layers = sum(len(block.layers) for block in blocks)
    kinds = sorted({kind for block in blocks for kind in block.ended_by})
    why = f", because no gradient passes {', '.join(kinds)}" if kinds else ""
    what = f"{layers} layer{'s' * (layers > 1)} in {len(blocks)} block{'s' * (len(blocks) > 1)}"
    return [f"{what} learned the original's tensors{why}."]


def missed(report: Report) -> str:
    """One line about the hard targets that the written model does not meet; empty where it meets all."""
    forms = {attribute: form for _, attribute, form in COSTS}

    def told(row: TargetRow) -> str:
        form, field = forms[COST_FIELDS[row.name]], COST_FIELDS[row.name]
        value = f"{row.name} {form(getattr(report.written, field))} instead of {form(row.limit)}"
        out_of_reach = row.least is not None and row.least > row.limit
        return f"{value} (the smallest plan has about {form(row.least)})" if out_of_reach else value

    rows = report.missed()
    within = "" if report.delta is None else f" within delta {format_metric(report.delta)}"
    what = f"hard target{'s' * (len(rows) > 1)} not met{within}"
    return f"{what}: {', '.join(map(told, rows))}; the best model found was written" if rows else ""


def outlook(report: Report) -> RenderableType:
    """Show what a dry run found and what would follow: the layers, the time, and a rough size within reach."""
    marked = [layer for layer in report.layers if layer.reason is None]
    training = report.settings["trainer"] != "none"
    lines = [
        f"{report.model}: {short_metric(report.metric_name)} {format_metric(report.original.metric)}, "
        f"{format_count(report.original.params)} params, {format_count(report.original.macs)} MACs.",
        f"{len(marked)} of {len(report.layers)} layers can be factorized, "
        f"{format_count(sum(layer.params_before for layer in marked))} params in them.",
        _reach(report, training),
    ]
    if training:
        spent = sum(report.seconds.values())
        left = max(float(report.settings["time_limit"]) - spent, 0.0)
        lines.append(
            f"This took {format_seconds(spent)}; training and verifying would take up to {format_seconds(left)}."
        )
    lines.append("Dry run: nothing was written.")
    lines.extend(f"Warning: {warning}" for warning in report.warnings)
    return Group(*map(Text, lines))


def _reach(report: Report, training: bool) -> str:
    """The size that a dry run's untrained plans promise; with hard targets, what the plan for them loses."""
    plans = [row for row in report.candidates if row.drop is not None]
    if report.targets:
        if not plans:
            return "The original meets all hard targets."
        nearest = min(plans, key=lambda row: row.cost)
        kept = "meets" if nearest.cost <= 1 else f"comes to {nearest.cost:.2f} times"
        return f"The plan for the hard targets {kept} them, untrained with a drop of {format_metric(nearest.drop)}."
    assert report.delta is not None
    goal, within = (OUTLOOK_DROP, "three delta") if training else (1.0, "delta")
    close = [row for row in plans if row.drop is not None and row.drop <= goal * report.delta]
    if not close:
        return f"No untrained plan of {len(plans)} is within {within}: little will be gained; try a larger --delta."
    smallest = min(close, key=lambda row: row.cost)
    gain = format_ratio(ratio(getattr(report.original, COST_FIELDS[report.objective]), smallest.cost))
    return (
        f"Roughly within reach: {gain} fewer {UNITS[report.objective]}, the smallest plan whose untrained drop "
        f"({format_metric(smallest.drop)}) is within {within}."
    )


def layer_table(layers: Sequence[AnalyzedLayer]) -> RenderableType:
    """Show what `analyze` found: every layer, marked with its forms or frozen with the reason."""
    table = Table(box=None, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    table.add_column("Op", no_wrap=True)
    table.add_column("Weight", no_wrap=True)
    table.add_column("#Params", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    measured = any(layer.sensitivity is not None for layer in layers)
    if measured:
        table.add_column("Sens.", justify="right", no_wrap=True)
    table.add_column("Forms or reason", overflow="fold")
    for layer in layers:
        what = f"frozen: {layer.reason}" if layer.reason is not None else ", ".join(layer.forms)
        cells = [layer.name, layer.op, format_shape(layer.weight_shape)]
        cells += [format_count(layer.params), format_count(layer.macs)]
        cells += [format_metric(layer.sensitivity)] if measured else []
        table.add_row(*map(Text, (*cells, what)))
    marked = [layer for layer in layers if layer.reason is None]
    return Group(
        table,
        Text(
            f"{len(marked)} of {len(layers)} layers marked, "
            f"{format_count(sum(layer.params for layer in marked))} of "
            f"{format_count(sum(layer.params for layer in layers))} params in them."
        ),
    )


def profile_table(
    metric_name: str,
    original: SixMetrics,
    nodes: Sequence[NodeCost],
    other: SixMetrics | None = None,
    other_nodes: Sequence[NodeCost] = (),
) -> RenderableType:
    """Show the six metrics of a model in all, and params and MACs by node; beside another model where given.

    Nodes of a chain (`conv1/tucker2.0`, ...) stand together under the name of the layer they replace; nodes
    without params and MACs are left out.
    """
    whole = _table("", "Original", *(("Other", "Ratio") if other else ()))
    gain = enhancement(original, other, None) if other else None
    drop = [format_metric(other.metric), "-"] if other else []
    whole.add_row(short_metric(metric_name), format_metric(original.metric), *drop)
    for title, attribute, form in COSTS:
        more = [form(getattr(other, attribute)), format_ratio(getattr(gain, attribute))] if other else []
        whole.add_row(title, form(getattr(original, attribute)), *more)
    return Group(whole, Text(), _node_table(nodes, other_nodes if other else None))


def comparison_table(
    original: SixMetrics, other: SixMetrics, metric_name: str, drop: Interval, examples: int, alike: Agreement | None
) -> RenderableType:
    """Show two models in the shape of the paper's Table 1, the drop with its interval, and how often they agree."""
    rows = {"Original": original, "Other": other}
    table = _table_1(metric_name, rows, enhancement(original, other, drop.value))
    lines = [Text(f"Drop on {examples} test examples: {format_interval(drop)}.")]
    if alike is not None:
        what = "same class" if alike.classes else "agreement of the outputs"
        lines.append(Text(f"On {alike.examples} of them: {what} {alike.value:.2f} %."))
    return Group(table, *lines)


def _node_table(nodes: Sequence[NodeCost], others: Sequence[NodeCost] | None) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("Node", overflow="fold")
    table.add_column("Op", no_wrap=True)
    titles = (
        ("#Params", "MACs", "Output") if others is None else ("#Params", "Other", "Ratio", "MACs", "Other", "Ratio")
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    first, second = _by_layer(nodes), _by_layer(others or ())
    for name in {**first, **second}:
        here, there = first.get(name), second.get(name)
        cells = [name, " ".join(dict.fromkeys(node.op for node in here or there or ()))]
        if others is None:
            shape = format_shape(here[-1].output_shape) if here else "-"
            cells += [format_count(_total(here, "params")), format_count(_total(here, "macs")), shape]
        else:
            for attribute in ("params", "macs"):
                before, after = _total(here, attribute), _total(there, attribute)
                both = None if before is None or after is None else ratio(before, after)
                cells += [format_count(before), format_count(after), format_ratio(both)]
        table.add_row(*map(Text, cells))
    return table


def _by_layer(nodes: Sequence[NodeCost]) -> dict[str, list[NodeCost]]:
    """Nodes that cost something, the stages of a chain under the name of their layer."""
    grouped: dict[str, list[NodeCost]] = {}
    for node in nodes:
        if node.params or node.macs:
            grouped.setdefault(STAGE_NAME.sub("", node.name), []).append(node)
    return grouped


def _total(nodes: Sequence[NodeCost] | None, attribute: str) -> int | None:
    return None if nodes is None else sum(getattr(node, attribute) for node in nodes)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if index else "left", no_wrap=True)
    return table


def _table_1(metric_name: str, rows: Mapping[str, SixMetrics | None], gain: Enhancement | None) -> Table:
    """The six metrics of each network that there is, by its title, and below what was gained."""
    table = _table("", short_metric(metric_name), *(title for title, _, _ in COSTS))
    for name, metrics in rows.items():
        if metrics is not None:
            table.add_row(name, format_metric(metrics.metric), *_costs(metrics))
    if gain is not None:
        ratios = (format_ratio(getattr(gain, attribute)) for _, attribute, _ in COSTS)
        table.add_row("Enh.", f"drop {format_metric(gain.drop)}", *ratios)
    return table


def _costs(metrics: SixMetrics) -> list[str]:
    return [form(getattr(metrics, attribute)) for _, attribute, form in COSTS]


def short_metric(metric_name: str) -> str:
    """A metric's name as a column title: of `file.py:function` the function, cut at twelve letters."""
    return metric_name.rsplit(":", 1)[-1][:12]


def _drop_lines(report: Report) -> list[str]:
    lines = []
    if report.drop_interval is not None:
        whole = format_interval(report.drop_interval)
        allowed = "" if report.delta is None else f", delta {format_metric(report.delta)}"
        lines.append(f"Drop on the whole test split: {whole}{allowed}.")
    if report.drop_select is not None:
        source = report.deciding.source if report.deciding else "the deciding images"
        lines.append(f"Decided on {source}: {format_interval(report.drop_select)}.")
    if report.drop_report is not None:
        lines.append(f"Reported on the other images: {format_interval(report.drop_report)}.")
    return lines
