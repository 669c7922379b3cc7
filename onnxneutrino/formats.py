"""Numbers as people read them: the only place where one becomes text; `-` stands for None and NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxneutrino.report import Interval

TIMES = "\N{MULTIPLICATION SIGN}"


def format_count(value: float | None) -> str:
    """Write a count with three significant digits and a decimal prefix: 3251274 is `3.25 M`."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def format_bytes(value: float | None) -> str:
    """Write bytes with three significant digits and a decimal prefix: 13011738 is `13.0 MB`."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def format_ms(value: float | None) -> str:
    """Write milliseconds with three significant digits: `0.412 ms`, from one second on as `1.25 s`."""
    if value is None or math.isnan(value):
        return "-"
    return f"{_digits(value)} ms" if value < 999.5 else f"{_digits(value / 1000)} s"


def format_ratio(value: float | None) -> str:
    """Write a ratio with three significant digits: 12.41 is `12.4` and a multiplication sign."""
    return "-" if value is None or math.isnan(value) else f"{_digits(value)}{TIMES}"


def format_percent(share: float | None) -> str:
    """Write a share of one as percent: 0.154 is `15.4 %`."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def format_metric(value: float | None) -> str:
    """Write a metric or a drop in its own units: two decimals, three significant digits below one."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= 0.995 or value == 0:
        return f"{value:.2f}"
    return _digits(value) if abs(value) >= 1e-4 else f"{value:.2e}"


def format_tick(value: float) -> str:
    """Write the tick of an axis in as few digits as it needs: 2500 is `2.5 k`, 0.05 is `0.05`, 1e-06 is `1e-06`."""
    power, rest = 0, value
    while abs(rest) >= 1000 and power < 4:
        power, rest = power + 1, rest / 1000
    return f"{rest + 0.0:.6g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()


def format_exact(value: int) -> str:
    """Write a whole number with all its digits: 8558 is `8,558`."""
    return f"{value:,}"


def format_interval(interval: Interval) -> str:
    """Write a drop with its interval: `0.600 (95 % interval 0.310 to 0.890)`."""
    bounds = f"{format_metric(interval.low)} to {format_metric(interval.high)}"
    return f"{format_metric(interval.value)} (95 % interval {bounds})"


def format_seconds(value: float | None) -> str:
    """Write a duration in seconds: `8.2 s`, `45 s`, `4 min 05 s`, `1 h 02 min`."""
    if value is None or math.isnan(value):
        return "-"
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_shape(shape: Sequence[int]) -> str:
    """Write a shape as on the command line: `64x3x3x3`; `scalar` without axes."""
    return "x".join(map(str, shape)) or "scalar"


def _digits(value: float) -> str:
    """Three significant digits, never in exponent form, all of the whole part from 1000 on."""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    rounded = float(f"{value:.2e}")
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    return f"{value:.{max(decimals, 0)}f}"


def _scaled(value: float | None, units: Sequence[str]) -> str:
    """Write a whole number below 1000 as it is, larger ones in the unit that leaves 1 to 999."""
    if value is None or math.isnan(value):
        return "-"
    index = 0
    while abs(round(value, 9) if index == 0 else float(f"{value:.2e}")) >= 1000 and index < len(units) - 1:
        value /= 1000
        index += 1
    number = f"{value:g}" if index == 0 and value == int(value) else _digits(value)
    return f"{number} {units[index]}".rstrip()
