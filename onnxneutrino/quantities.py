"""Costs as users write them: `200k` parameters, `500KB`, `1.5MiB`, `2ms`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
BYTES = {"": 1.0, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
MILLISECONDS = {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3}
EXAMPLES = ((COUNTS, "200k, 5M or 1.2G"), (BYTES, "500KB, 2MB or 1.5MiB"), (MILLISECONDS, "800us, 2ms or 0.1s"))
QUANTITY = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*")


def parse_quantity(value: Any, units: Mapping[str, float]) -> float:
    """The number in the base unit, of a number or of text with one of the units.

    Args:
        value: from the command line or a TOML file.
        units: `COUNTS`, `BYTES` or `MILLISECONDS`: factors by name; without one a number is in the base unit.

    Raises:
        ValueError: anything else, or not above zero.
    """
    found = QUANTITY.fullmatch(value) if isinstance(value, str) else None
    number = math.nan
    if found is not None and found[2] in units:
        number = float(found[1]) * units[found[2]]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if not (math.isfinite(number) and number > 0):
        example = next(text for own, text in EXAMPLES if own is units)
        raise ValueError(f"must be a positive quantity such as {example}, got {value!r}")
    return number
