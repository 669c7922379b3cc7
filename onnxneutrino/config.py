"""What the user asked for: frozen values from a TOML file beside the model and from the command line.

The TOML file has the tables `[data]`, `[metric]`, `[train]` and `[compress]`; an option of the command line overrides
the key of the same name. An unknown table or key is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxneutrino import config_checks as checks
from onnxneutrino.data_function import is_function
from onnxneutrino.errors import UsageError
from onnxneutrino.quantities import BYTES, COUNTS, MILLISECONDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

OBJECTIVES = ("params", "macs", "size", "memory", "latency")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
LAYOUTS = ("NCHW", "NHWC")
AUGMENTATIONS = ("crop4", "hflip")
DELTA = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how it becomes the model's input.

    Attributes:
        path: `.npz` file, folder with `train/<class>/` and `test/<class>/`, `file.py:function`, or `random`.
        base: directory that a relative `path` starts from (that of the TOML file, or the working directory).
        layout: layout of the model's input, `NCHW` or `NHWC`; the arrays themselves are N×H×W[×C].
        scale: factor on the raw values.
        mean: per channel, subtracted after `scale`; empty for none.
        std: per channel, divides after `mean`; empty for none.
        augment: `crop4`, `hflip`; training only.
        validation: share of the training split for early stopping, or `file`: the held-out images decide.
    """

    path: str = ""
    base: Path = Path(".")
    layout: str = "NCHW"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: tuple[str, ...] = ()
    validation: float | str = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """How a candidate is trained, and what of the user's own takes part.

    Attributes:
        loss: `file.py:function` that returns an onnxblock, or an `.onnx` file; empty for the built-in loss.
        optimizer: `adamw`, or `sgd` without momentum.
        schedule: after a warm-up of 5 %: `cosine` to zero, `step` to a tenth at 50 % and at 75 %, or `constant`.
        learning_rate: its peak; without one it is found by a range test, which `sgd` does not have.
        weight_average: decay of a moving average of the weights, which is what is returned; 0 for none.
        before: `file.py:function`, called with every candidate before it is trained; empty for none.
        after: `file.py:function`, called with every candidate that was measured, and may refuse it; empty for none.
    """

    loss: str = ""
    optimizer: str = "adamw"
    schedule: str = "cosine"
    learning_rate: float | None = None
    weight_average: float = 0.0
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Config:
    """One run; what was not given and has no value of its own is None.

    Attributes:
        data: where the data is and how it becomes the model's input.
        metric: a built-in metric, or `file.py:function`; empty for top1, or agreement for data without targets.
        metric_base: directory that a relative file of `metric` starts from, as `base` for the data.
        delta: the largest drop allowed, in the metric's own units.
        stage: 1 stops after exploration, 2 goes on to annealing.
        objective: the cost to make small; without effect where there are hard targets.
        max_params: hard target, elements of all float constants.
        max_macs: hard target, multiply-accumulates at batch 1.
        max_size: hard target, bytes on disk.
        max_memory: hard target, bytes of constants and of live activations at batch 1.
        max_latency: hard target, milliseconds at batch 1 on this machine.
        time_limit: for everything, in seconds.
        exclude: patterns of node names that stay as they are.
        only: patterns of node names that alone are factorized; empty for all.
        labels: train against labels and teacher, not against the teacher alone.
        seed: of every random draw.
        threads: how many compute; 0 for the cores there are.
        trainer: `ort` fine-tunes end to end, `reconstruct` block by block without labels, `none` not at all;
            `file.py:function` or `command: PROGRAM ARGS {candidate} {trained}` train elsewhere.
        train: how, and with what of the user's own.
        confidence: one-sided, that the drop of an accepted candidate is within delta.
        dry_run: everything up to the first training step; there is no compressed model then.
        input_shape: sizes by input name, such as `{ x = [1, 3, 64, 64] }`, which fix free dimensions.
        clock: readings of time from a report, to repeat its run; None for a new run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    metric: str = ""
    metric_base: Path = Path(".")
    delta: float | None = None
    stage: int = 2
    objective: str = "params"
    max_params: float | None = None
    max_macs: float | None = None
    max_size: float | None = None
    max_memory: float | None = None
    max_latency: float | None = None
    time_limit: float = 1800.0
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    labels: bool = True
    seed: int = 0
    threads: int = 0
    trainer: str = "ort"
    train: TrainConfig = field(default_factory=TrainConfig)
    confidence: float = 0.8
    dry_run: bool = False
    input_shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    clock: tuple[float, ...] | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The hard targets that were given, by the name of the cost."""
        given = {name: getattr(self, f"max_{name}") for name in OBJECTIVES}
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def largest_drop(self) -> float:
        """Delta: as given; without one 1, or any drop where there are hard targets."""
        if self.delta is not None:
            return self.delta
        return math.inf if self.limits else DELTA


def toml_path(model_path: Path) -> Path:
    """The TOML file that describes a model: `in.toml` beside `in.onnx`."""
    return model_path.with_suffix(".toml")


def load_config(model_path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Read the TOML file beside `model_path`, where there is one, and lay `overrides` over it.

    Args:
        model_path: the model; None for a model that is not a file.
        overrides: values by the name of a field of `DataConfig` (`data` for its path), `TrainConfig` or `Config`;
            None values are skipped.

    Raises:
        UsageError: a file that is not TOML, an unknown table or key, or a value out of range.
    """
    tables, base, source = _read_toml(model_path)
    data = _fields(tables.get("data", {}), DataConfig, source, "data", hidden=("base",))
    train = _rebased(_fields(tables.get("train", {}), TrainConfig, source, "train", hidden=()), base)
    hidden = ("data", "train", "metric", "metric_base", "dry_run", "clock")
    top = _fields(tables.get("compress", {}), Config, source, "compress", hidden=hidden)
    for key, value in tables.get("metric", {}).items():
        if key != "name":
            raise UsageError(f"{source}: unknown key '{key}' in [metric]; the only one is 'name'")
        top["metric"] = value
    top = _rebased(top, base)
    data["base"] = top["metric_base"] = base
    sources = dict.fromkeys((*data, *train, *top), source)
    data_names = {f.name for f in dataclasses.fields(DataConfig)}
    train_names = {f.name for f in dataclasses.fields(TrainConfig)}
    top_names = {f.name for f in dataclasses.fields(Config)} - {"data", "train"}
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "data":
            data["path"], data["base"] = str(value), Path(".")
        elif key in data_names:
            data[key] = value
        elif key in train_names:
            train[key] = value
        elif key in top_names:
            top[key] = value
            if key == "metric":
                top["metric_base"] = Path(".")
        else:
            known = ", ".join(sorted(data_names | train_names | top_names))
            raise UsageError(f"unknown option '{key}'; known are {known}")
        sources["path" if key == "data" else key] = "the command line"
    for values in (data, train, top):
        _check(values, sources)
    if train.get("optimizer") == "sgd" and train.get("learning_rate") is None:
        where = sources["optimizer"]
        raise UsageError(f"{where}: optimizer sgd needs a learning-rate; only that of adamw is found by a range test")
    if train.get("loss") and top.get("trainer", "ort") not in ("ort", "none"):
        where, trainer = sources["loss"], top["trainer"]
        raise UsageError(f"{where}: loss goes with --trainer ort alone; '{trainer}' does not train by it")
    if not top.get("threads"):
        top["threads"] = available_cores()
    return Config(data=DataConfig(**data), train=TrainConfig(**train), **top)


def _read_toml(model_path: Path | None) -> tuple[dict[str, Any], Path, str]:
    """The tables of the model's TOML file, the directory it is in, and what to call it in messages."""
    if model_path is None or not toml_path(model_path).is_file():
        return {}, Path("."), "the command line"
    path = toml_path(model_path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # a number of 5000 digits, or 5000 brackets, too
        raise UsageError(f"{path}: cannot be read as TOML: {error}") from error
    for name, table in tables.items():
        if name not in ("data", "metric", "train", "compress") or not isinstance(table, dict):
            raise UsageError(f"{path}: unknown entry '{name}'; the tables are [data], [metric], [train] and [compress]")
    return tables, path.parent, str(path)


def _fields(table: Mapping[str, Any], kind: type, source: str, name: str, hidden: tuple[str, ...]) -> dict[str, Any]:
    """The table's values, its keys checked against the fields of `kind`; hyphens count as underscores."""
    known = [f.name for f in dataclasses.fields(kind) if f.name not in hidden]
    values = {}
    for key, value in table.items():
        if key.replace("-", "_") not in known:
            raise UsageError(f"{source}: unknown key '{key}' in [{name}]; known are {', '.join(known)}")
        values[key.replace("-", "_")] = value
    return values


def _rebased(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """The values of a table, references to files in them from the working directory and not from the file's folder."""
    return {key: _from(base, value) if key in _REFERENCES else value for key, value in values.items()}


def _from(base: Path, value: Any) -> Any:
    named = isinstance(value, str) and (is_function(value) or value.endswith(".onnx")) and not checks.is_command(value)
    return str(base / Path(value).expanduser()) if named else value


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(values: dict[str, Any], sources: Mapping[str, str]) -> None:
    """Replace every value by its checked form; a message begins with where the value is from."""
    for key, check in _CHECKS.items():
        if key in values:
            try:
                values[key] = check(values[key])
            except (ValueError, OverflowError) as error:
                raise UsageError(f"{sources[key]}: {key.replace('_', '-')} {error}") from None


_REFERENCES = ("loss", "before", "after", "trainer")
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "path": checks.text,
    "layout": checks.choice(LAYOUTS),
    "scale": checks.not_zero,
    "mean": checks.each(checks.number),
    "std": checks.each(checks.positive),
    "augment": checks.each(checks.choice(AUGMENTATIONS)),
    "validation": checks.validation,
    "metric": checks.text,
    "delta": checks.not_negative,
    "stage": checks.choice((1, 2)),
    "objective": checks.choice(OBJECTIVES),
    "max_params": checks.quantity(COUNTS),
    "max_macs": checks.quantity(COUNTS),
    "max_size": checks.quantity(BYTES),
    "max_memory": checks.quantity(BYTES),
    "max_latency": checks.quantity(MILLISECONDS),
    "time_limit": checks.seconds,
    "exclude": checks.each(checks.text),
    "only": checks.each(checks.text),
    "labels": checks.switch,
    "seed": checks.whole,
    "threads": checks.thread_count,
    "trainer": checks.trainer,
    "loss": checks.loss,
    "optimizer": checks.choice(OPTIMIZERS),
    "schedule": checks.choice(SCHEDULES),
    "learning_rate": checks.positive,
    "weight_average": checks.decay,
    "before": checks.function,
    "after": checks.function,
    "confidence": checks.confidence,
    "dry_run": checks.switch,
    "input_shape": checks.shapes,
}
