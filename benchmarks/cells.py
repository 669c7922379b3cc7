"""What the benchmarks share that run in cells: a process for each, its figures kept as JSON, a table made of them.

A cell is one JSON file in `--work`, named after what was asked for, so that a run continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODELS = (
    "cifar10_vgg",
    "cifar10_resnet20_akamaster_bn",
    "cifar10_marabou_large_tf2onnx",
    "cifar10_biasfield_base",
)
STARTING = 300.0  # seconds that a process may take beyond its limit before it is given up


@dataclass(frozen=True)
class Settings:
    """What is the same for all cells of a comparison at equal time."""

    minutes: float
    objective: str
    delta: float
    seed: int
    threads: int

    @property
    def suffix(self) -> str:
        """For file names."""
        parts = f"{self.minutes:g}m", self.objective, f"delta{self.delta:g}", f"seed{self.seed}", f"t{self.threads}"
        return ".".join(parts)

    @property
    def arguments(self) -> list[str]:
        """For the command line of a cell."""
        return [f"--{name}={value}" for name, value in vars(self).items()]


def add_models(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which models, and where what comes of them is kept."""
    parser.add_argument("folder", type=Path, nargs="?", metavar="MODELS", help="folder of the models; none: the digits")
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="folder of the .npz files of their TOMLs")
    parser.add_argument("--work", type=Path, required=True, help="folder for results and compressed models")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--models", nargs="*", help="names of models in the folder")
    parser.add_argument("--objective", choices=("params", "macs"), default="params")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)


def models_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[Path]:
    """The files of the models that were asked for."""
    if options.folder is not None and options.data is None:
        parser.error("give the folder of the data too")
    folder = FIXTURES if options.folder is None else options.folder.resolve()
    for name in options.models or (["digits"] if options.folder is None else MODELS):
        yield folder / f"{name}.onnx"


def written(text: str, output: Path | None) -> None:
    """Write a document, or print it where no file was asked for."""
    if output is None:
        print(text)
    else:
        output.write_text(text, encoding="utf-8")


def kept_row(kept: Path, about: Mapping[str, Any], make: Callable[[Path], str | None]) -> dict[str, Any]:
    """The row of a cell: as it was kept, else from a run; `failed` says why there is none.

    A row that failed is not kept, so that the next run tries it again.

    Args:
        kept: the file of the cell.
        about: what was asked for; stands in the row.
        make: writes the JSON of the cell into the file it is given; None when it went well, else what went wrong.
    """
    if not kept.is_file():
        made = kept.with_suffix(".made")
        start = time.perf_counter()
        trouble = make(made)
        if trouble is not None:
            return {**about, "failed": trouble}
        row = json.loads(made.read_text(encoding="utf-8"))
        write_row(kept, {**about, **row, "process_seconds": time.perf_counter() - start})
        made.unlink()
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write JSON: all of it, or nothing."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(row, indent=1), encoding="utf-8")
    os.replace(partial, path)


def run_process(arguments: Sequence[str], limit: float) -> str | None:
    """Run a process for at most `limit` seconds; None when it went well, else the last line it wrote."""
    try:
        done = subprocess.run(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"was not ready after {limit:.0f} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def placed(model: Path, data: Path | None, work: Path) -> Path:
    """The model beside its TOML file, with the data of that file where DATA is: links in the folder of the work."""
    if data is None:
        return model
    folder = work / "models"
    folder.mkdir(exist_ok=True)
    for target, link in (
        (model, folder / model.name),
        (model.with_suffix(".toml"), folder / f"{model.stem}.toml"),
        (data.resolve(), work / "data"),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return folder / model.name


def machine(threads: int) -> dict[str, Any]:
    """What the cell ran on."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
    }


def versions_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """All versions that any cell ran with."""
    found = {f"{name} {version}" for row in rows for name, version in row.get("versions", {}).items()}
    return ", ".join(sorted(found, key=str.lower))
