"""The gradients of Conv, Relu and Gather in operators that ONNX Runtime executes faster than its own kernels.

`ConvGrad` (com.microsoft, CPU, 1.19.2) unfolds every image for the weight and folds it back for the input, no faster
with two threads than with one, and a depthwise one does so for each channel of each image; `ReluGrad` branches on every
element; `GatherGrad` adds element by element, as if an index came twice. With dY the gradient of `Y = Conv(X, W)`, p
the pads, s the strides and d the dilations:

* dX of a Conv of stride 1 is a Conv of dY with W transposed and flipped, padded by d (k - 1) - p (Dumoulin and Visin,
  A guide to convolution arithmetic for deep learning, 2016, relationship 13). ConvGrad is left with dW and db.
* dW of a dense Conv, `dW[o, c, a] = sum_n sum_y dY[n, o, y] X[n, c, s y + d a - p]`, is a Conv of the images
  `X[:, c]`, whose channels are the images of the batch, with the kernels `dY[:, o]`, dilated by s, in steps of d. At
  stride 1 X and dY can change places: the kernel then comes out flipped.
* dW of a depthwise Conv is a depthwise Conv of N C channels whose kernels are the maps of dY, summed over images.
* dX of a Relu is `dY * HardSigmoid(Y)` with a slope at which every positive normal number gives 1.
* dX of a Gather that only changes the order (the last node of an `interpolative` chain) is a Gather that puts it back.

Both dW, and those Convs (forward and for dX) that gain from it, run in blocks of channels. Everything else, and every
Conv whose shapes are not known, keeps its node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxneutrino.blocked_layout import BLOCKED, WHOLE_CHANNELS, BlockedNodes, channel_block, whole
from onnxneutrino.conv_geometry import ConvGeometry, Shape
from onnxneutrino.walk import attributes, copied

MICROSOFT = "com.microsoft"
# Elementwise operators that give zero for zeros: the channels that fill a block stay zero.
KEEPING_ZERO = ("Relu", "Add", "Sum", "Identity")
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
# Dense Convs, batch 64, one thread, least of 9, ms in order / in blocks: 64 to 24 channels, 3x3 on 16x16 7.0 / 5.3; 32
# to 32, 3x3 on 16x16 4.3 / 2.7, 3x1 1.4 / 0.9; 16 to 16, 3x3 on 32x32 5.0 / 2.7, 3x1 1.6 / 0.9; 64 to 44, 1x3 on 8x8
# 1.0 / 0.7; 24 to 64, 1x1 on 16x16 0.6 / 0.6. Copies to and from blocks took 1.3 ms for 16 channels of 32x32 and 0.3
# for 32 of 16x16, and channels that fill a block are work: 16 to 18, 1x3 on 32x32 1.9 / 1.8.
FEW_TAPS, MOST_DENSE_FEW_TAPS = 3, 256
MOST_FILLED = 1.35
# dW of a dense Conv, one thread: a copy of an image or of kernels in blocks takes about 1.25 and 1 ns an element,
# unfolding in ConvGrad so many for an element and tap, by places of dY (small maps cost more).
COPY_IMAGE, COPY_KERNELS = 1.25, 1.0
UNFOLD = ((16, 1.5), (64, 0.7), (256, 0.35), (math.inf, 0.25))
# What is about even with one thread gains with two, from which ConvGrad gains nothing: for 3x3 on 16 channels of 32x32
# it took 5.5 ms with one and 7.8 with two, the Conv in blocks without its copies 3.5 and 1.8.
LEAST_SAVED = 0.6
# The kernels of one block of images are read for every image and must stay in the cache of a core: 3x3 on 64 channels
# of 32x32 (4 MB) took 89 ms against 58 of ConvGrad, on 16 of them (1 MB) 5.6 against 5.5.
CACHE_BYTES = 1 << 20
BLOCKS_AT_ONCE = 4


def faster_gradients(model: ModelProto) -> ModelProto:
    """The same training graph with Conv, ConvGrad, ReluGrad and GatherGrad rewritten where that is faster.

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
    made.graph.node.extend(graph.finished([value.name for value in made.graph.output]))
    known = {entry.domain for entry in made.opset_import}
    made.opset_import.extend(helper.make_opsetid(name, 1) for name in (MICROSOFT, BLOCKED) if name not in known)
    return made


class _Graph:
    """The nodes of the new graph and what is known of its tensors."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._nodes = BlockedNodes(model)
        self._shapes: dict[str, Shape] = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        self._orders = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if tensor.data_type in (TensorProto.INT32, TensorProto.INT64) and len(tensor.dims) == 1
        }

    def finished(self, outputs: list[str]) -> list[NodeProto]:
        """All nodes, the outputs of the graph in their usual order."""
        for name in outputs:
            self._nodes.ordered(name)
        return self._nodes.nodes

    def rewrite(self, node: NodeProto) -> None:
        """Add the node, or what takes its place."""
        nodes = self._nodes
        plain = node.domain in ("", "ai.onnx")
        if node.domain == MICROSOFT and node.op_type == "ReluGrad":
            dy, y = node.input
            if nodes.stays_blocked(dy, y):
                mask = nodes.elementwise("HardSigmoid", [y], alpha=STEEP, beta=0.0)
                nodes.elementwise("Mul", [dy, mask], node.output[0])
            else:
                mask = nodes.add("HardSigmoid", [y], alpha=STEEP, beta=0.0)
                nodes.add("Mul", [dy, mask], output=node.output[0])
        elif node.domain == MICROSOFT and node.op_type == "ConvGrad":
            self._conv_gradient(node)
        elif node.domain == MICROSOFT and node.op_type == "GatherGrad" and self._permutes(node):
            axis = attributes(node)["axis"].i
            back = nodes.integers(np.argsort(self._orders[node.input[1]]).tolist())
            nodes.add("Gather", [node.input[2], back], output=node.output[0], axis=axis)
        elif plain and node.op_type == "Conv":
            self._conv(node)
        elif plain and node.op_type in KEEPING_ZERO and self._alike(node.input) and nodes.stays_blocked(*node.input):
            nodes.elementwise(node.op_type, node.input, node.output[0])
        else:
            nodes.put(node)

    def _permutes(self, node: NodeProto) -> bool:
        """Whether the Gather whose gradient a GatherGrad is takes everything along its axis once."""
        _, order, dy = node.input
        known = order in self._orders and self._alike([dy, node.output[0]])
        return known and np.array_equal(np.sort(self._orders[order]), np.arange(len(self._orders[order])))

    def _alike(self, names: Sequence[str]) -> bool:
        """Whether the shapes are known and the same: nothing is broadcast."""
        return names[0] in self._shapes and len({self._shapes.get(name) for name in names}) == 1

    def _conv(self, node: NodeProto) -> None:
        x, w, bias = (*node.input, "")[:3]
        conv = self._geometry(node, x, w)
        if conv is not None and _in_blocks(conv):
            self._nodes.convolve(x, w, bias, conv, node.output[0])
        else:
            self._nodes.put(node)

    def _conv_gradient(self, node: NodeProto) -> None:
        dy, x, w = node.input
        outputs = [*node.output, "", ""][:3]
        conv = self._geometry(node, x, w)
        if conv is None or not (conv.group == 1 or conv.depthwise):
            self._nodes.put(node)
            return
        if outputs[0] and self._input_gradient(dy, w, conv, outputs[0]):
            outputs[0] = ""
        # A ConvGrad that stays for dX makes dW as well.
        if not outputs[0] and self._weight_gradient(dy, x, conv, outputs[1]):
            if outputs[2]:
                sums = self._nodes.add("ReduceSum", [dy, self._nodes.integers([2, 3])], keepdims=0)
                self._nodes.add("ReduceSum", [sums, self._nodes.integers([0])], output=outputs[2], keepdims=0)
            return
        if any(outputs):
            left = NodeProto()
            left.CopyFrom(node)
            del left.output[:]
            # The kernel asks for dW whether it is wanted or not.
            left.output.extend([outputs[0], outputs[1] or self._nodes.name(), *outputs[2 : 2 + bool(outputs[2])]])
            self._nodes.put(left)

    def _input_gradient(self, dy: str, w: str, conv: ConvGeometry, output: str) -> bool:
        """Add dX; False, and nothing added, where ConvGrad keeps it."""
        turned = conv.transposed
        if not conv.unstrided or min(turned.pads, default=0) < 0:
            return False
        if math.prod(conv.x[2:]) > MOST_PLACES * math.prod(conv.out):
            return False
        flipped = self._nodes.flipped(w, conv)
        if _in_blocks(turned):
            self._nodes.convolve(dy, flipped, "", turned, output, transposed=not conv.depthwise)
            return True
        if not conv.depthwise:
            flipped = self._nodes.add("Transpose", [flipped], perm=[1, 0, *range(2, 2 + conv.rank)])
        self._nodes.add("Conv", [dy, flipped], output=output, **turned.attributes)
        return True

    def _weight_gradient(self, dy: str, x: str, conv: ConvGeometry, output: str) -> bool:
        """Add dW where it is wanted; False, and nothing added, where ConvGrad keeps it."""
        nodes, block = self._nodes, channel_block()
        if conv.depthwise:
            fits = bool(block) and _small(conv) and conv.x[0] * conv.x[1] % block == 0
            if fits and output:
                nodes.correlate_depthwise(dy, x, conv, output)
            return fits
        swapped = _swapped(conv)
        if swapped is None or not output:
            return swapped is not None
        if swapped:
            made = nodes.correlate(dy, conv.y, conv.transposed.pads, x, conv.x, conv)
            nodes.add("Identity", [nodes.flipped(made, conv)], output=output)
        else:
            made = nodes.correlate(x, conv.x, conv.used_pads, dy, conv.y, conv)
            nodes.add("Transpose", [made], output=output, perm=[1, 0, 2, 3])
        return True

    def _geometry(self, node: NodeProto, x: str, w: str) -> ConvGeometry | None:
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
        return ConvGeometry(*shapes, strides, dilations, pads, known["group"].i if "group" in known else 1)


def _small(conv: ConvGeometry) -> bool:
    """Whether a depthwise Conv gains from blocks of channels."""
    most = MOST_BLOCKED_MANY_TAPS if conv.taps >= MANY_TAPS else MOST_BLOCKED
    return conv.rank == 2 and math.prod(conv.x[2:]) <= most


def _in_blocks(conv: ConvGeometry) -> bool:
    """Whether a Conv, forward or for dX, can run in blocks of channels and gains from it."""
    block = channel_block()
    if not block or conv.rank != 2:
        return False
    if conv.depthwise:
        return _small(conv) and conv.x[1] % block == 0
    channels, filters = conv.x[1], conv.w[0]
    if conv.group != 1 or channels % WHOLE_CHANNELS or channels < block:
        return False
    if whole(channels) * whole(filters) > MOST_FILLED * channels * filters:
        return False
    return conv.taps >= MANY_TAPS or (conv.taps >= FEW_TAPS and math.prod(conv.out) <= MOST_DENSE_FEW_TAPS)


def _swapped(conv: ConvGeometry) -> bool | None:
    """Whether X gives the kernels for dW of a dense Conv, in place of dY; None where ConvGrad keeps it."""
    block = channel_block()
    if not block or conv.rank != 2 or conv.group != 1 or conv.x[0] % block or conv.taps == 1:
        return None
    ways = []
    for swapped, image, kernels in ((False, conv.x, conv.y), (True, conv.y, conv.x)):
        if kernels[1] % WHOLE_CHANNELS == 0 and (conv.unstrided or not swapped):
            places, filters = math.prod(kernels[2:]), whole(kernels[1])
            # Copies of both, in ns for an image of the batch.
            copies = COPY_IMAGE * math.prod(image[1:]) + COPY_KERNELS * filters * places
            cached = 4 * min(filters, BLOCKS_AT_ONCE * block) * block * places <= CACHE_BYTES
            ways.append((image[1] * filters * places, swapped, copies, cached))
    if not ways:
        return None
    _, swapped, copies, cached = min(ways)
    out = math.prod(conv.out)
    unfold = next(cost for most, cost in UNFOLD if out <= most)
    saved = unfold * conv.x[1] * conv.taps * out
    return swapped if cached and saved > LEAST_SAVED * copies else None
