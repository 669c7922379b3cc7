"""The gradient of a Conv and of a Relu in operators that ONNX Runtime executes faster than its own kernels.

`ConvGrad` (com.microsoft, CPU, 1.19.2) unfolds every image for the weight and folds it back for the input, and a
depthwise one does so for each channel of each image; `ReluGrad` branches on every element. With dY the gradient of
`Y = Conv(X, W)`, p the pads, s the strides and d the dilations:

* dX of a Conv of stride 1 is a Conv of dY with W transposed and flipped, padded by d (k - 1) - p (Dumoulin and Visin,
  A guide to convolution arithmetic for deep learning, 2016, relationship 13). ConvGrad is left with dW and db.
* dW of a depthwise Conv, `dW[c, a] = sum_n sum_y dY[n, c, y] X[n, c, s y + d a - p]`, is a depthwise Conv of N C
  channels whose kernels are the maps of dY, whose dilations are s and whose strides are d, summed over images. Both run
  in blocks of channels (domain com.microsoft.nchwc), where the runtime works on all channels of a block at once.
* dX of a Relu is `dY * HardSigmoid(Y)` with a slope at which every positive normal number gives 1.

Everything else, and every Conv whose shapes are not known, keeps its node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxneutrino.errors import ModelError
from onnxneutrino.runtime import Runner
from onnxneutrino.walk import attributes, copied

Shape = tuple[int, ...]
MICROSOFT, BLOCKED = "com.microsoft", "com.microsoft.nchwc"
# 3e38 times the least normal float32, 1.2e-38, is above 1; the product with a large Y is infinite, which is cut to 1.
# On 64 x 64 maps of 16x16: 0.5 ms with the Mul, against 5.0 of ReluGrad, 0.9 of Greater, Cast, Mul and 4.5 of Where.
STEEP = 3e38
# A Conv of dY does its work at all H W places of X, ConvGrad at the Ho Wo of dY only: a kernel as large as its map
# (4x4 on 4x4) took 0.47 ms against 0.07.
MOST_PLACES = 2.0
# Maps are copied into blocks of channels and back. Least of 11, batch 64, two threads: dW of a 3x3 kernel took 0.32 ms
# against 5.2 on 256 channels of 4x4, 0.7 against 4.0 on 128 of 8x8, 2.1 against 3.5 on 64 of 16x16, 7.9 against 9.1 on
# 64 of 32x32; with three taps 1.0 against 1.1 on 48 of 16x16, 4.1 against 3.2 on 128 of 16x16, 8.8 against 3.5 on 64 of
# 32x32. What a map costs ConvGrad beside its size is what is saved: small maps gain.
MOST_BLOCKED = 128
MANY_TAPS, MOST_BLOCKED_MANY_TAPS = 9, 256


@dataclass(frozen=True)
class _Conv:
    """Geometry of a Conv: `X` is N×C×map, `W` is O×(C/group)×kernel, `dY` is N×O×out; pads are begins, then ends."""

    x: Shape
    w: Shape
    strides: Shape
    dilations: Shape
    pads: Shape
    group: int

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    @property
    def kernel(self) -> Shape:
        return self.w[2:]

    @property
    def out(self) -> Shape:
        ends = zip(
            self.x[2:], self.kernel, self.strides, self.dilations, self.pads, self.pads[self.rank :], strict=False
        )
        return tuple((size + low + high - d * (k - 1) - 1) // s + 1 for size, k, s, d, low, high in ends)

    @property
    def depthwise(self) -> bool:
        return self.group > 1 and self.group == self.x[1] == self.w[0]

    @property
    def transposed_pads(self) -> Shape:
        """Pads of the Conv that gives dX, where the strides are 1."""
        reach = [d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True)]
        return tuple(r - p for r, p in zip(reach + reach, self.pads, strict=True))

    @property
    def kept_places(self) -> bool:
        """Whether dX as a Conv of dY costs about what ConvGrad spends on it."""
        return math.prod(self.x[2:]) <= MOST_PLACES * math.prod(self.out)

    @property
    def blocked(self) -> bool:
        """Whether a depthwise Conv gains from blocks of channels."""
        most = MOST_BLOCKED_MANY_TAPS if math.prod(self.kernel) >= MANY_TAPS else MOST_BLOCKED
        return self.depthwise and self.rank == 2 and math.prod(self.x[2:]) <= most


def faster_gradients(model: ModelProto) -> ModelProto:
    """The same training graph with ConvGrad, ReluGrad and small depthwise Conv rewritten where that is faster.

    Args:
        model: a training graph (`training_model.onnx` of the artifacts) of opset >= 13, shapes in its value_info.

    Returns:
        A new model with the same inputs and outputs, equal up to rounding.
    """
    made = copied(model)
    graph = _Graph(made)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for node in nodes:
        graph.rewrite(node)
    made.graph.node.extend(graph.nodes)
    known = {entry.domain for entry in made.opset_import}
    made.opset_import.extend(helper.make_opsetid(name, 1) for name in (MICROSOFT, BLOCKED) if name not in known)
    return made


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


class _Graph:
    """The nodes of the new graph, in order, and what is known of its tensors."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes: list[NodeProto] = []
        self._initializers = graph.initializer
        self._shapes: dict[str, Shape] = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self._inputs = {value.name for value in graph.input}
        self._blocks: dict[str, str] = {}
        self._count = 0

    def rewrite(self, node: NodeProto) -> None:
        """Add the node, or what takes its place."""
        if node.domain == MICROSOFT and node.op_type == "ReluGrad":
            mask = self._add("HardSigmoid", [node.input[1]], alpha=STEEP, beta=0.0)
            self._add("Mul", [node.input[0], mask], output=node.output[0])
        elif node.domain == MICROSOFT and node.op_type == "ConvGrad":
            self._conv_gradient(node)
        elif node.domain in ("", "ai.onnx") and node.op_type == "Conv" and node.input[1] in self._inputs:
            self._conv(node)
        else:
            self.nodes.append(node)

    def _conv(self, node: NodeProto) -> None:
        conv = self._geometry(node, node.input[0], node.input[1])
        if conv is None or not self._in_blocks(conv):
            self.nodes.append(node)
            return
        weight = self._blocked_weight(node.input[1], conv)
        operands = [self._blocked(node.input[0], conv.x), weight, *node.input[2:]]
        made = self._add("Conv", operands, BLOCKED, **_attributes(conv, conv.pads))
        self._add("ReorderOutput", [made], BLOCKED, output=node.output[0], channels=conv.x[1])

    def _conv_gradient(self, node: NodeProto) -> None:
        dy, x, w = node.input
        outputs = [*node.output, "", ""][:3]
        conv = self._geometry(node, x, w)
        if conv is None or not (conv.group == 1 or conv.depthwise):
            self.nodes.append(node)
            return
        if outputs[0] and self._input_gradient(dy, w, conv, outputs[0]):
            outputs[0] = ""
        maps = conv.x[0] * conv.x[1]
        # A ConvGrad that stays for dX makes dW as well.
        if not outputs[0] and conv.blocked and channel_block() and maps % channel_block() == 0:
            if outputs[1]:
                self._depthwise_weight(dy, x, conv, outputs[1])
            if outputs[2]:
                self._add("ReduceSum", [dy, self._integers([0, 2, 3])], output=outputs[2], keepdims=0)
            outputs = ["", "", ""]
        if any(outputs):
            left = NodeProto()
            left.CopyFrom(node)
            del left.output[:]
            # The kernel asks for dW whether it is wanted or not.
            left.output.extend([outputs[0], outputs[1] or self._name(), *outputs[2 : 2 + bool(outputs[2])]])
            self.nodes.append(left)

    def _input_gradient(self, dy: str, w: str, conv: _Conv, output: str) -> bool:
        """Add dX; False, and nothing added, where ConvGrad keeps it."""
        pads = conv.transposed_pads
        if any(step != 1 for step in conv.strides) or min(pads, default=0) < 0 or not conv.kept_places:
            return False
        flipped = self._flipped(w, conv)
        channels = _Conv((conv.x[0], conv.w[0], *conv.out), conv.w, conv.strides, conv.dilations, pads, conv.group)
        if self._in_blocks(conv):
            operands = [self._blocked(dy, channels.x), self._blocked_weight(flipped, conv)]
            made = self._add("Conv", operands, BLOCKED, **_attributes(channels, pads))
            self._add("ReorderOutput", [made], BLOCKED, output=output, channels=conv.x[1])
            return True
        if not conv.depthwise:
            flipped = self._add("Transpose", [flipped], perm=[1, 0, *range(2, 2 + conv.rank)])
        self._add("Conv", [dy, flipped], output=output, **_attributes(channels, pads))
        return True

    def _depthwise_weight(self, dy: str, x: str, conv: _Conv, output: str) -> None:
        images, channels, *_ = conv.x
        maps = images * channels
        kernels = self._add(
            "Reshape", [self._blocked(dy, (images, channels, *conv.out), maps), self._integers([maps, 1, *conv.out])]
        )
        pads = list(conv.pads[:2])
        longer = False
        for axis in range(2):
            reach = conv.strides[axis] * (conv.out[axis] - 1) + conv.dilations[axis] * (conv.kernel[axis] - 1) + 1
            after = reach - conv.x[2 + axis] - conv.pads[axis]
            # Places that no kernel position reached can give more taps than there are.
            longer |= -after >= conv.dilations[axis]
            pads.append(max(after, 0))
        made = self._add(
            "Conv",
            [self._blocked(x, conv.x, maps), kernels],
            BLOCKED,
            kernel_shape=list(conv.out),
            strides=list(conv.dilations),
            dilations=list(conv.strides),
            pads=pads,
            group=maps,
        )
        made = self._add("ReorderOutput", [made], BLOCKED, channels=maps)
        if longer:
            ends, axes = self._integers(list(conv.kernel)), self._integers([2, 3])
            made = self._add("Slice", [made, self._integers([0, 0]), ends, axes])
        made = self._add("Reshape", [made, self._integers([images, channels, 1, *conv.kernel])])
        self._add("ReduceSum", [made, self._integers([0])], output=output, keepdims=0)

    def _in_blocks(self, conv: _Conv) -> bool:
        return conv.blocked and channel_block() > 0 and conv.x[1] % channel_block() == 0

    def _blocked(self, name: str, shape: Shape, maps: int = 0) -> str:
        """A tensor in blocks of channels; with `maps`, as one image of so many channels."""
        whole = shape[1] % channel_block() == 0
        one = self._integers([1, maps, *shape[2:]]) if maps else ""
        if maps and not whole:
            name = self._add("Reshape", [name, one])
        if name not in self._blocks:
            self._blocks[name] = self._add("ReorderInput", [name], BLOCKED)
        # A block within an image is a block of the one image: nothing moves.
        return self._add("Reshape", [self._blocks[name], one]) if maps and whole else self._blocks[name]

    def _blocked_weight(self, name: str, conv: _Conv) -> str:
        block = channel_block()
        split = self._integers([conv.w[0] // block, block, *conv.kernel])
        moved = self._add("Transpose", [self._add("Reshape", [name, split])], perm=[0, 2, 3, 1])
        return self._add("Reshape", [moved, self._integers(conv.w)])

    def _flipped(self, name: str, conv: _Conv) -> str:
        axes = [2 + axis for axis, size in enumerate(conv.kernel) if size > 1]
        if not axes:
            return name
        last, before, back = ([value] * len(axes) for value in (-1, -(1 << 31), -1))
        return self._add("Slice", [name, *map(self._integers, (last, before, axes, back))])

    def _geometry(self, node: NodeProto, x: str, w: str) -> _Conv | None:
        """Shapes and attributes of a Conv or ConvGrad; None where not all of them are known."""
        known = attributes(node)
        shapes = self._shapes.get(x, ()), self._shapes.get(w, ())
        padding = known["auto_pad"].s if "auto_pad" in known else b""
        if padding not in (b"", b"NOTSET") or len(shapes[0]) < 3 or len(shapes[0]) != len(shapes[1]):
            return None
        if 0 in shapes[0] + shapes[1]:
            return None
        rank = len(shapes[0]) - 2
        one, none = (1,) * rank, (0,) * (2 * rank)
        strides, dilations, pads = (
            tuple(known[name].ints) if name in known and known[name].ints else default
            for name, default in (("strides", one), ("dilations", one), ("pads", none))
        )
        return _Conv(*shapes, strides, dilations, pads, known["group"].i if "group" in known else 1)

    def _integers(self, values: Sequence[int]) -> str:
        name = self._name()
        self._initializers.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def _add(self, kind: str, inputs: Sequence[str], domain: str = "", *, output: str = "", **values: Any) -> str:
        name = output or self._name()
        self.nodes.append(helper.make_node(kind, inputs, [name], self._name(), domain=domain, **values))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"onnxneutrino/gradient/{self._count}"


def _attributes(conv: _Conv, pads: Shape) -> dict[str, Any]:
    return {
        "kernel_shape": list(conv.kernel),
        "strides": list(conv.strides),
        "dilations": list(conv.dilations),
        "pads": list(pads),
        "group": conv.group,
    }
