"""Dataclasses to JSON values and back, by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


class MismatchError(Exception):
    """JSON that does not have the shape of the dataclass; the message names the key."""


def plain(value: Any) -> Any:
    """Replace what JSON cannot hold: NaN and infinities by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def decode(kind: Any, value: Any, where: str) -> Any:
    """Build a value of the annotated type `kind` from JSON; `where` is the key's path.

    Of unions only `X | None` occurs.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else decode(arguments[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_fields(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict) and len(arguments) == 2:
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal and value in arguments:
        return value
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise MismatchError(f"'{where}' cannot be {json.dumps(value)[:40]}")


def _decode_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise MismatchError(f"'{where}' must be an object")
    hints = _hints(kind)
    for key in value:
        if key not in hints:
            raise MismatchError(f"unknown key '{where}.{key}'")
    for entry in dataclasses.fields(kind):
        optional = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        if entry.name not in value and not optional:
            raise MismatchError(f"'{where}.{entry.name}' is missing")
    return kind(**{key: decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})
