"""A layer's factors: a chain of small convolutions whose product stands for one weight.

A `Stage` is one Conv of the chain, a `Factors` the whole chain; it proves itself: the stages
must fit together and have the channels and kernel of the weight they replace. `Moments` are the
mean and the centred second moment of the layer's input patches, on which the forms are fitted.
No ONNX here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxneutrino.plan import Array, Form, Geometry


@dataclass(frozen=True, eq=False)
class Stage:
    """One convolution of a chain: weight `(O, I/groups, *kernel)`."""

    weight: Array
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel, one number per axis."""
        return self.weight.shape[2:]

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        return self.weight.shape[1] * self.groups, self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class Factors:
    """A chain of stages and the bias of its last one.

    Attributes:
        form: which factorization.
        ranks: `(r,)`, or `(r1, r2)` for tucker2.
        stages: in the order in which they run.
        bias: `(O,)`, added by the last stage.
        direct: `(r,)`, rising: the outputs that are the inner channels themselves, for `interpolative`; the rows of
            the last stage there are those of the identity, and no graph holds them.
        error: relative squared output error on the calibration moments,
            `E|y - y'|² / E|y - mean y|²`, without units.
    """

    form: Form
    ranks: tuple[int, ...]
    stages: tuple[Stage, ...]
    bias: Array
    error: float = float("nan")
    direct: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError where the stages do not chain."""
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.channels[1] != after.channels[0]:
                raise ValueError(
                    f"{self.form}: a stage gives {before.channels[1]} channels, the next takes {after.channels[0]}"
                )
        if self.bias.shape != (self.stages[-1].channels[1],):
            raise ValueError(f"{self.form}: bias {self.bias.shape} for {self.stages[-1].channels[1]} outputs")

    @property
    def params(self) -> int:
        """Elements of all stages and the bias, as a graph holds them."""
        return sum(stage.weight.size for stage in self.written) + self.bias.size

    @property
    def written(self) -> tuple[Stage, ...]:
        """The stages as a graph holds them: the last one without `direct` outputs; none where there are no others."""
        if not self.direct:
            return self.stages
        first, last = self.stages
        return (first, *([replace(last, weight=last.weight[list(self.others)])] if self.others else []))

    @property
    def others(self) -> tuple[int, ...]:
        """The outputs that the last stage computes: all that are not `direct`."""
        return tuple(sorted(set(range(len(self.bias))) - set(self.direct)))

    @property
    def inner_bias(self) -> Array:
        """What a graph adds to the channels that the last stage reads: the bias of `direct` outputs, `(r,)`."""
        return self.bias[list(self.direct)]

    def product(self) -> Array:
        """The weight `(O, I, *kernel)` that the chain is equal to."""
        return chain_product(self.stages)


def chain_product(stages: Sequence[Stage]) -> Array:
    """Weight `(O, I, *kernel)` of the one convolution that equals `stages` run one after the other.

    Kernels multiply out as full convolutions: on every axis their sizes add up (k1 + k2 - 1).
    """
    total: Array | None = None
    for stage in stages:
        weight = dense(stage)
        total = weight if total is None else _compose(total, weight)
    if total is None:
        raise ValueError("a chain needs at least one stage")
    return total


def dense(stage: Stage) -> Array:
    """Weight `(O, I, *kernel)` of a grouped stage with its zeros written out."""
    if stage.groups == 1:
        return stage.weight
    outputs, per_group, *kernel = stage.weight.shape
    full = np.zeros((outputs, per_group * stage.groups, *kernel), stage.weight.dtype)
    block = outputs // stage.groups
    for group in range(stage.groups):
        rows = slice(group * block, (group + 1) * block)
        full[rows, group * per_group : (group + 1) * per_group] = stage.weight[rows]
    return full


def _compose(first: Array, second: Array) -> Array:
    """Kernel of `second` after `first`: correlations chain to one with the convolved kernel."""
    (_, inputs, *k1), (outputs, _, *k2) = first.shape, second.shape
    size = [a + b - 1 for a, b in zip(k1, k2, strict=True)]
    total = np.zeros((outputs, inputs, *size), np.result_type(first, second))
    for tap in np.ndindex(*k2):
        window = tuple(slice(start, start + length) for start, length in zip(tap, k1, strict=True))
        shifted, at_tap = (slice(None), slice(None), *window), (slice(None), slice(None), *tap)
        total[shifted] += np.tensordot(second[at_tap], first, axes=1)
    return total


def stage_geometries(stages: Sequence[Stage], geometry: Geometry) -> list[Geometry]:
    """Geometry of each stage of a chain that replaces a layer with `geometry`.

    On each axis, stride, padding and dilation go to the first stage whose kernel covers that axis; where the
    layer's kernel is 1 on an axis (so no stage covers it), to the first stage.
    """
    takers = []
    for axis in range(len(geometry.kernel)):
        covering = [index for index, stage in enumerate(stages) if stage.kernel[axis] > 1]
        takers.append(covering[0] if covering else 0)
    result = []
    for index, stage in enumerate(stages):
        takes = [taker == index for taker in takers]
        result.append(
            Geometry(
                kernel=stage.kernel,
                strides=tuple(n if own else 1 for n, own in zip(geometry.strides, takes, strict=True)),
                pads=tuple(n * own for n, own in zip(geometry.pads, takes * 2, strict=True)),
                dilations=tuple(n if own else 1 for n, own in zip(geometry.dilations, takes, strict=True)),
            )
        )
    return result


def chain_macs(stages: Sequence[Stage], geometry: Geometry, size: tuple[int, ...]) -> int:
    """Multiply-accumulates of the chain for one input map of `size`, one number per axis."""
    total = 0
    for stage, own in zip(stages, stage_geometries(stages, geometry), strict=True):
        size = own.output_size(*size)
        total += math.prod(size) * stage.weight.size
    return total


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and centred second moment of a layer's input patches of `D` elements, in the order of the weight.

    Exactly one of `sigma` (`D × D`) and `rows` (`n × D`, centred) is given; `rows` stands for
    `sigma = rowsᵀ rows / n` and is the smaller of the two while `n < D`.
    """

    mean: Array
    count: int
    sigma: Array | None = None
    rows: Array | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless exactly one of `sigma` and `rows` is there."""
        if (self.sigma is None) == (self.rows is None):
            raise ValueError("moments need sigma or rows, and not both")

    def times(self, left: Array) -> Array:
        """`left · Σ` for `left` of shape `(m, D)`."""
        if self.sigma is not None:
            return left @ self.sigma
        assert self.rows is not None
        return np.asarray((left @ self.rows.T) @ (self.rows / np.float32(self.count)), dtype=np.float32)

    def matrix(self) -> Array:
        """Σ as a `D × D` matrix."""
        if self.sigma is not None:
            return self.sigma
        assert self.rows is not None
        return np.asarray(self.rows.T @ (self.rows / np.float32(self.count)), dtype=np.float32)
