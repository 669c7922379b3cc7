"""An ONNX network as a PyTorch module that Torch-Pruning can prune, and back into ONNX with the arrays it then has.

Only what convolutional classifiers are made of: Conv, BatchNormalization, Relu, pools, Add, Flatten, Gemm, MatMul. The
module works channel-first throughout; a Transpose that turns a map channel-last before it is flattened is left out, and
the rows of the next matrix are put in the order of the channel-first map. A shortcut without parameters that takes
every second pixel and pads channels with zeros (option A of He et al. 2016) becomes a 1×1 convolution of stride 2 with
the same function, for a dependency graph of channels cannot follow the padding; its weights count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch.nn import functional

from onnxneutrino.errors import ModelError
from onnxneutrino.graph import TensorType, attribute_values
from onnxneutrino.graph import arrays as graph_arrays
from onnxneutrino.passes import fold_batchnorm

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One operation: the module `key` where it has parameters, ONNX operator, inputs, output, ONNX attributes."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Attributes
    key: str = ""


class Net(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """The steps in order, from the one input to the one output."""

    def __init__(self, steps: list[Step], modules: Mapping[str, torch.nn.Module], source: str, target: str) -> None:
        super().__init__()
        self.steps = steps
        self.layers = torch.nn.ModuleDict(dict(modules))
        self.source, self.target = source, target

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits `(N, C)` of a batch as the ONNX network takes it."""
        values = {self.source: inputs}
        for step in self.steps:
            given = [values[name] for name in step.inputs]
            if step.key:
                values[step.output] = self.layers[step.key](given[0])
            else:
                values[step.output] = PLAIN[step.kind](given, step.attributes)
        return values[self.target]


def _max_pool(given: list[torch.Tensor], own: Attributes) -> torch.Tensor:
    ceil = bool(own.get("ceil_mode", 0))
    return functional.max_pool2d(
        given[0], own["kernel_shape"], own.get("strides", [1, 1]), _symmetric(own, 2), ceil_mode=ceil
    )


def _average_pool(given: list[torch.Tensor], own: Attributes) -> torch.Tensor:
    ceil, padded = bool(own.get("ceil_mode", 0)), bool(own.get("count_include_pad", 0))
    return functional.avg_pool2d(
        given[0], own["kernel_shape"], own.get("strides", [1, 1]), _symmetric(own, 2), ceil, padded
    )


PLAIN: dict[str, Callable[[list[torch.Tensor], Attributes], torch.Tensor]] = {
    "Relu": lambda given, own: torch.relu(given[0]),
    "Add": lambda given, own: given[0] + given[1],
    "Flatten": lambda given, own: given[0].flatten(1),
    "Transpose": lambda given, own: given[0].permute(own["perm"]),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda given, own: given[0].mean((2, 3), keepdim=True),
}


def _symmetric(own: Attributes, axes: int) -> list[int]:
    pads = list(own.get("pads", [0] * 2 * axes))
    if pads[:axes] != pads[axes:] or own.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError("PyTorch takes no pads that differ between the sides of a map")
    return pads[:axes]


def converted(model: ModelProto, types: Mapping[str, TensorType], target: str) -> Net:
    """The network up to the tensor `target`.

    Args:
        model: constants folded, shapes static but for the batch.
        types: of its tensors at batch 1.
        target: the logits.

    Raises:
        ModelError: an operator that is not known here.
    """
    arrays = graph_arrays(model)
    source = next(value.name for value in model.graph.input if value.name not in arrays)
    builder = _Builder(arrays, types)
    for node in model.graph.node:
        if node.op_type != "Constant":
            builder.add(node)
    net = Net(_needed(builder.steps, target), builder.modules, source, target)
    net.eval()
    return net


def _needed(steps: list[Step], target: str) -> list[Step]:
    wanted, found = {target}, []
    for step in reversed(steps):
        if step.output in wanted:
            wanted.update(step.inputs)
            found.append(step)
    return found[::-1]


class _Builder:
    def __init__(self, arrays: Mapping[str, NDArray[Any]], types: Mapping[str, TensorType]) -> None:
        self._arrays = arrays
        self._types = types
        self._last: dict[str, str] = {}  # channel-last tensors, by the channel-first one that stands for each
        self._orders: dict[str, tuple[int, int, int]] = {}  # flattened channel-last maps: C, H, W
        self._sliced: dict[str, tuple[str, list[int]]] = {}
        self.steps: list[Step] = []
        self.modules: dict[str, torch.nn.Module] = {}

    def add(self, node: NodeProto) -> None:
        own = attribute_values(node)
        output = node.output[0]
        before = node.input[0]
        if node.op_type == "Conv":
            self._conv(node, own)
        elif node.op_type == "BatchNormalization":
            self._layer(node, self._normalization(node, own), own)
        elif node.op_type in ("Gemm", "MatMul"):
            self._matrix(node, own)
        elif node.op_type == "Add" and node.input[1] in self._arrays:
            self._bias(node)
        elif node.op_type == "Slice":
            self._sliced[output] = (before, self._strides(node))
        elif node.op_type == "Pad":
            self._shortcut(node)
        elif node.op_type == "Transpose" and list(own["perm"]) == [0, 2, 3, 1]:
            self._last[output] = before
        elif node.op_type in ("Reshape", "Flatten"):
            if len(self._types[output].shape) != 2 or own.get("axis", 1) != 1:
                raise ModelError(f"node '{node.name}': only maps are flattened here")
            if before in self._last:
                _, channels, height, width = self._types[self._last[before]].shape
                self._orders[output] = channels, height, width
            self.steps.append(Step("Flatten", (self._last.get(before, before),), output, {"axis": 1}))
        elif node.op_type in PLAIN:
            self.steps.append(Step(node.op_type, tuple(node.input), output, own))
            if before in self._orders:
                self._orders[output] = self._orders[before]
        else:
            raise ModelError(f"node '{node.name}': {node.op_type} is not converted to PyTorch")

    def _layer(self, node: NodeProto, module: torch.nn.Module, own: Attributes) -> None:
        key = f"layer{len(self.modules)}"
        self.modules[key] = module
        kind = "Gemm" if node.op_type == "MatMul" else node.op_type
        self.steps.append(Step(kind, (node.input[0],), node.output[0], own, key))

    def _conv(self, node: NodeProto, own: Attributes) -> None:
        weight = self._arrays[node.input[1]]
        bias = self._arrays[node.input[2]] if len(node.input) > 2 else None
        self._layer(node, _conv2d(weight, bias, own), own)

    def _normalization(self, node: NodeProto, own: Attributes) -> torch.nn.Module:
        scale, shift, mean, variance = (_tensor(self._arrays[name]) for name in node.input[1:5])
        module = torch.nn.BatchNorm2d(len(scale), eps=own.get("epsilon", 1e-5))
        module.load_state_dict(
            {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}, strict=False
        )
        return module

    def _matrix(self, node: NodeProto, own: Attributes) -> None:
        weight = self._arrays[node.input[1]] * np.float32(own.get("alpha", 1.0))
        weight = weight if own.get("transB", 0) else weight.T
        if own.get("transA", 0):
            raise ModelError(f"node '{node.name}': transA is not converted to PyTorch")
        if node.input[0] in self._orders:
            channels, height, width = self._orders[node.input[0]]
            weight = weight.reshape(-1, height, width, channels).transpose(0, 3, 1, 2).reshape(len(weight), -1)
        outputs, inputs = weight.shape
        module = torch.nn.Linear(inputs, outputs)
        shift = np.zeros(outputs, np.float32)
        if len(node.input) > 2:
            shift = shift + np.float32(own.get("beta", 1.0)) * self._arrays[node.input[2]].reshape(-1)
        module.load_state_dict({"weight": _tensor(weight), "bias": _tensor(shift)})
        self._layer(node, module, {"transB": 1})

    def _bias(self, node: NodeProto) -> None:
        """An Add behind a MatMul is the bias of its layer."""
        last = self.steps[-1]
        module = self.modules.get(last.key)
        if last.output != node.input[0] or not isinstance(module, torch.nn.Linear):
            raise ModelError(f"node '{node.name}': an Add of a constant is converted behind a matrix alone")
        with torch.no_grad():
            module.bias += _tensor(self._arrays[node.input[1]].reshape(-1))
        self.steps[-1] = replace(last, output=node.output[0])

    def _strides(self, node: NodeProto) -> list[int]:
        starts, _, axes, steps = (self._arrays[name].tolist() for name in node.input[1:5])
        if any(starts) or list(axes) != [2, 3]:
            raise ModelError(f"node '{node.name}': only a Slice that leaves out pixels is converted to PyTorch")
        return list(steps)

    def _shortcut(self, node: NodeProto) -> None:
        source, strides = self._sliced[node.input[0]]
        pads = self._arrays[node.input[1]].tolist()
        if any(pads[axis] for axis in (0, 2, 3, 4, 6, 7)):
            raise ModelError(f"node '{node.name}': only a Pad of channels is converted to PyTorch")
        channels = self._types[source].shape[1]
        weight = np.zeros((channels + pads[1] + pads[5], channels, 1, 1), np.float32)
        weight[pads[1] + np.arange(channels), np.arange(channels)] = 1
        own = {"kernel_shape": [1, 1], "strides": strides, "pads": [0] * 4, "dilations": [1, 1], "group": 1}
        named = helper.make_node("Conv", [source], [node.output[0]])
        self._layer(named, _conv2d(weight, None, own), own)


def _conv2d(weight: NDArray[Any], bias: NDArray[Any] | None, own: Attributes) -> torch.nn.Module:
    groups = own.get("group", 1)
    module = torch.nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        tuple(own.get("strides", (1, 1))),
        tuple(_symmetric(own, 2)),
        tuple(own.get("dilations", (1, 1))),
        groups,
        bias=bias is not None,
    )
    state = {"weight": _tensor(weight)} if bias is None else {"weight": _tensor(weight), "bias": _tensor(bias)}
    module.load_state_dict(state)
    return module


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def exported(net: Net, like: ModelProto, tail: list[NodeProto]) -> ModelProto:
    """The module as ONNX, BatchNormalization folded; inputs, outputs, opset and version as in `like`.

    Args:
        net: pruned or not.
        like: the network it was made from.
        tail: nodes behind the logits.
    """
    nodes, tensors = [], []
    for index, step in enumerate(net.steps):
        held = _arrays_of(net.layers[step.key]) if step.key else []
        names = [f"{step.key}/{number}" for number in range(len(held))]
        tensors += [numpy_helper.from_array(array, name) for array, name in zip(held, names, strict=True)]
        own = {**step.attributes, "group": 1} if step.kind == "Conv" else step.attributes
        own = {key: value for key, value in own.items() if key not in ("training_mode", "momentum", "spatial")}
        nodes.append(helper.make_node(step.kind, [*step.inputs, *names], [step.output], f"{step.kind}_{index}", **own))
    graph = helper.make_graph([*nodes, *tail], like.graph.name, [], like.graph.output, tensors)
    graph.input.extend(value for value in like.graph.input if value.name == net.source)
    made = helper.make_model(graph, opset_imports=like.opset_import, ir_version=max(like.ir_version, 4))
    onnx.checker.check_model(made)
    folded: ModelProto = fold_batchnorm.run(made)[0]
    return folded


def _arrays_of(module: torch.nn.Module) -> list[NDArray[Any]]:
    """Parameters in the order of the inputs of the ONNX operator."""
    names = ("weight", "bias", "running_mean", "running_var")
    found = [getattr(module, name, None) for name in names]
    return [np.ascontiguousarray(value.detach().numpy(), np.float32) for value in found if value is not None]
