"""Check the figures of a report against the files it tells of, without the package's own code.

    python benchmarks/check_report.py OUT.report.json --original IN.onnx --data DATA.npz

Counts, sizes, digest, predictions, drops with intervals, ratios and sums are made anew with onnx, numpy and a stock
onnxruntime; a line is printed for each figure that is off, and the exit code is 1 then. OUT.onnx lies beside the
report. What the report says about layout, scale, mean and std is taken from it; the metric must be top1. Not made anew:
live memory, latencies and seconds, of which only the ratios are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import onnx
from independent_count import count, observed_macs
from numpy.typing import NDArray
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from plain_runtime import predicted

Record: TypeAlias = dict[str, Any]
COSTS = ("params", "size_bytes", "macs", "memory_bytes", "latency_ms")
HALVES = 2  # the random stream that draws the deciding half, docs/method.md
NORMAL_95 = NormalDist().inv_cdf(0.975)


def faults(report: Record, original: Path, written: Path, data: Path) -> Iterator[str]:
    """One line for each figure of the report that is not what the files give."""
    last = report["stage2"] or report["stage1"] or report["original"]
    yield from _file_faults(report, last, original, written)
    yield from _drop_faults(report, last, original, written, data)
    for name in COSTS:
        before, after = report["original"][name], last[name]
        yield from _off(f"enhancement.{name}", report["enhancement"][name], before / after)
    yield from _layer_faults(report, last, original, written)
    yield from _candidate_faults(report)


def _off(name: str, said: Any, found: Any, tolerance: float = 1e-9) -> Iterator[str]:
    same = said == found
    if isinstance(said, (int, float)) and isinstance(found, (int, float)):
        same = math.isclose(said, found, rel_tol=tolerance, abs_tol=tolerance)
    if not same:
        yield f"{name}: the report says {said}, it is {found}"


def _file_faults(report: Record, last: Record, original: Path, written: Path) -> Iterator[str]:
    yield from _off("sha256", report["sha256"], hashlib.sha256(written.read_bytes()).hexdigest())
    for name, path, said in (("original", original, report["original"]), ("written", written, last)):
        yield from _off(f"{name}.size_bytes", said["size_bytes"], _size(path))
        params, macs = count(path, _shapes(report))
        yield from _off(f"{name}.params", said["params"], params)
        yield from _off(f"{name}.macs", said["macs"], macs)


def _size(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    stored = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    files = {path.parent / ExternalDataInfo(tensor).location for tensor in stored}
    return sum(file.stat().st_size for file in {path, *files})


def _shapes(report: Record) -> Mapping[str, list[int]]:
    found: Mapping[str, list[int]] = report["settings"]["input_shape"]
    return found


def _drop_faults(report: Record, last: Record, original: Path, written: Path, data: Path) -> Iterator[str]:
    if report["metric_name"] != "top1":
        yield f"metric_name: {report['metric_name']} cannot be checked, top1 can"
        return
    own = report["settings"]["data"]
    with np.load(data) as archive:
        images, labels = archive["x_test"], archive["y_test"]
        held_out = "x_val" in archive
    preprocess = (
        np.float32(own["scale"]),
        np.asarray(own["mean"] or [0], np.float32),
        np.asarray(own["std"] or [1], np.float32),
    )
    before, after = (predicted(path, images, own["layout"], preprocess, 128) for path in (original, written))
    right = before == labels, after == labels
    one = 50.0 / len(labels)  # half an example: another batch size may turn a tie
    for name, said, found in (("original", report["original"], right[0]), ("written", last, right[1])):
        if abs(said["metric"] - 100 * found.mean()) > one:
            yield f"{name}.metric: the report says {said['metric']}, it is {100 * found.mean()}"
    for name in ("drop", "enhancement.drop"):
        said = report["drop"] if name == "drop" else report["enhancement"]["drop"]
        yield from _off(name, said, report["original"]["metric"] - last["metric"])
    everything = np.arange(len(labels))
    order = np.random.default_rng([report["seed"], HALVES]).permutation(len(labels))
    halves = {"drop_interval": everything, "drop_report": everything}
    if not held_out:
        halves |= {"drop_report": order[len(labels) // 2 :], "drop_select": order[: len(labels) // 2]}
        yield from _off("deciding.count", report["deciding"]["count"], len(labels) // 2)
    for name, rows in halves.items():
        said = report[name]
        if said is None:
            continue
        wrong = 100.0 * (right[0][rows].astype(float) - right[1][rows])
        error = float(wrong.std(ddof=1)) / math.sqrt(len(rows))
        for end, shift in (("value", 0.0), ("low", -NORMAL_95), ("high", NORMAL_95)):
            yield from _off(f"{name}.{end}", said[end], float(wrong.mean()) + shift * error, 1e-6)
    yield from _agreement_faults(report["agreement"], before, after, labels)


def _agreement_faults(
    said: Record | None, before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any]
) -> Iterator[str]:
    if said is None:
        return
    first = slice(said["examples"])
    one, two = before[first] == labels[first], after[first] == labels[first]
    alike = 100.0 * float((before[first] == after[first]).mean())
    figures = {
        "value": alike,
        "both_right": int((one & two).sum()),
        "only_original": int((one & ~two).sum()),
        "only_compressed": int((two & ~one).sum()),
        "both_wrong": int((~one & ~two).sum()),
    }
    for name, found in figures.items():
        yield from _off(f"agreement.{name}", said[name], found)
    for pair in said["confusions"]:
        found = int(((before[first] == pair["original"]) & (after[first] == pair["compressed"])).sum())
        yield from _off(f"agreement.confusions {pair['original']}, {pair['compressed']}", pair["count"], found)


def _layer_faults(report: Record, last: Record, original: Path, written: Path) -> Iterator[str]:
    costs = {True: _node_costs(original, _shapes(report)), False: _node_costs(written, _shapes(report))}
    for row in report["layers"]:
        name = row["name"]
        # The original's graph may name its nodes otherwise, and normalization may have made the layer.
        if name in costs[True] and not report["normalization"]:
            params, macs = costs[True][name]
            yield from _off(f"layers '{name}'.params_before", row["params_before"], params)
            yield from _off(f"layers '{name}'.macs_before", row["macs_before"], macs)
        chain = f"{name}/{row['form']}."
        stages = [own for node, own in costs[False].items() if node == name or node.startswith(chain)]
        if not stages:
            yield f"layers '{name}': no node of the written model has this name with form {row['form']}"
            continue
        yield from _off(f"layers '{name}'.params_after", row["params_after"], sum(own[0] for own in stages))
        yield from _off(f"layers '{name}'.macs_after", row["macs_after"], sum(own[1] for own in stages))
        narrowed = row["narrowed_shape"]
        if narrowed is not None and not math.prod(narrowed) < math.prod(row["weight_shape"]):
            yield f"layers '{name}': narrowed to {narrowed} from {row['weight_shape']}"
        if row["form"] is not None and row["params_after"] >= row["params_before"]:
            yield f"layers '{name}': has a form and is not smaller"
    yield from _off("layers, sum of macs_after", sum(row["macs_after"] for row in report["layers"]), last["macs"])
    changed = any(row["form"] is not None or row["narrowed_shape"] is not None for row in report["layers"])
    yield from _off("compressed", report["compressed"], changed)


def _node_costs(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Elements of the initializers that each node reads, and its MACs, by its name; a MatMul has its Add's, too."""
    model = onnx.load(path)
    whole = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)  # where to gather from, and no parameters
    sizes = {own.name: math.prod(own.dims) for own in model.graph.initializer if own.data_type not in whole}
    products = {node.output[0]: node.name for node in model.graph.node if node.op_type == "MatMul"}
    macs, elements = observed_macs(model, shapes), {node.name: 0 for node in model.graph.node}
    for node in model.graph.node:
        product = next((products[own] for own in node.input if node.op_type == "Add" and own in products), node.name)
        elements[product] += sum(sizes.get(own, 0) for own in node.input)
    return {node.name: (elements[node.name], macs[node.output[0]]) for node in model.graph.node}


def _candidate_faults(report: Record) -> Iterator[str]:
    delta, limits = report["delta"], report["targets"]
    rows = [row for row in report["candidates"] if row["drop"] is not None]
    bases = {round(row["metric"] + row["drop"], 6) for row in rows}
    if len(bases) > 1:
        yield f"candidates: metric and drop add up to {sorted(bases)}; all are measured on the same images"
    for row in rows:
        if row["accepted"] and delta is not None and not limits and row["drop"] > delta:
            yield f"candidates '{row['name']}': accepted with a drop of {row['drop']}, delta is {delta}"
    if not report["compressed"]:
        return
    plan = {row["name"]: [row["form"], row["ranks"]] for row in report["layers"] if row["form"] is not None}
    same = [row for row in rows if {k: [v["form"], v["ranks"]] for k, v in row["plan"].items()} == plan]
    if not any(row["accepted"] for row in same):
        yield "layers: form and ranks are those of no accepted candidate"
    said = report["drop_select"]
    if delta is not None and not limits:
        error = (said["high"] - said["low"]) / (2 * NORMAL_95)
        bound = said["value"] + NormalDist().inv_cdf(report["settings"]["confidence"]) * error
        if bound > delta + 1e-9:
            yield f"drop_select: the drop may be {bound} at the confidence that was asked for, delta is {delta}"
    if same and not limits and report["objective"] in ("params", "macs"):
        written = report["stage2"] or report["stage1"]
        yield from _off("candidates, cost of the chosen one", same[-1]["cost"], written[report["objective"]])
        yield from _off("candidates, drop of the chosen one", same[-1]["drop"], said["value"], 1e-6)


def main() -> None:
    """Print what is off; exit code 1 where anything is."""
    parser = argparse.ArgumentParser(description="Check the figures of a report with stock onnxruntime.")
    parser.add_argument("report", type=Path, metavar="OUT.report.json")
    parser.add_argument("--original", type=Path, required=True, metavar="IN.onnx")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA.npz")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    written = arguments.report.with_name(arguments.report.name.removesuffix(".report.json") + ".onnx")
    found = list(faults(report, arguments.original, written, arguments.data))
    print("\n".join(found) or f"{arguments.report.name}: every figure checked is right")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
