"""What the user asked for: frozen values from a TOML file beside the model and from the command line.

The TOML file has the tables `[data]`, `[metric]` and `[compress]`; an option of the command line overrides
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

from onnxneutrino.errors import UsageError
from onnxneutrino.quantities import BYTES, COUNTS, MILLISECONDS, parse_quantity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

OBJECTIVES = ("params", "macs", "size", "memory", "latency")
TRAINERS = ("ort", "reconstruct", "none")
LAYOUTS = ("NCHW", "NHWC")
AUGMENTATIONS = ("crop4", "hflip")
DELTA = 1.0
MOST_THREADS = 1024


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
        trainer: `ort` fine-tunes end to end, `reconstruct` block by block without labels, `none` not at all.
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
        overrides: values by the name of a field of `DataConfig` (`data` for its path) or `Config`;
            None values are skipped.

    Raises:
        UsageError: a file that is not TOML, an unknown table or key, or a value out of range.
    """
    tables, base, source = _read_toml(model_path)
    data = _fields(tables.get("data", {}), DataConfig, source, "data", hidden=("base",))
    hidden = ("data", "metric", "metric_base", "dry_run", "clock")
    top = _fields(tables.get("compress", {}), Config, source, "compress", hidden=hidden)
    for key, value in tables.get("metric", {}).items():
        if key != "name":
            raise UsageError(f"{source}: unknown key '{key}' in [metric]; the only one is 'name'")
        top["metric"] = value
    data["base"] = top["metric_base"] = base
    sources = dict.fromkeys((*data, *top), source)
    data_names = {f.name for f in dataclasses.fields(DataConfig)}
    top_names = {f.name for f in dataclasses.fields(Config)} - {"data"}
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "data":
            data["path"], data["base"] = str(value), Path(".")
        elif key in data_names:
            data[key] = value
        elif key in top_names:
            top[key] = value
            if key == "metric":
                top["metric_base"] = Path(".")
        else:
            raise UsageError(f"unknown option '{key}'; known are {', '.join(sorted(data_names | top_names))}")
        sources["path" if key == "data" else key] = "the command line"
    _check(data, sources)
    _check(top, sources)
    if not top.get("threads"):
        top["threads"] = available_cores()
    return Config(data=DataConfig(**data), **top)


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
        if name not in ("data", "metric", "compress") or not isinstance(table, dict):
            raise UsageError(f"{path}: unknown entry '{name}'; the tables are [data], [metric] and [compress]")
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


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_duration(text: str) -> float:
    """Seconds in `90`, `90s`, `15m` or `2h`.

    Raises:
        UsageError: anything else.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    stripped = text.strip()
    number, unit = (stripped[:-1], units[stripped[-1]]) if stripped[-1:] in units else (stripped, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise UsageError(f"time limit '{text}' is not a duration; write 90s, 15m or 2h") from None


def _check(values: dict[str, Any], sources: Mapping[str, str]) -> None:
    """Replace every value by its checked form; a message begins with where the value is from."""
    for key, check in _CHECKS.items():
        if key in values:
            try:
                values[key] = check(values[key])
            except (ValueError, OverflowError) as error:
                raise UsageError(f"{sources[key]}: {key.replace('_', '-')} {error}") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"must be a number, got {value!r}")
    return float(value)


def _not_zero(value: Any) -> float:
    if _number(value) == 0:
        raise ValueError("must not be zero")
    return float(value)


def _not_negative(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError(f"must not be negative, got {value}")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"must be positive, got {value}")
    return float(value)


def _seconds(value: Any) -> float:
    try:
        return _positive(parse_duration(value) if isinstance(value, str) else value)
    except UsageError:
        raise ValueError(f"must be a duration such as 90s, 15m or 2h, got {value!r}") from None


def _quantity(units: Mapping[str, float]) -> Callable[[Any], float]:
    return lambda value: parse_quantity(value, units)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number from 0, got {value!r}")
    return value


def _thread_count(value: Any) -> int:
    if _whole(value) > MOST_THREADS:
        raise ValueError(f"must be at most {MOST_THREADS}, got {value!r}")
    return int(value)


def _at_least_one(value: Any) -> int:
    if _whole(value) == 0:
        raise ValueError("must be at least 1")
    return int(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {value!r}")
    return value


def _confidence(value: Any) -> float:
    if not 0.5 <= _number(value) < 1:
        raise ValueError(f"must be from 0.5 to below 1, got {value}")
    return float(value)


def _validation(value: Any) -> float | str:
    if value == "file":
        return "file"
    try:
        share = _number(float(value) if isinstance(value, str) else value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"must be a share from 0 to below 1, or 'file', got {value!r}")
    return share


def _shapes(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must give a shape by input name, got {value!r}")
    shapes = {}
    for name, shape in value.items():
        if not isinstance(shape, (list, tuple)):
            raise ValueError(f"of '{name}' must be a list of sizes, got {shape!r}")
        shapes[name] = tuple(_at_least_one(size) for size in shape)
    return shapes


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _each(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The check of a list; one value alone counts as a list of one."""
    return lambda value: tuple(check(v) for v in _sequence(value))


def _choice(allowed: tuple[Any, ...]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}, got {value!r}")
        return value

    return check


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "path": _text,
    "layout": _choice(LAYOUTS),
    "scale": _not_zero,
    "mean": _each(_number),
    "std": _each(_positive),
    "augment": _each(_choice(AUGMENTATIONS)),
    "validation": _validation,
    "metric": _text,
    "delta": _not_negative,
    "stage": _choice((1, 2)),
    "objective": _choice(OBJECTIVES),
    "max_params": _quantity(COUNTS),
    "max_macs": _quantity(COUNTS),
    "max_size": _quantity(BYTES),
    "max_memory": _quantity(BYTES),
    "max_latency": _quantity(MILLISECONDS),
    "time_limit": _seconds,
    "exclude": _each(_text),
    "only": _each(_text),
    "labels": _switch,
    "seed": _whole,
    "threads": _thread_count,
    "trainer": _choice(TRAINERS),
    "confidence": _confidence,
    "dry_run": _switch,
    "input_shape": _shapes,
}
