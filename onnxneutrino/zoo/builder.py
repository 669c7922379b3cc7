"""A graph built layer by layer, without a framework: standard operators of opset 17, a symbolic batch, NCHW.

Weights are drawn from a normal distribution of variance 2 / fan-in (He et al. 2015, "Delving Deep into Rectifiers");
biases are zero. BatchNormalization stays a node of its own, in inference form: it begins as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxneutrino.errors import ModelError

OPSET, IR = 17, 8
INPUT, OUTPUT, BATCH = "input", "logits", "N"
SMALL = 64  # pixels: nets made for large images leave their first strides out up to here
ROUNDED = 4  # channels of a network that is not of its full width are multiples of this


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph and the shape of one example: `(C, H, W)`, or `(D,)` behind a Flatten."""

    name: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Size of the first axis behind the batch."""
        return self.shape[0]

    @property
    def small(self) -> bool:
        """Whether an image is too small for the first strides of a network that was made for large ones."""
        return max(self.shape[1:]) <= SMALL


def scaled(channels: int, width: float) -> int:
    """Channels of a network `width` times as wide; the full width leaves them as they are."""
    return channels if width == 1 else max(ROUNDED, round(channels * width / ROUNDED) * ROUNDED)


def _slid(x: Tensor, kernel: int, stride: int, pad: int) -> tuple[int, ...]:
    """Size of the map that a square window gives.

    Raises:
        ModelError: it does not fit in.
    """
    size = tuple((length + 2 * pad - kernel) // stride + 1 for length in x.shape[1:])
    if min(size) < 1:
        raise ModelError(
            f"the images are too small for this network: a window of {kernel} pixels finds {min(x.shape[1:])}"
        )
    return size


class Builder:
    """Collects the nodes and weights of one graph; each method adds a layer and returns what it gives."""

    def __init__(self, seed: int | None) -> None:
        """Draw weights with the seed; None leaves them without values, which is enough to count them."""
        self._random = None if seed is None else np.random.default_rng(seed)
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []

    def conv(
        self,
        x: Tensor,
        filters: int,
        kernel: int,
        stride: int = 1,
        *,
        pad: int | None = None,
        group: int = 1,
        bias: bool = False,
    ) -> Tensor:
        """A square Conv; `pad` on every side keeps the size at stride 1 where it is not given."""
        name = self._next("conv")
        border = kernel // 2 if pad is None else pad
        shape = (filters, x.channels // group, kernel, kernel)
        weights = [self._drawn(f"{name}.weight", shape), *([self._filled(f"{name}.bias", filters)] if bias else [])]
        size = _slid(x, kernel, stride, border)
        return self._add(
            "Conv",
            [x.name, *weights],
            (filters, *size),
            name,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[border] * 4,
            group=group,
        )

    def norm(self, x: Tensor) -> Tensor:
        """BatchNormalization with scale 1, offset 0, mean 0 and variance 1."""
        name = self._next("norm")
        own = (("scale", 1.0), ("offset", 0.0), ("mean", 0.0), ("variance", 1.0))
        weights = [self._filled(f"{name}.{part}", x.channels, value) for part, value in own]
        return self._add("BatchNormalization", [x.name, *weights], x.shape, name, epsilon=1e-5, momentum=0.9)

    def relu(self, x: Tensor) -> Tensor:
        """Relu."""
        return self._add("Relu", [x.name], x.shape)

    def relu6(self, x: Tensor) -> Tensor:
        """Relu that ends at 6, as a Clip."""
        bounds = [self._constant(name, np.float32(value)) for name, value in (("zero", 0.0), ("six", 6.0))]
        return self._add("Clip", [x.name, *bounds], x.shape)

    def conv_norm_relu(self, x: Tensor, filters: int, kernel: int, stride: int = 1, *, group: int = 1) -> Tensor:
        """Conv without a bias, BatchNormalization, Relu."""
        return self.relu(self.norm(self.conv(x, filters, kernel, stride, group=group)))

    def max_pool(self, x: Tensor, kernel: int, stride: int, pad: int = 0) -> Tensor:
        """MaxPool, square."""
        return self._pool("MaxPool", x, kernel, stride, pad)

    def average_pool(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        """AveragePool, square, without a border."""
        return self._pool("AveragePool", x, kernel, stride, 0)

    def global_average(self, x: Tensor) -> Tensor:
        """Mean over the map, `(C,)`."""
        return self.flatten(self._add("GlobalAveragePool", [x.name], (x.channels, 1, 1)))

    def flatten(self, x: Tensor) -> Tensor:
        """All values of an example in one axis."""
        return self._add("Flatten", [x.name], (math.prod(x.shape),), axis=1)

    def dense(self, x: Tensor, units: int) -> Tensor:
        """Gemm with a bias."""
        name = self._next("dense")
        weights = [self._drawn(f"{name}.weight", (units, x.channels)), self._filled(f"{name}.bias", units)]
        return self._add("Gemm", [x.name, *weights], (units,), name, transB=1)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of two tensors of one shape."""
        return self._add("Add", [x.name, y.name], x.shape)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Channels one after the other."""
        channels = sum(part.channels for part in parts)
        return self._add("Concat", [part.name for part in parts], (channels, *parts[0].shape[1:]), axis=1)

    def channels(self, x: Tensor, start: int, end: int) -> Tensor:
        """The channels from `start` up to `end`."""
        own = (("starts", start), ("ends", end), ("axes", 1))
        bounds = [self._constant(f"{name}_{value}", np.array([value])) for name, value in own]
        return self._add("Slice", [x.name, *bounds], (end - start, *x.shape[1:]))

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        """Channel shuffle (Zhang et al. 2018, ShuffleNet): channel `g·C/G + c` becomes `c·G + g`."""
        channels, *size = x.shape
        apart = self._reshape(x, (groups, channels // groups, *size))
        turned = (channels // groups, groups, *size)
        return self._reshape(self._add("Transpose", [apart.name], turned, perm=[0, 2, 1, 3, 4]), x.shape)

    def subsampled(self, x: Tensor, stride: int, channels: int) -> Tensor:
        """Every `stride`-th pixel, and zeros for new channels behind: the shortcut A of He et al. 2016."""
        most = np.iinfo(np.int64).max
        own = (("starts", [0, 0]), ("ends", [most, most]), ("axes", [2, 3]), ("steps", [stride, stride]))
        bounds = [self._constant(f"pixels_{name}_{stride}", np.array(value)) for name, value in own]
        size = tuple(-(-length // stride) for length in x.shape[1:])
        fewer = self._add("Slice", [x.name, *bounds], (x.channels, *size))
        new = channels - x.channels
        pads = self._constant(f"channels_{new}", np.array([0, 0, 0, 0, 0, new, 0, 0]))
        return self._add("Pad", [fewer.name, pads], (channels, *size), mode="constant")

    def model(self, name: str, image: tuple[int, int, int], logits: Tensor) -> ModelProto:
        """The whole graph, called `name`, from images `(C, H, W)` to the tensor `logits`."""
        self._nodes[-1].output[0] = OUTPUT
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, *image])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, *logits.shape])],
            self._weights,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="onnxneutrino")

    def _pool(self, operator: str, x: Tensor, kernel: int, stride: int, pad: int) -> Tensor:
        size = _slid(x, kernel, stride, pad)
        own = {"strides": [stride] * 2, "pads": [pad] * 4}
        return self._add(operator, [x.name], (x.channels, *size), "", kernel_shape=[kernel] * 2, **own)

    def _reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        sizes = self._constant("shape_" + "x".join(map(str, shape)), np.array([0, *shape]))  # 0 keeps the batch
        return self._add("Reshape", [x.name, sizes], shape)

    def _add(
        self, operator: str, inputs: list[str], shape: tuple[int, ...], name: str = "", **attributes: Any
    ) -> Tensor:
        name = name or self._next(operator.lower())
        self._nodes.append(helper.make_node(operator, inputs, [f"{name}_out"], name=name, **attributes))
        return Tensor(f"{name}_out", shape)

    def _next(self, kind: str) -> str:
        """A name for a node that none has yet: `conv1`, `conv2` ..."""
        return f"{kind}{1 + sum(node.name.rstrip('0123456789') == kind for node in self._nodes)}"

    def _drawn(self, name: str, shape: tuple[int, ...]) -> str:
        if self._random is None:
            self._weights.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
        else:
            deviation = math.sqrt(2 / math.prod(shape[1:]))
            values = self._random.standard_normal(shape, np.float32) * np.float32(deviation)
            self._weights.append(numpy_helper.from_array(values, name))
        return name

    def _filled(self, name: str, count: int, value: float = 0.0) -> str:
        self._weights.append(numpy_helper.from_array(np.full(count, value, np.float32), name))
        return name

    def _constant(self, name: str, value: Any) -> str:
        """A constant, once for all nodes that read it."""
        if all(tensor.name != name for tensor in self._weights):
            self._weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name
