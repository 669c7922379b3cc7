"""Shapes of a Conv, and of the Convs that its gradients are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.plan import Geometry

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a Conv: `X` is N×C×map, `W` is O×(C/group)×kernel, `dY` is N×O×out; pads are begins, then ends."""

    x: Shape
    w: Shape
    strides: Shape
    dilations: Shape
    pads: Shape
    group: int

    @property
    def rank(self) -> int:
        """Axes of a map."""
        return len(self.x) - 2

    @property
    def kernel(self) -> Shape:
        """Length of the kernel on each axis of the map."""
        return self.w[2:]

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def out(self) -> Shape:
        """Size of a map of `Y`."""
        return Geometry(self.kernel, self.strides, self.pads, self.dilations).output_size(*self.x[2:])

    @property
    def y(self) -> Shape:
        """Shape of `Y` and `dY`."""
        return (self.x[0], self.w[0], *self.out)

    @property
    def depthwise(self) -> bool:
        """Whether every channel has one kernel of its own."""
        return self.group > 1 and self.group == self.x[1] == self.w[0]

    @property
    def unstrided(self) -> bool:
        """Whether all strides are 1."""
        return all(step == 1 for step in self.strides)

    @property
    def transposed(self) -> ConvGeometry:
        """The Conv of `dY` that gives dX where the strides are 1; a pad can be negative."""
        reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]
        pads = tuple(r - p for r, p in zip(reach + reach, self.pads, strict=True))
        w = self.w if self.depthwise else (self.w[1], self.w[0], *self.kernel)
        return ConvGeometry(self.y, w, self.strides, self.dilations, pads, self.group)

    @property
    def used_pads(self) -> Shape:
        """Pads of the part of `X` that some place of the kernel reaches; negative ends where a rest is never read."""
        ends = []
        for axis in range(self.rank):
            reach = self.strides[axis] * (self.out[axis] - 1) + self.dilations[axis] * (self.kernel[axis] - 1) + 1
            ends.append(reach - self.x[2 + axis] - self.pads[axis])
        return (*self.pads[: self.rank], *ends)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the node."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": list(self.pads),
            "group": self.group,
        }


def padded(size: Iterable[int], pads: Shape) -> Shape:
    """Size of a map with its pads."""
    sizes = tuple(size)
    ends = zip(sizes, pads, pads[len(sizes) :], strict=False)
    return tuple(length + low + high for length, low, high in ends)


def windows(geometry: Geometry, maps: NDArray[Any], positions: NDArray[np.integer]) -> NDArray[Any]:
    """What a kernel covers at `positions` `(N, k)` of its outputs: `(N·k, C·taps)`, in the order of a weight.

    Args:
        geometry: of the Conv.
        maps: N×C×map.
        positions: numbers of places in the map of outputs, row by row.
    """
    size = geometry.output_size(*maps.shape[2:])
    if any(geometry.pads):
        maps = np.pad(maps, ((0, 0), (0, 0), *geometry.margins))
    n, c, *axes = maps.strides
    between = [step * stride for step, stride in zip(axes, geometry.strides, strict=True)]
    within = [step * dilation for step, dilation in zip(axes, geometry.dilations, strict=True)]
    covered = np.lib.stride_tricks.as_strided(
        maps,
        (maps.shape[0], *size, maps.shape[1], *geometry.kernel),
        (n, *between, c, *within),
        writeable=False,
    )
    rows = np.repeat(np.arange(len(positions)), positions.shape[1])
    places = (rows, *np.unravel_index(positions.reshape(-1), size))
    picked = covered[places]
    return np.asarray(picked.reshape(len(rows), -1))
