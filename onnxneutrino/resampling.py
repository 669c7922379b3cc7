"""How ONNX's Resize makes one axis of its output from one axis of its input: a matrix per axis, nothing else.

Output index `i` looks at the input coordinate `x(i)`, which the coordinate mode gives from the scale `s`, the input
size `n` and the output size `m`:

    half_pixel            (i + 1/2) / s - 1/2
    half_pixel_symmetric  the same, plus n/2 (1 - m / (s n))
    pytorch_half_pixel    the same as half_pixel, 0 where m = 1
    align_corners         i (n - 1) / (m - 1)
    asymmetric            i / s
    tf_half_pixel_for_nn  (i + 1/2) / s
    tf_crop_and_resize    a (n - 1) + i (b - a) (n - 1) / (m - 1), region of interest [a, b]

Nearest takes the one element that `x` is rounded to; linear and cubic (Keys, "Cubic convolution interpolation for
digital image processing", 1981, with coefficient `a`) weight the neighbours of `x`; with antialias their kernel is
stretched by `1 / s` where that makes the axis smaller. Coordinates are in single precision, as in ONNX Runtime: an
exact half must be rounded the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.float64]
Coordinates: TypeAlias = NDArray[np.float32]
ONE = np.float32(1.0)
HALF = np.float32(0.5)


@dataclass(frozen=True)
class Method:
    """The attributes of a Resize; `rounding` "simple" is that of opset 10: up where the axis shrinks, else down."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False


@dataclass(frozen=True)
class Axis:
    """One resized axis: input and output size, scale, region of interest as shares of the input."""

    size: int
    length: int
    scale: float
    region: tuple[float, float] = (0.0, 1.0)


def coordinates(axis: Axis, kind: str) -> Coordinates:
    """Input coordinate of every output index, `[length]`.

    Raises:
        ValueError: there is no such coordinate mode.
    """
    index = np.arange(axis.length, dtype=np.float32)
    scale, size, last = np.float32(axis.scale), np.float32(axis.size), np.float32(axis.size - 1)
    half: Coordinates = (index + HALF) / scale - HALF
    found: Coordinates
    if kind == "half_pixel" or (kind == "pytorch_half_pixel" and axis.length > 1):
        found = half
    elif kind == "half_pixel_symmetric":
        found = half + size / 2 * (ONE - np.float32(axis.length) / (scale * size))
    elif kind == "asymmetric":
        found = index / scale
    elif kind == "tf_half_pixel_for_nn":
        found = (index + HALF) / scale
    elif kind == "tf_crop_and_resize":
        start, end = (np.float32(edge) for edge in axis.region)
        step = (end - start) * last / np.float32(max(1, axis.length - 1))
        found = start * last + index * step if axis.length > 1 else index + HALF * (start + end) * last
    elif kind == "align_corners" and axis.length > 1:
        found = index * last / np.float32(axis.length - 1)
    elif kind in ("align_corners", "pytorch_half_pixel"):
        found = np.zeros_like(index)
    else:
        raise ValueError(f"unknown coordinate mode {kind}")
    return found


def nearest(axis: Axis, method: Method) -> NDArray[np.int64]:
    """Input index that every output index takes, `[length]`."""
    x = coordinates(axis, method.coordinates)
    rounding = method.rounding
    if rounding == "simple":
        rounding = "ceil" if axis.scale < 1.0 else "floor"
    if rounding in ("round_prefer_floor", "round_prefer_ceil"):
        rounded = np.ceil(x - HALF) if rounding == "round_prefer_floor" else np.floor(x + HALF)
    else:
        rounded = np.ceil(x) if rounding == "ceil" else np.floor(x)
    found: NDArray[np.int64] = np.clip(rounded, 0, axis.size - 1).astype(np.int64)
    return found


def matrix(axis: Axis, method: Method) -> Matrix:
    """The matrix `[length, size]` whose product with the input's axis is the output's."""
    found = np.zeros((axis.length, axis.size))
    if method.mode == "nearest":
        found[np.arange(axis.length), nearest(axis, method)] = 1.0
        return found
    cubic = method.mode == "cubic"
    reach = 2.0 if cubic else 1.0
    stretch = max(1.0, 1.0 / axis.scale) if method.antialias else 1.0
    exclude = method.exclude_outside and (cubic or method.antialias)
    for row, x in zip(found, coordinates(axis, method.coordinates), strict=True):
        # Rows of linear stop at the edges; those of cubic and antialias see the edge's value repeated.
        center = float(x) if cubic or method.antialias else min(max(float(x), 0.0), axis.size - 1.0)
        taps = np.arange(math.floor(center - reach * stretch), math.ceil(center + reach * stretch) + 1)
        distance = np.abs(taps - center) / stretch
        weights = _cubic(distance, method.cubic) if cubic else np.clip(1.0 - distance, 0.0, 1.0)
        if exclude:
            weights = np.where((taps >= 0) & (taps < axis.size), weights, 0.0)
        if exclude or method.antialias:
            weights = weights / weights.sum()
        np.add.at(row, np.clip(taps, 0, axis.size - 1), weights)
    return found


def inside(axis: Axis, method: Method) -> NDArray[np.bool_]:
    """Which output indices lie in the input, `[length]`; the others get Resize's extrapolation value."""
    if method.coordinates != "tf_crop_and_resize":
        return np.ones(axis.length, np.bool_)
    x = coordinates(axis, method.coordinates)
    return np.asarray((x >= 0) & (x <= axis.size - 1))


def _cubic(distance: Matrix, a: float) -> Matrix:
    """Keys' kernel at absolute distances."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
