"""Nodes of a graph whose maps may stand in the runtime's blocked layout (domain com.microsoft.nchwc).

A map N×C×H×W in blocks of b channels is N×(C/b)×H×W×b, with zeros for the channels that fill the last block. Convs work
on all channels of a block at once and unfold no image (Georganas et al., Anatomy of high-performance deep learning
convolutions on SIMD architectures, 2018). Elementwise operators do not ask for the order of the elements, so that a map
stays blocked from Conv to Conv; it is put back in order where, and when, a node asks for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxneutrino.conv_geometry import ConvGeometry, Shape, padded
from onnxneutrino.errors import ModelError
from onnxneutrino.runtime import Runner
from onnxneutrino.walk import reads

BLOCKED = "com.microsoft.nchwc"
# ReorderInput refuses other numbers of channels.
WHOLE_CHANNELS = 4


@functools.cache
def channel_block() -> int:
    """Channels in a block of the runtime's blocked layout on this processor; 0 where it has none."""
    most = 64
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED)
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, most, 1, 2]) for name in "xy"]
    graph = helper.make_graph([node], "block", kinds[:1], kinds[1:])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(BLOCKED, 1)]
    values = np.arange(2 * most, dtype=np.float32).reshape(1, most, 1, 2)
    try:
        runner = Runner(helper.make_model(graph, opset_imports=opsets, ir_version=8), threads=1)
        found = np.asarray(runner({"x": values})[0]).reshape(-1)
    except ModelError:
        return 0
    # Value 1, the second of the first channel, stands behind the first values of a whole block.
    return int(np.flatnonzero(found == 1.0)[0])


def whole(channels: int) -> int:
    """Channels with those that fill the last block."""
    return -(-channels // channel_block()) * channel_block()


class BlockedNodes:
    """The nodes of a new graph, in order, and which of its maps are blocked."""

    def __init__(self, model: ModelProto) -> None:
        """Start with no nodes; constants are added to the model's initializers."""
        self.nodes: list[NodeProto] = []
        self._initializers = model.graph.initializer
        self._blocks: dict[str, str] = {}
        self._channels: dict[str, int] = {}
        self._waiting: set[str] = set()
        self._count = 0

    def put(self, node: NodeProto) -> None:
        """Add a node as it is."""
        for name in reads(node):
            self.ordered(name)
        self.nodes.append(node)

    def add(self, kind: str, inputs: Sequence[str], domain: str = "", *, output: str = "", **values: Any) -> str:
        """Add a node of one output; returns its name."""
        name = output or self.name()
        self.put(helper.make_node(kind, inputs, [name], self.name(), domain=domain, **values))
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A constant."""
        name = self.name()
        self._initializers.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def name(self) -> str:
        """A name that nothing has."""
        self._count += 1
        return f"onnxneutrino/gradient/{self._count}"

    def ordered(self, name: str) -> None:
        """Make sure that a tensor stands in the usual order."""
        if name in self._waiting:
            self._waiting.remove(name)
            self.add("ReorderOutput", [self._blocks[name]], BLOCKED, output=name, channels=self._channels[name])

    def stays_blocked(self, *names: str) -> bool:
        """Whether all the maps are blocked, and one of them is so only."""
        return not self._waiting.isdisjoint(names) and all(name in self._blocks for name in names)

    def elementwise(self, kind: str, names: Sequence[str], output: str = "", **values: Any) -> str:
        """Add an operator that keeps zeros on blocked maps; returns its name, blocked as well."""
        name = output or self.name()
        made = self.add(kind, [self._blocks[own] for own in names], **values)
        self._keep(name, made, self._channels[names[0]])
        return name

    def blocked(self, name: str, shape: Shape, maps: int = 0) -> str:
        """A tensor in blocks of channels; with `maps`, as one image of so many channels."""
        fits = shape[1] % channel_block() == 0
        one = self.integers([1, maps, *shape[2:]]) if maps else ""
        if maps and not fits:
            return self.add("ReorderInput", [self.add("Reshape", [name, one])], BLOCKED)
        if name not in self._blocks:
            self._blocks[name] = self.add("ReorderInput", [name], BLOCKED)
            self._channels[name] = shape[1]
        # A block within an image is a block of the one image: nothing moves.
        return self.add("Reshape", [self._blocks[name], one]) if maps else self._blocks[name]

    def flipped(self, name: str, conv: ConvGeometry) -> str:
        """A weight with the order of the places of its kernel turned round."""
        axes = [2 + axis for axis, size in enumerate(conv.kernel) if size > 1]
        if not axes:
            return name
        last, before, back = ([value] * len(axes) for value in (-1, -(1 << 31), -1))
        return self.add("Slice", [name, *map(self.integers, (last, before, axes, back))])

    def convolve(self, x: str, w: str, bias: str, conv: ConvGeometry, output: str, *, transposed: bool = False) -> None:
        """Add `output = Conv(x, w, bias)` in blocks, dense or depthwise.

        Args:
            x: the input, C×H×W with C in whole fours (depthwise: whole blocks).
            w: the weight in its usual order; where `transposed`, C×O×kernel.
            bias: name of the bias or "".
            conv: geometry of this Conv.
            output: name of what it gives, which stays blocked until it is asked for.
            transposed: whether the first axis of `w` is that of the channels of `x`.
        """
        spare = whole(conv.w[0]) - conv.w[0]
        if bias and spare:
            bias = self.add("Pad", [bias, self.integers([0, spare])])
        kernels = self._depthwise_kernels(w, conv) if conv.depthwise else self._kernels(w, conv, transposed)
        operands = [self.blocked(x, conv.x), kernels, *filter(None, [bias])]
        self._keep(output, self.add("Conv", operands, BLOCKED, **conv.attributes), conv.w[0])

    def correlate(self, image: str, shape: Shape, pads: Shape, kernels: str, places: Shape, conv: ConvGeometry) -> str:
        """Add `Z[c, f, a] = sum_n sum_y kernels[n, f, y] image[n, c, s y + d a - p]`, the gradient of a dense weight.

        That is a Conv of C images of N channels with F kernels: the images of the batch are the channels that it sums
        over.

        Args:
            image: name of the image.
            shape: its shape N×C×H×W, N in whole blocks.
            pads: of the image, negative where it is cut; every place of it is read then.
            kernels: name of the kernels.
            places: their shape N×F×h×w, F in whole fours.
            conv: geometry with the strides s and the dilations d.

        Returns:
            Name of Z, C×F×kernel.
        """
        block = channel_block()
        images, channels, *size = shape
        made = self.add("ReorderInput", [self.add("Transpose", [image], perm=[1, 0, 2, 3])], BLOCKED)
        if any(pads):
            # The runtime's kernel works on single places beside a pad of its own: half as fast.
            made = self.add("Reshape", [made, self.integers([channels, images // block, *size, block])])
            made = self.add("Pad", [made, self.integers([0, 0, *pads[:2], 0, 0, 0, *pads[2:], 0])])
            made = self.add("Reshape", [made, self.integers([channels, images, *padded(size, pads)])])
        wide = whole(places[1])
        split = self.integers([images // block, block, wide // block, math.prod(places[2:]), block])
        moved = self.add(
            "Transpose", [self.add("Reshape", [self.blocked(kernels, places), split])], perm=[2, 0, 3, 1, 4]
        )
        moved = self.add("Reshape", [moved, self.integers([wide, images, *places[2:]])])
        turned = replace(
            conv,
            w=(places[1], images, *places[2:]),
            strides=conv.dilations,
            dilations=conv.strides,
            pads=(0, 0, 0, 0),
            group=1,
        )
        made = self.add("Conv", [made, moved], BLOCKED, **turned.attributes)
        return self.add("ReorderOutput", [made], BLOCKED, channels=places[1])

    def correlate_depthwise(self, dy: str, x: str, conv: ConvGeometry, output: str) -> None:
        """Add the gradient of a depthwise weight; N C in whole blocks."""
        images, channels, *_ = conv.x
        maps = images * channels
        kernels = self.add("Reshape", [self.blocked(dy, conv.y, maps), self.integers([maps, 1, *conv.out])])
        pads = conv.used_pads
        # Places that no kernel position reached can give more taps than there are.
        longer = any(-after >= d for after, d in zip(pads[2:], conv.dilations, strict=True))
        turned = replace(
            conv,
            w=(maps, 1, *conv.out),
            strides=conv.dilations,
            dilations=conv.strides,
            pads=tuple(max(pad, 0) for pad in pads),
            group=maps,
        )
        made = self.add("Conv", [self.blocked(x, conv.x, maps), kernels], BLOCKED, **turned.attributes)
        made = self.add("ReorderOutput", [made], BLOCKED, channels=maps)
        if longer:
            ends, axes = self.integers(conv.kernel), self.integers([2, 3])
            made = self.add("Slice", [made, self.integers([0, 0]), ends, axes])
        made = self.add("Reshape", [made, self.integers([images, channels, 1, *conv.kernel])])
        self.add("ReduceSum", [made, self.integers([0])], output=output, keepdims=0)

    def _keep(self, name: str, made: str, channels: int) -> None:
        """`made` is the tensor `name` in blocks; the tensor itself waits for a node that asks for it."""
        self._blocks[name], self._channels[name] = made, channels
        self._waiting.add(name)

    def _kernels(self, name: str, conv: ConvGeometry, transposed: bool) -> str:
        block = channel_block()
        sizes = conv.w[1::-1] if transposed else conv.w[:2]
        first, second = map(whole, sizes)
        if (first, second) != tuple(sizes):
            ends = [first - sizes[0], second - sizes[1], 0, 0]
            name = self.add("Pad", [name, self.integers([0, 0, 0, 0, *ends])])
        split = self.integers([first // block, block, second // block, block, *conv.kernel])
        order = [2, 0, 4, 5, 1, 3] if transposed else [0, 2, 4, 5, 3, 1]
        moved = self.add("Transpose", [self.add("Reshape", [name, split])], perm=order)
        return self.add("Reshape", [moved, self.integers([*map(whole, conv.w[:2]), *conv.kernel])])

    def _depthwise_kernels(self, name: str, conv: ConvGeometry) -> str:
        block = channel_block()
        split = self.integers([conv.w[0] // block, block, *conv.kernel])
        moved = self.add("Transpose", [self.add("Reshape", [name, split])], perm=[0, 2, 3, 1])
        return self.add("Reshape", [moved, self.integers(conv.w)])
