"""Ours beside what a user would pick instead: equal wall time, cores, data, delta and search; the table `quality`.

Every method runs on every model in a process of its own, one after another (`quality_run.py`). A cell is one JSON file
in `--work`, named after what was asked for, so that a run continues where it was; the table is made from these files
alone. Without a folder of models the project's own digits are used.

    python benchmarks/quality.py [MODELS DATA] --work FOLDER --output FILE.md [--minutes 8] [--torch-python PYTHON]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import STARTING, Settings, add_models, kept_row, models_of, placed, run_process, written
from quality_table import METHODS, document

NEEDED = ("torch", "torch_pruning")


def main() -> None:
    """Run the cells that are missing, and write the table; exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description="Compare with other methods at equal time.")
    add_models(parser)
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1.0)
    parser.add_argument("--torch-python", metavar="PYTHON", help="interpreter with PyTorch and Torch-Pruning")
    options = parser.parse_args()
    settings = Settings(options.minutes, options.objective, options.delta, options.seed, options.threads)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in models_of(parser, options):
        for method in options.methods:
            rows.append(cell(method, model, options.data, work, settings, options.torch_python))
            print(f"{model.stem} {method}: {told(rows[-1])}", flush=True)
    written(document(rows, vars(settings)), options.output)
    if any("failed" in row for row in rows):
        sys.exit("a cell failed")


def cell(
    method: str, model: Path, data: Path | None, work: Path, settings: Settings, torch_python: str | None
) -> dict[str, Any]:
    """The row of one method and model, see `kept_row`; `skipped` says what it would need."""
    kept = work / f"{model.stem}.{method}.{settings.suffix}.json"
    about = {"method": method, "model": model.stem, "settings": vars(settings)}
    python = interpreter(torch_python) if method == "pruning" else sys.executable
    if not kept.is_file() and python is None:
        return {**about, "skipped": f"needs {', '.join(NEEDED)}: give --torch-python"}

    def made(target: Path) -> str | None:
        assert python is not None
        return run(command(python, method, placed(model, data, work), kept.with_suffix(".onnx"), target, settings))

    return kept_row(kept, about, made)


def interpreter(given: str | None) -> str | None:
    """The interpreter for pruning: the one given, else this one where it has what is needed; None for neither."""
    if given is None:
        return sys.executable if all(importlib.util.find_spec(name) for name in NEEDED) else None
    asked = f"import {', '.join(NEEDED)}, onnxneutrino"
    try:
        done = subprocess.run([given, "-c", asked], capture_output=True, check=False)
    except OSError:
        return None
    return given if done.returncode == 0 else None


def command(python: str, method: str, model: Path, target: Path, result: Path, settings: Settings) -> list[str]:
    """The command line of a cell."""
    script = Path(__file__).resolve().with_name("quality_run.py")
    return [python, str(script), method, str(model), str(target), str(result), *settings.arguments]


def run(arguments: Sequence[str]) -> str | None:
    """Run a cell; None when it went well, else the last line it wrote."""
    limit = next(float(own.partition("=")[2]) for own in arguments if own.startswith("--minutes=")) * 60
    return run_process(arguments, 3 * limit + STARTING)


def told(row: dict[str, Any]) -> str:
    """One line for the console."""
    if "result" not in row:
        return str(row.get("skipped") or row.get("failed"))
    gain = row["original"]["params"] / row["result"]["params"]
    return f"params {gain:.2f}x, drop {row['drop']:.2f}, {row['process_seconds']:.0f} s"


if __name__ == "__main__":
    main()
