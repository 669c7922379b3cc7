"""What each ingredient is worth: everything as it is, then one of them switched off at a time, at equal minutes.

Every variant runs `compress` on every model in a process of its own, in which `unittest.mock.patch` puts something
plain in the ingredient's place. Time that an ingredient costs is thereby given to the rest. A cell is one JSON file in
`--work`, so that a run continues where it was; the Markdown is made from these files alone. Without a folder of models
the project's own digits are used.

    python benchmarks/ablation.py [MODELS DATA] --work FOLDER --output FILE.md [--minutes 8] [--variants NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cells import (
    STARTING,
    Settings,
    add_models,
    kept_row,
    machine,
    models_of,
    placed,
    run_process,
    versions_line,
    write_row,
    written,
)
from quality_run import row_of, tell

from onnxneutrino import delivery, range_test
from onnxneutrino.config import load_config
from onnxneutrino.forms import decompose_all
from onnxneutrino.sensitivity import Curve
from onnxneutrino.teaching import Memory


@dataclass(frozen=True)
class Variant:
    """One ingredient switched off.

    Attributes:
        label: what the run is left with, for the table.
        patches: what stands in the place of a name of the package.
        options: of `compress`.
    """

    label: str
    patches: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def _one_form(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("svd",) if max(shape[2:]) == 1 else ("channel",)


def _without_interpolative(*given: Any) -> dict[str, Any]:
    return {form: fit for form, fit in decompose_all(*given).items() if form != "interpolative"}


def _no_curves(task: Any, layers: Mapping[str, Any], *given: Any) -> dict[str, Curve]:
    return dict.fromkeys(layers, Curve())


def _same(value: Any, *given: Any) -> Any:
    return value


PACKAGE = "onnxneutrino"
VARIANTS: Mapping[str, Variant] = {
    "full": Variant("everything"),
    "stage1": Variant("stage 1 alone", options={"stage": 1}),
    "narrow": Variant("no channels removed", {"conductor.narrow": _same}),
    "channel": Variant("one form, `channel`", {"forms.applicable": _one_form}),
    "interpolative": Variant("no form `interpolative`", {"layer_options.decompose_all": _without_interpolative}),
    "refit": Variant("no refit", {"workbench.Workbench._refitted": lambda own, network, name, goal: network}),
    "goal": Variant(
        "trained networks held to the original", {"workbench.Workbench._goal": lambda own, source: own.probe}
    ),
    "curvature": Variant("no K-FAC weighting", {"workbench.output_weightings": lambda task, teacher, seconds: {}}),
    "sensitivity": Variant(
        "no sensitivity, one plan", {"proposals.POWERS": (0.0,), "workbench.measured_sensitivities": _no_curves}
    ),
    "plans": Variant("one plan per proposal", {"proposals.POWERS": (0.5,)}),
    "balance": Variant("unbalanced factors", {"factor_fit.balanced": _same}),
    "rate": Variant("learning rate 1e-3", {"tuning.Tuner._found_rate": lambda *given: range_test.DEFAULT_RATE}),
    "labels": Variant("labels weigh 0.3", {"tuning.teacher_error": lambda drawn, batches: None}),
    "teacher": Variant("teacher alone", options={"labels": False}),
    "memory": Variant("answers not remembered", {"tuning.Memory": lambda: Memory(0)}),
    "gradients": Variant("stock gradient graph", {"finetune.faster_gradients": _same}),
    "trim": Variant("no trimming", {"search.trim": lambda *given: None}),
}


@contextlib.contextmanager
def switched_off(variant: Variant) -> Iterator[None]:
    """The package without an ingredient.

    Raises:
        AttributeError: the package has no such name any more.
    """
    with contextlib.ExitStack() as stack:
        for name, value in variant.patches.items():
            stack.enter_context(mock.patch(f"{PACKAGE}.{name}", value))
        yield


def cell(name: str, model: Path, target: Path, settings: Settings) -> dict[str, Any]:
    """The row of one variant and model, run in this process."""
    variant = VARIANTS[name]
    asked = {"time_limit": 60 * settings.minutes, **dataclasses.asdict(settings), **variant.options}
    del asked["minutes"]
    config = load_config(model, asked)
    with switched_off(variant):
        report = delivery.compress_file(model, target, config, tell)
    return {**row_of(report), "patched": list(variant.patches), "machine": machine(settings.threads)}


HEADING = """# What each ingredient is worth

Made by `python benchmarks/ablation.py`: `compress` with one ingredient switched off at a time. Objective {objective},
delta {delta:g} in the metric's units, {minutes:.3g} minutes for every cell, threads {threads}, seed {seed}. Ratios are
original / result. The drop is that on the whole test split with its paired 95 % interval. Steps are those of all
fine-tunes together, minutes those of the whole process. Without the sensitivities there is one plan per proposal too,
so that its line is to be compared with `one plan per proposal`.
"""

COLUMNS = "| variant | params ratio | MACs ratio | drop | 95 % interval | steps | minutes |"
ALIGNED = "|---|---:|---:|---:|---:|---:|---:|"


def document(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table for every model, and what was put in the place of which name; from the JSON of the cells alone."""
    lines = [HEADING.format(**settings).rstrip()]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += ["", f"## {model}", "", COLUMNS, ALIGNED, *map(table_line, own)]
        notes = [f"- {VARIANTS[row['variant']].label}: failed, {row['failed']}" for row in own if "failed" in row]
        notes += [
            f"- {VARIANTS[row['variant']].label}: no smaller network was accepted; the line is the original"
            for row in own
            if "failed" not in row and not row["compressed"]
        ]
        lines += ["", *notes] if notes else []
    lines += ["", "| variant | names patched, options |", "|---|---|"]
    for variant in (VARIANTS[name] for name in dict.fromkeys(row["variant"] for row in rows)):
        told = [*(f"`{name}`" for name in variant.patches), *(f"`{k}={v}`" for k, v in variant.options.items())]
        lines.append(f"| {variant.label} | {', '.join(told)} |")
    return "\n".join([*lines, "", f"Versions: {versions_line(rows)}."]) + "\n"


def table_line(row: Mapping[str, Any]) -> str:
    """One variant; one without a result has a line that says so."""
    label = VARIANTS[row["variant"]].label
    if "failed" in row:
        return f"| {label} | failed |" + " |" * 5
    before, after, spread = row["original"], row["result"], row["drop_interval"]
    cells = [
        label,
        *(f"{before[key] / after[key]:.2f}x" for key in ("params", "macs")),
        f"{row['drop']:.2f}",
        "-" if spread is None else f"{spread['low']:.2f} to {spread['high']:.2f}",
        str(sum(own["steps"] for own in row["report"]["training"])),
        f"{row['process_seconds'] / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the cells that are missing, and write the table; exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description="Compress with one ingredient switched off at a time.")
    add_models(parser)
    parser.add_argument("--variants", nargs="*", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1.0)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(options.minutes, options.objective, options.delta, options.seed, options.threads)
    if options.child is not None:
        target, result = options.child
        write_row(result, cell(options.variants[0], options.folder, target, settings))
        return
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in models_of(parser, options):
        for name in options.variants:
            kept = work / f"{model.stem}.ablation-{name}.{settings.suffix}.json"

            def made(result: Path, model: Path = model, name: str = name, kept: Path = kept) -> str | None:
                own = [str(placed(model, options.data, work)), f"--work={work}", f"--variants={name}"]
                files = ["--child", str(kept.with_suffix(".onnx")), str(result)]
                command = [sys.executable, __file__, *own, *settings.arguments, *files]
                return run_process(command, 3 * 60 * settings.minutes + STARTING)

            rows.append(kept_row(kept, {"variant": name, "model": model.stem, "settings": vars(settings)}, made))
            print(f"{model.stem} {name}: {rows[-1].get('failed', 'done')}", flush=True)
    written(document(rows, vars(settings)), options.output)
    if any("failed" in row for row in rows):
        sys.exit("a cell failed")


if __name__ == "__main__":
    main()
