"""What a network's layers are and what becomes of each: the composed list of the paper's conductor.

A `Layer` is a Conv, Gemm or MatMul seen as one linear map on patches, `y = W x + b`, with
`W` of shape `(O, I, kh, kw)`, or `(O, I, kd, kh, kw)` for a 3-D Conv; everything the numerics
need is in it and nothing of ONNX. A `Frozen` is a layer that stays as it is, with the reason.
A `Plan` maps the name of every layer that is factorized to its form and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Kind: TypeAlias = Literal["conv1d", "conv2d", "conv3d", "gemm", "matmul", "map"]
Form: TypeAlias = Literal["svd", "channel", "interpolative", "input", "spatial_hv", "spatial_vh", "tucker2", "cp"]

FORMS: tuple[Form, ...] = ("svd", "channel", "interpolative", "input", "spatial_hv", "spatial_vh", "tucker2", "cp")


@dataclass(frozen=True)
class Geometry:
    """Where a patch is taken from a map, one number per axis: (H, W), or (D, H, W) for a 3-D Conv.

    A 1-D Conv has kernel `(k, 1)`, a Gemm `(1, 1)`. `pads` is in ONNX order: all begins, then all ends.
    """

    kernel: tuple[int, ...] = (1, 1)
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        """Raise ValueError where the numbers of axes do not agree."""
        axes = len(self.kernel)
        if (len(self.strides), len(self.pads), len(self.dilations)) != (axes, 2 * axes, axes):
            raise ValueError(f"strides {self.strides}, pads {self.pads}, dilations {self.dilations} for {self.kernel}")

    @property
    def margins(self) -> list[tuple[int, int]]:
        """Padding before and after the map on each axis."""
        axes = len(self.kernel)
        return list(zip(self.pads[:axes], self.pads[axes:], strict=True))

    def output_size(self, *size: int) -> tuple[int, ...]:
        """Size of the output map for an input map of `size`, one number per axis (ONNX Conv)."""
        axes = zip(size, self.kernel, self.strides, self.dilations, self.margins, strict=True)
        return tuple((n + sum(margin) - d * (k - 1) - 1) // s + 1 for n, k, s, d, margin in axes)


@dataclass(frozen=True, eq=False)
class Layer:
    """One optimizable linear layer of the graph.

    Attributes:
        name: name of the Conv, Gemm or MatMul node, unique in the graph.
        op: its ONNX operator.
        kind: how the chain is written back. `conv1d`, `conv2d`, `conv3d`: Conv nodes. `gemm`: Gemm nodes on an
            `(N, I)` matrix. `matmul`: MatMul nodes on a `(..., I)` tensor, and an Add. `map`: a Gemm or
            MatMul behind a Flatten or Reshape of a C×H×W map, written as Conv nodes on that map (kernel
            = the whole map, no padding) and a Flatten to `(N, O)`.
        input: tensor the chain reads: `(N, I, H, W)`, `(N, I, L)`, `(N, I, D, H, W)`, `(N, I)` or `(..., I)`.
        output: tensor the chain writes: the node's own output, or that of the Add which holds its bias.
        nodes: names of the nodes the chain replaces.
        weight: `(O, I, *kernel)` float32, `y = W x + b`, alpha and beta of a Gemm multiplied in.
        bias: `(O,)` float32, zeros where there is none.
        geometry: kernel, strides, pads and dilations.
        input_size: size of the input map, one number per axis, at the model's own size (1, 1 for gemm and matmul).
        positions: output positions of one example: Ho·Wo, Do·Ho·Wo, or the product of a MatMul's inner dimensions.
        weight_shape: shape of the weight as it stands in the graph.
        half: the weight is float16 in the graph.
        initializers: names of weight and bias tensors in the graph, for looking trained values up.
        others: the other places where the graph applies the same weight and bias, in its order; each a layer
            of the same kind. One chain of factors then stands in all places.
    """

    name: str
    op: str
    kind: Kind
    input: str
    output: str
    nodes: tuple[str, ...]
    weight: Array
    bias: Array
    geometry: Geometry
    input_size: tuple[int, ...]
    positions: int
    weight_shape: tuple[int, ...]
    half: bool = False
    initializers: tuple[str, ...] = ()
    others: tuple[Layer, ...] = ()

    @property
    def uses(self) -> tuple[Layer, ...]:
        """This layer and the others of its weight."""
        return self, *self.others

    @property
    def params(self) -> int:
        """Elements of weight and bias, as the graph holds them: no bias, none counted (its chain gets one)."""
        return self.weight.size + (self.bias.size if len(self.initializers) > 1 else 0)

    @property
    def patch(self) -> int:
        """Elements of one input patch, `D = I·kh·kw`."""
        return math.prod(self.weight.shape[1:])

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one example in all places: `positions · O · D`, `D` the elements of a patch."""
        return sum(use.positions for use in self.uses) * self.weight.size


@dataclass(frozen=True)
class Frozen:
    """A Conv, Gemm or MatMul that stays as it is, and why."""

    name: str
    op: str
    weight_shape: tuple[int, ...]
    params: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """What a layer becomes.

    Attributes:
        form: of the chain.
        ranks: `(r,)`, or `(r1, r2)` for `tucker2`.
    """

    form: Form
    ranks: tuple[int, ...]


Plan: TypeAlias = Mapping[str, Choice]
