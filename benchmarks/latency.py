"""Compare predicted with measured latency: what `--objective latency` promises, on whole networks.

Plans are allocated at several shares of the original's time, from all forms together and from one form alone, and for
comparison at the same shares of its multiply-accumulates as `--objective macs` would. Their networks are built with
random weights and no training, which time does not depend on, and measured in turn with the original: for each plan
the time the table predicts, and the one that a stock session takes.

    python benchmarks/latency.py MODEL.onnx ... [--seconds 30] [--threads 0] [--json FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from onnxneutrino import cost, prepare
from onnxneutrino.allocate import Option, allocate
from onnxneutrino.candidates import candidates, options, whole_point
from onnxneutrino.chain_graph import random_factors
from onnxneutrino.chain_latency import LatencyTable, measure
from onnxneutrino.config import load_config
from onnxneutrino.factors import Factors
from onnxneutrino.forms import applicable, full_ranks
from onnxneutrino.graph import load
from onnxneutrino.layer_options import Objective, cost_unit
from onnxneutrino.marking import mark
from onnxneutrino.passes.factorize import factorize
from onnxneutrino.plan import Choice, Form, Layer
from onnxneutrino.runtime import Runner, random_inputs

SHARES = (0.8, 0.65, 0.5, 0.4, 0.3)
ALONE: tuple[Form, ...] = ("channel", "spatial_vh", "tucker2")
TURN_SECONDS = 0.5


class Falling:
    """A fit whose error falls with the params, so that an allocation has something to choose from."""

    def __init__(self, form: Form, layer: Layer) -> None:
        self._form, self._layer = form, layer
        self.limit = full_ranks(form, layer.weight.shape)

    def errors(self, ranks: Sequence[tuple[int, ...]]) -> list[float]:
        """`exp(-4 r / R)` of the ranks, R the full ones."""
        return [
            math.exp(-4.0 * sum(r / top for r, top in zip(own, self.limit, strict=True)) / len(own)) for own in ranks
        ]

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """Random ones."""
        return random_factors(self._layer, Choice(self._form, ranks))

    def release(self) -> None:
        """Nothing is kept."""


def plan(layers: Sequence[Layer], objective: Objective, forms: Sequence[Form], share: float, rest: float) -> Any:
    """The allocation at a share of the original's cost; layers that cannot take one of the forms stay."""
    ladders: dict[str, list[Option]] = {}
    for layer in layers:
        unit = cost_unit(layer, objective)
        fits = {form: Falling(form, layer) for form in applicable(layer.weight.shape) if form in (*forms, "svd")}
        measured = unit if isinstance(objective, LatencyTable) else None
        found = candidates(layer, fits, measured)
        ladders[layer.name] = options(found, unit, layer.macs / max(own.macs for own in layers))
    total = rest + sum(cost_unit(layer, objective)(whole_point(layer)) for layer in layers)
    return allocate(ladders, share * total - rest)


def compare(path: Path, seconds: float, threads: int) -> dict[str, Any]:
    """Predicted and measured times of one model's plans."""
    config = load_config(None, {"data": "random", **({"threads": threads} if threads else {})})
    opened = prepare.open_model(load(path).model, path.name, config)
    inputs = random_inputs(opened.model, opened.shapes, 0)
    marked = mark(opened, [inputs], config)
    start = time.perf_counter()
    table = measure(marked.model, marked.layers, inputs, config.threads, seconds)
    spent = time.perf_counter() - start
    macs = cost.macs(marked.model, marked.types)
    other = macs - sum(layer.macs for layer in marked.layers)
    every: tuple[Form, ...] = ("channel", "input", "spatial_hv", "spatial_vh", "tucker2")
    wanted: list[tuple[str, Objective, Sequence[Form], float]] = [
        *(("latency, all forms", table, every, share) for share in SHARES),
        *((f"latency, {form}", table, (form,), share) for form in ALONE for share in SHARES[1::2]),
        *(("MACs, all forms", "macs", every, share) for share in SHARES[1::2]),
    ]
    rows: list[dict[str, Any]] = []
    for name, objective, forms, share in wanted:
        rest = table.rest if isinstance(objective, LatencyTable) else float(other)
        found: Mapping[str, Option] = plan(marked.layers, objective, forms, share, rest)
        choices = {own.name: found[own.name].choice for own in marked.layers}
        by_name = {own.name: own for own in marked.layers}
        factors = {key: random_factors(by_name[key], choice) for key, choice in choices.items() if choice is not None}
        model = factorize(marked.model, marked.layers, factors)
        own_macs = cost.macs(model, prepare.types_of(model, opened.shapes))
        predicted = table.rest + sum(table.layers[key].ms(choice) for key, choice in choices.items())
        before, after = in_turn([opened.model, model], inputs, config.threads)
        rows.append(
            {
                "plan": f"{name}, {share:g}",
                "macs_ratio": macs / own_macs,
                "predicted_ms": predicted if math.isfinite(predicted) else None,
                "measured_ms": after[0],
                "measured_median_ms": after[1],
                "original_ms": before[0],
                "predicted_speedup": table.total / predicted if math.isfinite(predicted) else None,
                "measured_speedup": before[0] / after[0],
                "median_speedup": before[1] / after[1],
            }
        )
    known = [row for row in rows if row["predicted_speedup"] is not None]
    predicted_all, measured_all = ([row[key] for row in known] for key in ("predicted_speedup", "measured_speedup"))
    return {
        "model": path.name,
        "layers": len(marked.layers),
        "threads": config.threads,
        "table_seconds": spent,
        "original_ms": table.total,
        "rest_ms": table.rest,
        "plans": rows,
        "spearman": float(spearmanr(predicted_all, measured_all).statistic),
        "median_ratio": median(after / before for before, after in zip(predicted_all, measured_all, strict=True)),
    }


def in_turn(models: Sequence[Any], inputs: Mapping[str, Any], threads: int) -> list[tuple[float, float]]:
    """The lower quartile and the median of the time of each model in ms, run in turn."""
    runners = [Runner(model, threads=threads, spinning=True) for model in models]
    times: list[list[float]] = [[] for _ in runners]
    end = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < end or len(times[0]) < 20:
        for series, runner in zip(times, runners, strict=True):
            runner(inputs)  # idle threads of the other session go to sleep meanwhile
            start = time.perf_counter()
            runner(inputs)
            series.append(1000.0 * (time.perf_counter() - start))
    return [(float(np.quantile(series[3:], 0.25)), median(series[3:])) for series in times]


def table_of(result: Mapping[str, Any]) -> str:
    """One model's plans as a Markdown table."""
    lines = [
        f"## {result['model']}",
        f"{result['layers']} layers, {result['threads']} threads, original {result['original_ms']:.3f} ms of which "
        f"{result['rest_ms']:.3f} are not in layers; table measured in {result['table_seconds']:.1f} s. Measured over "
        f"predicted speed-up: median {result['median_ratio']:.2f}, Spearman {result['spearman']:.2f}.",
        "",
        "| plan | MACs | predicted | lower quartile | median time |",
        "|---|---:|---:|---:|---:|",
    ]
    lines.extend(
        f"| {row['plan']} | {row['macs_ratio']:.2f}x | {_ratio(row['predicted_speedup'])} | "
        f"{row['measured_speedup']:.2f}x | {row['median_speedup']:.2f}x |"
        for row in result["plans"]
    )
    return "\n".join(lines) + "\n"


def _ratio(value: float | None) -> str:
    """A speed-up; ranks that the table does not hold have no time."""
    return "-" if value is None else f"{value:.2f}x"


def main() -> None:
    """Measure the models one after the other."""
    parser = argparse.ArgumentParser(description="Predicted and measured latency of plans.")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the table of one model")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 for the default of the command line")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    parser.add_argument("--output", type=Path, help="write the tables as Markdown; else to standard output")
    arguments = parser.parse_args()
    results = [compare(path, arguments.seconds, arguments.threads) for path in arguments.models]
    text = "\n".join(table_of(result) for result in results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
