"""What the user asked for: frozen values from a TOML file beside the model and from the command line.

The TOML file has the tables `[data]`, `[metric]` and `[compress]`; an option of the command line overrides
the key of the same name. An unknown table or key is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxneutrino.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OBJECTIVES = ("params", "macs", "size", "memory", "latency")
TRAINERS = ("ort", "reconstruct", "none")
LAYOUTS = ("NCHW", "NHWC")
AUGMENTATIONS = ("crop4", "hflip")


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
    """One run. `delta` is in the metric's own units; times are in seconds, sizes in bytes, latency in ms."""

    data: DataConfig = field(default_factory=DataConfig)
    metric: str = "top1"
    metric_base: Path = Path(".")
    delta: float = 1.0
    stage: int = 2
    objective: str = "params"
    max_params: int | None = None
    max_macs: int | None = None
    max_size: int | None = None
    max_latency: float | None = None
    time_limit: float = 1800.0
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    labels: bool = True
    seed: int = 0
    threads: int = 0
    trainer: str = "ort"
    confidence: float = 0.8
    reference: bool = False
    dry_run: bool = False
    input_shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


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
    tables: dict[str, Any] = {}
    base = Path(".")
    source = "the command line"
    if model_path is not None and toml_path(model_path).is_file():
        path = toml_path(model_path)
        base, source = path.parent, str(path)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"{path}: cannot be read as TOML: {error}") from error
    for table in tables:
        if table not in ("data", "metric", "compress") or not isinstance(tables[table], dict):
            raise UsageError(
                f"{source}: unknown entry '{table}'; the tables are [data], [metric] and [compress]"
            )
    data = _fields(tables.get("data", {}), DataConfig, source, "data", hidden=("base",))
    metric = dict(tables.get("metric", {}))
    for key in metric:
        if key != "name":
            raise UsageError(f"{source}: unknown key '{key}' in [metric]; the only one is 'name'")
    top = _fields(
        tables.get("compress", {}),
        Config,
        source,
        "compress",
        hidden=("data", "metric", "metric_base", "dry_run"),
    )
    data["base"] = top["metric_base"] = base
    if "name" in metric:
        top["metric"] = metric["name"]
    data_names = {f.name for f in dataclasses.fields(DataConfig)}
    for key, value in overrides.items():
        if value is None:
            continue
        if key == "data":
            data["path"], data["base"] = str(value), Path(".")
        elif key in data_names:
            data[key] = value
        else:
            top[key] = value
            if key == "metric":
                top["metric_base"] = Path(".")
    return _checked(data, top, source)


def _fields(
    table: Mapping[str, Any], kind: type, source: str, name: str, hidden: tuple[str, ...]
) -> dict[str, Any]:
    """The table's values, its keys checked against the fields of `kind`; hyphens count as underscores."""
    known = [f.name for f in dataclasses.fields(kind) if f.name not in hidden]
    values = {}
    for key, value in table.items():
        if key.replace("-", "_") not in known:
            raise UsageError(f"{source}: unknown key '{key}' in [{name}]; known are {', '.join(known)}")
        values[key.replace("-", "_")] = value
    return values


def _checked(data: dict[str, Any], top: dict[str, Any], source: str) -> Config:
    for key in ("mean", "std"):
        if key in data:
            data[key] = tuple(_number(v, key, source) for v in _sequence(data[key]))
    if any(v == 0 for v in data.get("std", ())):
        raise UsageError(f"{source}: std holds a zero; every channel needs a positive value")
    if "augment" in data:
        data["augment"] = tuple(str(v) for v in _sequence(data["augment"]))
    for name in data.get("augment", ()):
        _choice(name, AUGMENTATIONS, "augment", source)
    if "layout" in data:
        _choice(data["layout"], LAYOUTS, "layout", source)
    if "scale" in data:
        data["scale"] = _number(data["scale"], "scale", source)
    if not isinstance(data.get("path", ""), str):
        raise UsageError(f"{source}: path must be a string, got {data['path']!r}")
    validation = data.get("validation", 0.1)
    if validation != "file":
        data["validation"] = _number(validation, "validation", source)
        if not 0 <= data["validation"] < 1:
            raise UsageError(
                f"{source}: validation must be a share from 0 to below 1, or 'file', got {validation}"
            )
    for key in ("exclude", "only"):
        if key in top:
            top[key] = tuple(str(v) for v in _sequence(top[key]))
    _choice(top.get("objective", "params"), OBJECTIVES, "objective", source)
    _choice(top.get("trainer", "ort"), TRAINERS, "trainer", source)
    _choice(top.get("stage", 2), (1, 2), "stage", source)
    if isinstance(top.get("time_limit"), str):
        top["time_limit"] = parse_duration(top["time_limit"])
    for key in ("delta", "time_limit", "confidence"):
        if key in top:
            top[key] = _number(top[key], key, source)
    if not 0 <= top.get("delta", 1.0):
        raise UsageError(f"{source}: delta must not be negative, got {top['delta']}")
    if not 0.5 <= top.get("confidence", 0.8) < 1:
        raise UsageError(f"{source}: confidence must be from 0.5 to below 1, got {top['confidence']}")
    if not top.get("time_limit", 1.0) > 0:
        raise UsageError(f"{source}: time-limit must be positive, got {top['time_limit']} s")
    for key in ("seed", "threads"):
        if key in top and (not isinstance(top[key], int) or top[key] < 0):
            raise UsageError(f"{source}: {key} must be a whole number from 0, got {top[key]!r}")
    if not top.get("threads"):
        top["threads"] = available_cores()
    return Config(data=DataConfig(**data), **top)


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


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _number(value: Any, key: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{source}: {key} must be a number, got {value!r}")
    return float(value)


def _choice(value: Any, allowed: tuple[Any, ...], key: str, source: str) -> None:
    if value not in allowed:
        raise UsageError(f"{source}: {key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
