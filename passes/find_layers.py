"""Mark: every Conv, ConvTranspose, Gemm and MatMul of a graph, as a `Layer` or as `Frozen` with its reason.

An analysis: the model is only read. Each reader returns a `Layer`, or the reason why there is none. Layers of one
weight become one, where the first of them stands.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, helper

from onnxneutrino.graph import Tensor, TensorType, arrays, attribute_values, consumers, has_free_sizes, producers
from onnxneutrino.plan import Array, Frozen, Geometry, Kind, Layer
from onnxneutrino.sharing import joined
from onnxneutrino.weights import is_mapped

MIN_WEIGHTS = 256
MIN_RANK = 4

UNKNOWN_SHAPE = "shape unknown: fix free dimensions with --input-shape"

# Operators that keep the order of the elements of one example.
_IDENTICAL = frozenset({"Identity", "Dropout"})
_FLATTENING = _IDENTICAL | {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
# Operators that keep the meaning of the axes.
_POINTWISE = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Gelu", "Sigmoid", "Tanh", "Clip", "HardSwish"})
_NCHW_TO_NHWC = [0, 2, 3, 1]
_CONVS: Mapping[int, Kind] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}  # by the number of axes


@dataclass(frozen=True, eq=False)
class _View:
    """What the readers look up.

    Attributes:
        values: the constants.
        roots: the name in `values` of each constant, and of each Identity of one.
        types: tensor types at batch 1.
        producers: the node that makes a tensor.
        readers: the nodes that read a tensor, one entry per use, None for the graph's outputs.
        resizable: an input leaves more than its batch free, so that maps may have other sizes than in `types`.
    """

    values: Mapping[str, Tensor]
    roots: Mapping[str, str]
    types: Mapping[str, TensorType]
    producers: Mapping[str, NodeProto]
    readers: Mapping[str, list[NodeProto | None]]
    resizable: bool

    def value(self, name: str) -> Tensor | None:
        """The constant, None where `name` is none."""
        return self.values[self.roots[name]] if name in self.roots else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape at batch 1, None where it is not fully known."""
        return self.types[name].shape if name in self.types else None


@dataclass(frozen=True, eq=False)
class _Constants:
    """A layer's weight and bias as float32, None for no bias; `names` are their tensors in the graph."""

    weight: Array
    bias: Array | None
    names: tuple[str, ...]
    shape: tuple[int, ...]
    half: bool


@dataclass(frozen=True)
class _Map:
    """A tensor `(N, C, H, W)`, its H and W, and whether its flattened form counts the channels last."""

    name: str
    size: tuple[int, int]
    channels_last: bool


def find_layers(
    model: ModelProto,
    types: Mapping[str, TensorType],
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[Layer | Frozen]:
    """List all Conv, ConvTranspose, Gemm and MatMul nodes in graph order, those in bodies of If and Loop too.

    Args:
        model: its node names are unique.
        types: the fully known tensor types at batch 1, by tensor name.
        exclude: patterns (fnmatch, with case) of layers to freeze. They are compared with the names of the
            node, its outputs and its constants; a tensor's name counts without its `:0` too.
        only: patterns of the layers to keep; empty for all.
    """
    view = _view(model, types)
    found: list[Layer | Frozen] = []
    for node in model.graph.node:
        found.extend(_in_bodies(node, node.name, view))
        if _is_linear(node):
            result = _unselected(node, exclude, only) or _READERS[node.op_type](node, view)
            found.append(result if isinstance(result, Layer) else _frozen(node, node.name, view, result))
    return joined(found, lambda root: len(_users(root, view)))


def _is_linear(node: NodeProto) -> bool:
    return node.op_type in _READERS and node.domain in ("", "ai.onnx")


def _unselected(node: NodeProto, exclude: Sequence[str], only: Sequence[str]) -> str | None:
    tensors = [*node.output, *node.input[1:]]
    names = {node.name, *tensors, *(name.split(":")[0] for name in tensors)}
    for pattern in exclude:
        if _matches(names, pattern):
            return f"excluded by --exclude '{pattern}'"
    return "not matched by --only" if only and not any(_matches(names, pattern) for pattern in only) else None


def _matches(names: Collection[str], pattern: str) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _conv(node: NodeProto, view: _View) -> Layer | str:
    constants = _constants(node.input[1], node.input[2] if len(node.input) > 2 else "", view)
    if isinstance(constants, str):
        return constants
    weight, attributes = constants.weight, attribute_values(node)
    outputs, channels, *kernel = weight.shape
    if len(kernel) not in _CONVS:
        return f"convolution over {len(kernel)} axes"
    if attributes.get("group", 1) != 1:
        return "depthwise convolution" if channels == 1 else "grouped convolution"
    size, target = view.shape(node.input[0]), view.shape(node.output[0])
    if size is None or target is None:
        return UNKNOWN_SHAPE
    axes = len(kernel)
    strides, dilations = (list(attributes.get(name, [1] * axes)) for name in ("strides", "dilations"))
    if view.resizable and max(strides) > 1 and attributes.get("auto_pad", b"").startswith(b"SAME"):
        return "auto_pad with a stride on a map of free size: export with explicit pads"
    pads = _pads(attributes, size[2:], kernel, strides, dilations)
    geometry = Geometry(
        kernel=_axes(kernel, 1),
        strides=_axes(strides, 1),
        pads=(*_axes(pads[:axes], 0), *_axes(pads[axes:], 0)),
        dilations=_axes(dilations, 1),
    )
    constants = replace(constants, weight=weight.reshape(outputs, channels, *geometry.kernel))
    return _layer(node, _CONVS[axes], constants, geometry, _axes(size[2:], 1), math.prod(target[2:]))


def _axes(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """At least two axes; a 1-D Conv is a 2-D one whose map is one element wide."""
    return tuple(values) if len(values) > 1 else (values[0], fill)


def _pads(
    attributes: Mapping[str, Any],
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Explicit pads, all begins before all ends; SAME_*: an axis gives `ceil(size / stride)`."""
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        return list(attributes.get("pads", [0] * (2 * len(kernel))))
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    totals = [
        max((math.ceil(n / stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True)
    ]
    halves = [total // 2 for total in totals]
    rests = [total - half for total, half in zip(totals, halves, strict=True)]
    return halves + rests if mode == "SAME_UPPER" else rests + halves


def _gemm(node: NodeProto, view: _View) -> Layer | str:
    if node.input[0] in view.roots:
        return "the constant is the left factor"
    constants = _constants(node.input[1], node.input[2] if len(node.input) > 2 else "", view)
    if isinstance(constants, str):
        return constants
    attributes = attribute_values(node)
    if attributes.get("transA", 0):
        return "the input is transposed (transA)"
    weight = constants.weight if attributes.get("transB", 0) else constants.weight.T
    bias = constants.bias
    if bias is not None:
        bias = _per_output(bias, len(weight), rank=2)
        if bias is None:
            return f"bias of shape {view.values[constants.names[1]].shape} is not one value per output"
        bias = bias * np.float32(attributes.get("beta", 1.0))
    if attributes.get("alpha", 1.0) != 1.0:
        weight = weight * np.float32(attributes["alpha"])
    return _dense(node, replace(constants, weight=weight, bias=bias), view)


def _matmul(node: NodeProto, view: _View) -> Layer | str:
    left, right = (name in view.roots for name in node.input)
    if left or not right:
        return "the constant is the left factor" if left else "no constant weight"
    constants = _constants(node.input[1], "", view)
    if isinstance(constants, str):
        return constants
    if constants.weight.ndim != 2:
        return f"weight of rank {constants.weight.ndim}"
    constants = replace(constants, weight=constants.weight.T)
    addition = _following_add(node, len(constants.weight), view)
    if addition is None:
        return _dense(node, constants, view)
    add, name, bias = addition
    return _dense(node, replace(constants, bias=bias, names=(*constants.names, name)), view, add)


def _following_add(node: NodeProto, outputs: int, view: _View) -> tuple[NodeProto, str, Array] | None:
    """The Add that alone reads a MatMul and gives it a bias: node, name of the constant, bias `(O,)`."""
    product, shape = node.output[0], view.shape(node.output[0])
    match view.readers.get(product, []):
        case [NodeProto(op_type="Add") as add] if shape is not None:
            other = add.input[0] if add.input[1] == product else add.input[1]
            value = view.value(other)
            bias = None if value is None else _per_output(value.astype(np.float32), outputs, len(shape))
            return None if bias is None else (add, view.roots[other], bias)
    return None


def _per_output(value: Array, outputs: int, rank: int) -> Array | None:
    """`value` as `(O,)` where adding it to a tensor `(..., O)` of `rank` axes adds one number per output."""
    last = value.shape[-1] if value.ndim else 1
    if value.ndim > rank or value.size != last or last not in (1, outputs):
        return None
    return np.full(outputs, value.reshape(-1), np.float32)


def _dense(node: NodeProto, constants: _Constants, view: _View, add: NodeProto | None = None) -> Layer | str:
    """Layer of a Gemm, or of a MatMul and its `add`, whose weight is `(O, I)`: on a map, or on a matrix."""
    weight, shape = constants.weight, view.shape(node.input[0])
    outputs = len(weight)
    if shape is None or view.shape(node.output[0]) is None:
        return UNKNOWN_SHAPE
    if len(shape) < 2:
        return f"input of rank {len(shape)}"
    kind: Kind = "gemm" if node.op_type == "Gemm" else "matmul"
    source, size = node.input[0], (1, 1)
    kernel = weight.reshape(outputs, -1, 1, 1)
    found = _map_behind(source, view) if len(shape) == 2 else None
    if found is not None:
        kind, source, size = "map", found.name, found.size
        last = weight.reshape(outputs, *size, -1).transpose(0, 3, 1, 2)
        kernel = last if found.channels_last else weight.reshape(outputs, -1, *size)
    constants = replace(constants, weight=kernel if is_mapped(kernel) else np.ascontiguousarray(kernel))
    return _layer(node, kind, constants, Geometry(size), size, math.prod(shape[:-1]), source, add)


def _map_behind(name: str, view: _View) -> _Map | None:
    """The map of which the matrix `name` is the flattened form, None where there is none with H·W > 1."""
    features = (view.shape(name) or (0, 0))[1]
    while True:
        shape, producer = view.shape(name), view.producers.get(name)
        if not shape or shape[0] != 1 or math.prod(shape) != features:
            return None
        if len(shape) == 4:
            _, first, second, third = shape
            if producer is not None and _to_channels_last(producer):
                return _Map(producer.input[0], (first, second), True) if first * second > 1 else None
            if second * third > 1:
                return None if _is_channels_last(name, view) else _Map(name, (second, third), False)
        if producer is None or producer.op_type not in _FLATTENING or not _at_inference(producer, view):
            return None
        name = producer.input[0]


def _is_channels_last(name: str, view: _View) -> bool:
    """Whether the rank-4 tensor is NHWC, as far as the graph tells."""
    while (node := view.producers.get(name)) is not None and node.op_type in _POINTWISE | _IDENTICAL:
        name = node.input[0]
    if node is not None:
        return _to_channels_last(node)
    _, first, second, third = view.shape(name) or (0, 0, 0, 0)
    return third <= 4 and third < min(first, second)


def _to_channels_last(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and attribute_values(node).get("perm") == _NCHW_TO_NHWC


def _at_inference(node: NodeProto, view: _View) -> bool:
    """Whether the node is no Dropout that drops: its `training_mode` is absent or a constant false."""
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return True
    mode = view.value(node.input[2])
    return mode is not None and not mode.any()


def _constants(weight: str, bias: str, view: _View) -> _Constants | str:
    """Weight and bias of a node, or why it stays; a bias is only read, so it may be shared."""
    value = view.value(weight)
    if value is None:
        return "weight is computed at run time"
    if value.dtype not in (np.float32, np.float16):
        return f"weight is {value.dtype}, not float32 or float16"
    root = view.roots[weight]
    if None in _users(root, view):
        return "weight is a graph output"
    added = view.value(bias)
    if bias and added is None:
        return "bias is computed at run time"
    return _Constants(
        weight=value.astype(np.float32, copy=False),
        bias=None if added is None else added.astype(np.float32),
        names=(root, view.roots[bias]) if bias else (root,),
        shape=value.shape,
        half=value.dtype == np.float16,
    )


def _users(root: str, view: _View) -> list[NodeProto | None]:
    """What reads a constant, through Identity nodes too, one entry per use; None for the graph's outputs."""
    users = (user for name, own in view.roots.items() if own == root for user in view.readers.get(name, []))
    return [user for user in users if user is None or user.output[0] not in view.roots]


def _layer(
    node: NodeProto,
    kind: Kind,
    constants: _Constants,
    geometry: Geometry,
    input_size: tuple[int, ...],
    positions: int,
    source: str = "",
    add: NodeProto | None = None,
) -> Layer | str:
    weight, outputs = constants.weight, len(constants.weight)
    if weight.size < MIN_WEIGHTS or min(outputs, weight.size // outputs) < MIN_RANK:
        return "no form has fewer parameters"
    return Layer(
        name=node.name,
        op=node.op_type,
        kind=kind,
        input=source or node.input[0],
        output=(add or node).output[0],
        nodes=(node.name,) if add is None else (node.name, add.name),
        weight=weight,
        bias=np.zeros(outputs, np.float32) if constants.bias is None else constants.bias,
        geometry=geometry,
        input_size=input_size,
        positions=positions,
        weight_shape=constants.shape,
        half=constants.half,
        initializers=constants.names,
    )


def _frozen(node: NodeProto, name: str, view: _View, reason: str) -> Frozen:
    """Frozen, with the weight's shape (() where it is unknown) and the elements of weight and bias."""
    operands = list(node.input[1:])
    if node.op_type in ("Gemm", "MatMul") and node.input[1] not in view.roots:
        operands.insert(0, node.input[0])
    constants = [value for operand in operands if (value := view.value(operand)) is not None]
    shape = constants[0].shape if constants else view.shape(node.input[1]) or ()
    params = sum(value.size for value in constants)
    if node.op_type == "MatMul" and constants and (addition := _following_add(node, shape[-1], view)):
        params += view.values[addition[1]].size
    return Frozen(name, node.op_type, shape, params, reason)


def _in_bodies(node: NodeProto, path: str, view: _View) -> Iterator[Frozen]:
    """The linear nodes in the bodies of an If, Loop or Scan, named `path`/body/name."""
    for body in node.attribute:
        if body.type != AttributeProto.GRAPH:
            continue
        values = {**view.values, **arrays(helper.make_model(body.g))}
        inside = replace(view, values=values, roots={**view.roots, **{name: name for name in values}})
        for inner in body.g.node:
            name = f"{path}/{body.name}/{inner.name or inner.output[0]}"
            yield from _in_bodies(inner, name, inside)
            if _is_linear(inner):
                yield _frozen(inner, name, inside, f"inside the body of {node.op_type} {path}")


def _view(model: ModelProto, types: Mapping[str, TensorType]) -> _View:
    values = arrays(model)
    roots = {name: name for name in values}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in roots:
            roots[node.output[0]] = roots[node.input[0]]
    return _View(values, roots, types, producers(model.graph), consumers(model.graph), has_free_sizes(model))


_READERS = {"Conv": _conv, "ConvTranspose": lambda *_: "transposed convolution", "Gemm": _gemm, "MatMul": _matmul}
