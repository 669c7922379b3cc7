"""Checks of what the user wrote: each returns the value in its final form, or says what it must be.

A `ValueError` says only that, such as "must be positive, got -1"; the caller knows the key and the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from onnxneutrino.data_function import is_function
from onnxneutrino.errors import UsageError
from onnxneutrino.quantities import parse_quantity

TRAINERS = ("ort", "reconstruct", "none")
MOST_THREADS = 1024
COMMAND = "command:"
PLACEHOLDERS = ("{candidate}", "{trained}")  # that a trainer's command cannot do without


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


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"must be a number, got {value!r}")
    return float(value)


def not_zero(value: Any) -> float:
    """A number other than zero."""
    if number(value) == 0:
        raise ValueError("must not be zero")
    return float(value)


def not_negative(value: Any) -> float:
    """A number from zero."""
    if number(value) < 0:
        raise ValueError(f"must not be negative, got {value}")
    return float(value)


def positive(value: Any) -> float:
    """A number above zero."""
    if number(value) <= 0:
        raise ValueError(f"must be positive, got {value}")
    return float(value)


def seconds(value: Any) -> float:
    """Seconds, from a number or a duration."""
    try:
        return positive(parse_duration(value) if isinstance(value, str) else value)
    except UsageError:
        raise ValueError(f"must be a duration such as 90s, 15m or 2h, got {value!r}") from None


def quantity(units: Mapping[str, float]) -> Callable[[Any], float]:
    """The check of a quantity with one of these units."""
    return lambda value: parse_quantity(value, units)


def whole(value: Any) -> int:
    """A whole number from zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be a whole number from 0, got {value!r}")
    return value


def thread_count(value: Any) -> int:
    """A number of threads that a machine may have; 0 for the cores there are."""
    if whole(value) > MOST_THREADS:
        raise ValueError(f"must be at most {MOST_THREADS}, got {value!r}")
    return int(value)


def at_least_one(value: Any) -> int:
    """A whole number from one."""
    if whole(value) == 0:
        raise ValueError("must be at least 1")
    return int(value)


def switch(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"must be a string, got {value!r}")
    return value


def confidence(value: Any) -> float:
    """A probability from 0.5 to below 1."""
    if not 0.5 <= number(value) < 1:
        raise ValueError(f"must be from 0.5 to below 1, got {value}")
    return float(value)


def decay(value: Any) -> float:
    """A share from 0 to below 1."""
    if not 0 <= number(value) < 1:
        raise ValueError(f"must be from 0 to below 1, got {value}")
    return float(value)


def function(value: Any) -> str:
    """`file.py:function`; empty for none."""
    if not isinstance(value, str) or not (value == "" or is_function(value)):
        raise ValueError(f"must be file.py:function, got {value!r}")
    return value


def loss(value: Any) -> str:
    """`file.py:function`, or an `.onnx` file; empty for none."""
    if not isinstance(value, str) or not (value == "" or is_function(value) or value.endswith(".onnx")):
        raise ValueError(f"must be file.py:function or an .onnx file, got {value!r}")
    return value


def trainer(value: Any) -> str:
    """One of the trainers there are, `file.py:function`, or `command: PROGRAM ARGS {candidate} {trained}`."""
    named = isinstance(value, str) and (value in TRAINERS or is_command(value) or is_function(value))
    if not named or (is_command(value) and not all(own in value for own in PLACEHOLDERS)):
        command = f"'command: PROGRAM ARGS {' '.join(PLACEHOLDERS)}'"
        raise ValueError(f"must be one of {', '.join(TRAINERS)}, file.py:function or {command}, got {value!r}")
    return str(value)


def is_command(value: str) -> bool:
    """Whether a trainer is an own command."""
    return value.startswith(COMMAND)


def validation(value: Any) -> float | str:
    """A share from 0 to below 1, or `file`."""
    if value == "file":
        return "file"
    try:
        share = number(float(value) if isinstance(value, str) else value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"must be a share from 0 to below 1, or 'file', got {value!r}")
    return share


def shapes(value: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by input name."""
    if not isinstance(value, Mapping):
        raise ValueError(f"must give a shape by input name, got {value!r}")
    shapes = {}
    for name, shape in value.items():
        if not isinstance(shape, (list, tuple)):
            raise ValueError(f"of '{name}' must be a list of sizes, got {shape!r}")
        shapes[name] = tuple(at_least_one(size) for size in shape)
    return shapes


def sequence(value: Any) -> list[Any]:
    """A list; one value alone counts as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def each(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The check of a list; one value alone counts as a list of one."""
    return lambda value: tuple(check(v) for v in sequence(value))


def choice(allowed: tuple[Any, ...]) -> Callable[[Any], Any]:
    """The check of one of these values."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}, got {value!r}")
        return value

    return check
