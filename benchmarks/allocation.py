"""Whether a prediction ranks plans: about twenty plans of equal budget, predicted and measured, and rank correlations.

For every model two costs are taken, at which an untrained network loses about 2 and about 5 points. At each, plans are
allocated with every layer's losses multiplied by a random factor of its own (log-normal), from the three surrogates of
`proposals` in turn so that none of them is favoured; the plans are realized (factors and refit, no training) and
measured on the whole test split. Spearman's correlation with the measured drop is given for each prediction. One JSON
file for every model, with all pairs; the table is made from these alone.

    python benchmarks/allocation.py [MODELS DATA] --work FOLDER --output FILE.md [--plans 20]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import add_models, kept_row, machine, models_of, placed, run_process, versions_line, write_row, written
from numpy.typing import NDArray
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits

from onnxneutrino import conductor, metrics, prepare
from onnxneutrino.allocate import Option, allocate
from onnxneutrino.bench import Candidate, drops_by_cost
from onnxneutrino.config import load_config
from onnxneutrino.data import Split, deciding
from onnxneutrino.graph import load
from onnxneutrino.ladder import Ladder
from onnxneutrino.looks import metric_rows
from onnxneutrino.marking import mark
from onnxneutrino.proposals import POWERS, predicted
from onnxneutrino.summary import versions
from onnxneutrino.task import Task
from onnxneutrino.workbench import Workbench

DROPS = (2.0, 5.0)
SPREAD = 1.0  # standard deviation of the logarithm of a layer's factor
DRAWS = 20
FIRST_RATIO, RATIO_STEP, LADDER_STEPS = 1.5, 1.4, 14
CALIBRATION_SECONDS = 60.0
LIMIT = 3600.0
PREDICTIONS: Mapping[str, str] = {
    "power 0": "summed relative error",
    "power 0.5": "sum of the geometric means of both",
    "power 1": "summed predicted divergence",
    "divergence": "whole model's divergence",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """A task, the whole test split, and the original's metric statistics on it."""

    task: Task
    test: Split
    rows: NDArray[Any]

    def drop(self, candidate: Candidate) -> tuple[metrics.Drop, tuple[float, float]]:
        """The drop of a network on the whole split, and on every second example, from the first and the second on."""
        own = metric_rows(self.task, candidate.network, self.test)

        def lost(rows: NDArray[Any], own: NDArray[Any]) -> metrics.Drop:
            return metrics.drop(self.task.metric, rows, own, seed=self.task.seed)

        halves = lost(self.rows[::2], own[::2]).value, lost(self.rows[1::2], own[1::2]).value
        return lost(self.rows, own), halves


def judged_task(model: Path, objective: str, seed: int, threads: int) -> Judged:
    """The model as `compress` sees it when its search begins."""
    config = load_config(model, {"objective": objective, "seed": seed, "threads": threads})
    opened = prepare.open_model(load(model).model, model.name, config)
    config, metric, dataset = prepare.settled(opened, config)
    judges = deciding(dataset, config.seed, config.data.path)
    marked = mark(opened, prepare.first_examples(dataset.test, conductor.SAMPLES), config)
    batch = prepare.evaluation_batch(opened) if marked.freed else 1
    rows = prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched)
    task = conductor.make_task(marked, config, metric, dataset, judges, rows, batch)
    return Judged(conductor.with_training(task, config, []), judges.test, rows)


def costs_at(judged: Judged, bench: Workbench) -> dict[float, float]:
    """The cost at which an untrained network loses each of `DROPS`, from a ladder of them."""
    made: list[Candidate] = []
    ratio = FIRST_RATIO
    for _ in range(LADDER_STEPS):
        candidate = bench.propose(None, max(bench.full_cost / ratio, bench.least_cost), f"{ratio:.1f}x")
        made.append(dataclasses.replace(candidate, drop=judged.drop(candidate)[0]))
        drop = made[-1].drop
        if (drop is not None and drop.value > DROPS[-1]) or bench.full_cost / ratio <= bench.least_cost:
            break
        ratio *= RATIO_STEP
    ladder = Ladder.of(bench.full_cost, drops_by_cost(made), 1.0)
    return {drop: max(ladder.cost(drop), bench.least_cost) for drop in DROPS}


def perturbed_plans(
    options: Mapping[str, Sequence[Option]], curves: Mapping[str, Any], budget: float, count: int, seed: int
) -> list[dict[str, Option]]:
    """Different plans within one budget; fewer than asked for where 20 times as many draws give no more.

    Args:
        options: of every layer, loss = relative output error.
        curves: divergence at the output over each layer's relative error.
        budget: in the unit of the options.
        count: how many; plans that come again are left out.
        seed: of the factors.
    """
    plans: list[dict[str, Option]] = []
    own_options = {layer: {option.choice: option for option in own} for layer, own in options.items()}
    generator = np.random.default_rng(seed)
    for index in range(DRAWS * count):
        if len(plans) == count:
            break
        power = POWERS[index % len(POWERS)]
        factors = np.exp(SPREAD * generator.standard_normal(len(options)))
        weighted = {
            layer: [dataclasses.replace(o, loss=factor * predicted(o.loss, curves[layer], power)) for o in own]
            for (layer, own), factor in zip(options.items(), factors, strict=True)
        }
        plan = {layer: own_options[layer][option.choice] for layer, option in allocate(weighted, budget).items()}
        if plan not in plans:
            plans.append(plan)
    return plans


def predictions(plan: Mapping[str, Option], curves: Mapping[str, Any]) -> dict[str, float]:
    """The three sums of a plan, by the names of `PREDICTIONS`."""
    return {
        f"power {power:g}": math.fsum(predicted(o.loss, curves[layer], power) for layer, o in plan.items())
        for power in sorted(POWERS)
    }


def measure(model: Path, objective: str, plans: int, seed: int, threads: int) -> dict[str, Any]:
    """Pairs of all predictions and measured drops of one model, at each cost."""
    with threadpool_limits(limits=1, user_api="blas"):  # as `compress` does
        judged = judged_task(model, objective, seed, threads)
        bench = Workbench(judged.task, CALIBRATION_SECONDS)
        options, rest = bench.options(None)
        curves = bench.sensitivities()
        found = []
        for aimed, cost in costs_at(judged, bench).items():
            pairs = []
            for number, plan in enumerate(perturbed_plans(options, curves, cost - rest, plans, seed)):
                candidate = bench.realize(None, plan, f"plan {number}")
                drop, halves = judged.drop(candidate)
                pairs.append(
                    {
                        "cost": candidate.cost,
                        **predictions(plan, curves),
                        "divergence": candidate.divergence,
                        "drop": drop.value,
                        "standard_error": drop.standard_error,
                        "halves": halves,
                    }
                )
                print(f"{cost:.0f}: {number} {candidate.divergence:.4f} {drop.value:.2f}", file=sys.stderr, flush=True)
            found.append({"aimed_drop": aimed, "cost": cost, "ratio": bench.full_cost / cost, "pairs": pairs})
        metric, value = judged.task.metric.name, metrics.value(judged.task.metric, judged.rows)
    return {"metric": metric, "original": value, "budgets": found, "versions": versions(), "machine": machine(threads)}


def correlation(pairs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Spearman's correlation of a prediction with the measured drop."""
    return float(spearmanr([pair[name] for pair in pairs], [pair["drop"] for pair in pairs]).statistic)


def ceiling(pairs: Sequence[Mapping[str, Any]]) -> float:
    """What a perfect prediction could reach, for the drops are measured on a finite test split.

    The correlation between the drops on its two halves is `r`; that of the drop on the whole split with the true one is
    then `√(2r / (1 + r))` (Spearman 1910, Brown 1910).
    """
    first, second = zip(*(pair["halves"] for pair in pairs), strict=True)
    between = max(float(spearmanr(first, second).statistic), 0.0)
    return math.sqrt(2 * between / (1 + between))


def interval(correlation: float, count: int) -> tuple[float, float]:
    """95 % interval of Spearman's correlation: `artanh ρ ± 1.96 √(1.06 / (n - 3))` (Fieller et al. 1957)."""
    if count <= 3:
        return -1.0, 1.0
    if abs(correlation) >= 1:
        return correlation, correlation
    half = 1.96 * math.sqrt(1.06 / (count - 3))
    return math.tanh(math.atanh(correlation) - half), math.tanh(math.atanh(correlation) + half)


HEADING = """# Does the prediction rank plans?

Made by `python benchmarks/allocation.py`; what is done stands in `benchmarks/README.md`. Objective {objective},
seed {seed}. Spearman's correlation of each prediction with the drop on the whole test split, over plans of equal budget
that are refitted and not trained. Power 0 is the summed relative error, power 1 the summed predicted divergence, 0.5
the sum of their geometric means; divergence is that of the whole refitted network, with the 95 % interval of its
correlation. A perfect prediction would reach about the ceiling, for the drops are measured on a finite split.
"""


def document(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """The correlations, and what each prediction would have picked; from the JSON of the cells alone."""
    lines = [
        HEADING.format(**settings),
        "| model | ratio | plans | drop, least to most | power 0 | power 0.5 | power 1 | divergence | 95 % interval "
        "| ceiling |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    picked = [
        "| model | ratio | least | median | by power 0 | by power 0.5 | by power 1 | by divergence |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    reached = []
    for row in rows:
        for budget in row.get("budgets", ()):
            pairs = budget["pairs"]
            drops = sorted(pair["drop"] for pair in pairs)
            found = {name: correlation(pairs, name) for name in PREDICTIONS}
            reached.append(found["divergence"])
            low, high = interval(found["divergence"], len(pairs))
            start = f"| {row['model']} | {budget['ratio']:.1f}x |"
            cells = [f"{value:.2f}" for value in found.values()]
            lines.append(
                f"{start} {len(pairs)} | {drops[0]:.2f} to {drops[-1]:.2f} | {' | '.join(cells)} "
                f"| {low:.2f} to {high:.2f} | {ceiling(pairs):.2f} |"
            )
            taken = [min((pair[name], pair["drop"]) for pair in pairs)[1] for name in PREDICTIONS]
            cells = [f"{drop:.2f}" for drop in (drops[0], float(np.median(drops)), *taken)]
            picked.append(f"{start} {' | '.join(cells)} |")
        if "failed" in row:
            lines.append(f"| {row['model']} | failed: {row['failed']} |" + " |" * 8)
    if reached:
        met = sum(value >= 0.9 for value in reached)
        lines += ["", f"After re-scoring by the whole model's divergence at least 0.9 in {met} of {len(reached)}."]
    told = "Drop of the plan that each prediction would take, beside the least and the median drop:"
    return "\n".join([*lines, "", told, "", *picked, "", f"Versions: {versions_line(rows)}."]) + "\n"


def main() -> None:
    """Measure the models that are missing, and write the table; exit code 1 where one failed."""
    parser = argparse.ArgumentParser(description="How well predictions rank plans of equal budget.")
    add_models(parser)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("objective", "plans", "seed", "threads")}
    if options.child is not None:
        write_row(options.child, measure(options.folder, **settings))
        return
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in models_of(parser, options):
        kept = work / f"{model.stem}.{'.'.join(f'{name}{value}' for name, value in settings.items())}.json"

        def made(target: Path, model: Path = model) -> str | None:
            own = [str(placed(model, options.data, work)), f"--work={work}", f"--child={target}"]
            asked = [f"--{name}={value}" for name, value in settings.items()]
            return run_process([sys.executable, __file__, *own, *asked], LIMIT)

        rows.append(kept_row(kept, {"model": model.stem, "settings": settings}, made))
        print(f"{model.stem}: {rows[-1].get('failed', 'done')}", flush=True)
    written(document(rows, settings), options.output)
    if any("failed" in row for row in rows):
        sys.exit("a model failed")


if __name__ == "__main__":
    main()
