"""A linear layer scaled and shifted per channel, and a BatchNormalization as such a scale and shift.

    y = W x + b   and   z = s y + t   give   z = (s W) x + (s b + t)

with `s` and `t` per output channel. Computed in float64, stored in the weight's own type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from onnxneutrino.graph import (
    arrays,
    attributes,
    consumers,
    copied,
    fresh_name,
    producers,
    used_names,
    with_arrays,
)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear node and where its bias stands: in the node, in the Add after it (MatMul), or nowhere."""

    node: NodeProto
    add: NodeProto | None
    channels: int

    @property
    def output(self) -> str:
        """The tensor with the bias added."""
        return str((self.add or self.node).output[0])


def batchnorm_affine(node: NodeProto, constants: Mapping[str, NDArray[np.generic]]) -> tuple[Vector, Vector] | None:
    """Scale and shift, each `(C,)`, of a BatchNormalization in inference form, else None.

    `s = gamma / sqrt(var + epsilon)`, `t = beta - s mean` (Ioffe and Szegedy, ICML 2015).
    """
    own = attributes(node)
    training = "training_mode" in own and own["training_mode"].i
    per_activation = "spatial" in own and not own["spatial"].i
    if training or per_activation or any(node.output[1:]) or any(name not in constants for name in node.input[1:]):
        return None
    gamma, beta, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:])
    shifted = variance + (own["epsilon"].f if "epsilon" in own else 1e-5)
    if not (shifted > 0).all():  # no variance of anything: what it computes is not for us to say
        return None
    scale = gamma / np.sqrt(shifted)
    return scale, beta - scale * mean


class Editor:
    """A copy of a model being folded: its graph, its constants, and who reads what."""

    def __init__(self, model: ModelProto) -> None:
        self.model = copied(model)
        self.graph: GraphProto = self.model.graph
        self.arrays = arrays(model)
        self.changed: dict[str, NDArray[np.generic]] = {}
        self.taken = used_names(model)
        self._refresh()

    def _refresh(self) -> None:
        self.consumers = consumers(self.graph)
        self.producers = producers(self.graph)

    def only_reader(self, tensor: str) -> NodeProto | None:
        """The one node that reads the tensor, once; None if there are more uses or it is a graph output."""
        readers = self.consumers.get(tensor, [])
        return readers[0] if len(readers) == 1 else None

    def linear(self, tensor: str) -> Linear | None:
        """The linear layer that makes `tensor` and whose weight is its own, or None."""
        node = self.producers.get(tensor)
        if node is None or self.only_reader(tensor) is None:
            return None
        if node.op_type in LINEAR:
            return self._checked(node, None)
        if node.op_type == "Add":
            for name, other in (node.input, node.input[::-1]):
                before = self.producers.get(name)
                constant = self.arrays.get(other)
                if before is None or before.op_type != "MatMul" or constant is None:
                    continue
                found = self._checked(before, node) if self.only_reader(name) is node else None
                if found is not None and constant.shape == (found.channels,):
                    return found
        return None

    def _checked(self, node: NodeProto, add: NodeProto | None) -> Linear | None:
        name = node.input[1]
        weight = self.arrays.get(name)
        if weight is None or self.only_reader(name) is not node or weight.dtype.kind != "f":
            return None
        if node.op_type == "MatMul":
            return Linear(node, add, weight.shape[1]) if weight.ndim == 2 else None
        own = attributes(node)
        if node.op_type == "Gemm":
            channels = weight.shape[0 if "transB" in own and own["transB"].i else 1]
        elif node.op_type == "ConvTranspose":
            channels = weight.shape[1] * (own["group"].i if "group" in own else 1)
        else:
            channels = weight.shape[0]
        if len(node.input) > 2 and node.input[2]:
            bias = self.arrays.get(node.input[2])
            if bias is None or not (bias.size == 1 or bias.shape in ((channels,), (1, channels))):
                return None
        return Linear(node, add, channels)

    def fold(self, layer: Linear, scale: Vector, shift: Vector, gone: NodeProto) -> bool:
        """Put `scale` and `shift` into the layer and let it write what `gone` wrote; False where it cannot.

        A MatMul without an Add has no place for a shift.
        """
        node = layer.node
        if node.op_type == "MatMul" and layer.add is None and shift.any():
            return False
        weight = self.arrays[node.input[1]]
        self._set(node.input[1], (weight.astype(np.float64) * _along_channels(node, weight, scale)))
        if layer.add is not None:
            index = 0 if layer.add.input[0] in self.arrays else 1
            self._set_bias(layer.add, index, scale, shift, 1.0, weight.dtype)
        elif node.op_type != "MatMul":
            beta = attributes(node)["beta"].f if "beta" in attributes(node) else 1.0
            if node.op_type == "Gemm":
                for index in reversed([i for i, a in enumerate(node.attribute) if a.name == "beta"]):
                    del node.attribute[index]
            self._set_bias(node, 2, scale, shift, beta, weight.dtype)
        last = layer.add or node
        last.output[0] = gone.output[0]
        self.graph.node.remove(gone)
        self._refresh()
        return True

    def _set_bias(
        self,
        node: NodeProto,
        index: int,
        scale: Vector,
        shift: Vector,
        beta: float,
        dtype: np.dtype[np.generic],
    ) -> None:
        name = node.input[index] if index < len(node.input) else ""
        before = self.arrays[name].astype(np.float64).ravel() if name else np.zeros(1)
        bias = beta * before * scale + shift
        if name and self.only_reader(name) is node and self.arrays[name].shape == bias.shape:
            self._set(name, bias)
            return
        if not name and not bias.any():
            return
        fresh = fresh_name(self.taken, f"{node.name or node.output[0]}.bias")
        value = np.asarray(bias, dtype)
        self.arrays[fresh] = value
        self.graph.initializer.append(numpy_helper.from_array(value, fresh))
        if self.model.ir_version < 4:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            self.graph.input.append(helper.make_tensor_value_info(fresh, kind, value.shape))
        if index < len(node.input):
            node.input[index] = fresh
        else:
            node.input.append(fresh)

    def _set(self, name: str, value: NDArray[np.float64]) -> None:
        self.arrays[name] = self.changed[name] = value.astype(self.arrays[name].dtype)

    def result(self) -> ModelProto:
        """The folded model."""
        return with_arrays(self.model, self.changed)


def _along_channels(node: NodeProto, weight: NDArray[np.generic], scale: Vector) -> NDArray[np.float64]:
    """`scale`, one per output channel, in a shape that multiplies the node's weight."""
    if node.op_type == "MatMul":
        return scale[None, :]
    own = attributes(node)
    if node.op_type == "Gemm":
        return scale[:, None] if "transB" in own and own["transB"].i else scale[None, :]
    ones = (1,) * (weight.ndim - 2)
    if node.op_type == "Conv":
        return scale.reshape(-1, 1, *ones)
    groups = own["group"].i if "group" in own else 1
    per_group = np.repeat(scale.reshape(groups, 1, -1), weight.shape[0] // groups, axis=1)
    return per_group.reshape(weight.shape[0], weight.shape[1], *ones)
