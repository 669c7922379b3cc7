"""Small graphs of one layer, as it is or as a chain, whose run times are those of the layer in its network.

The graph input is the layer's input at batch 1, the weights are constants of random values, a Relu follows, which
the runtime fuses as it does activations and additions in the network, and a map ends in a GlobalMaxPool: so the
runtime stores maps in blocks of channels where it would in the network, and no map is copied out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxneutrino.factors import Factors
from onnxneutrino.forms import filled
from onnxneutrino.passes.factorize import factorize
from onnxneutrino.plan import Array, Choice, Layer

INPUT = "x"
OPSET, IR = 13, 8
VALUES = 1 << 16
_DRAWN = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32)


def layer_graph(layer: Layer, choice: Choice | None, *, copies: int = 1, pools: int = 1) -> ModelProto:
    """The graph of a layer in one of its places, or of its chain.

    Args:
        layer: its shapes and geometry; its weight and `others` are not looked at.
        choice: form and ranks of the chain; None for the layer as it is.
        copies: how often it stands in the graph, side by side on the same input, with weights of its own; 0 for a
            Relu of the input alone.
        pools: GlobalMaxPool nodes behind each copy of a Conv, each one an output.
    """
    own = [_copy(layer, index) for index in range(copies)]
    nodes: list[NodeProto] = [] if own else [helper.make_node("Relu", [INPUT], ["y"], "relu")]
    outputs: list[str] = [] if own else ["y"]
    weights: dict[str, NDArray[np.generic]] = {}
    for each in own:
        nodes.extend(_nodes(each))
        weights.update(_weights(each))
        last = f"{each.output}/relu"
        nodes.append(helper.make_node("Relu", [each.output], [last], f"{each.name}/relu"))
        if not layer.kind.startswith("conv"):
            outputs.append(last)
            continue
        for index in range(pools):
            outputs.append(f"{last}/pool{index}")
            # Two of one kind are joined by the runtime.
            kind = "GlobalAveragePool" if index else "GlobalMaxPool"
            nodes.append(helper.make_node(kind, [last], outputs[-1:], outputs[-1]))
    element = TensorProto.FLOAT16 if layer.half else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, element, input_shape(layer))],
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    if choice is None:
        return model
    chain = random_factors(layer, choice)
    result: ModelProto = factorize(model, own, {each.name: chain for each in own})
    return result


def input_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of the layer's input at batch 1; positions of a MatMul are one axis."""
    inputs = layer.weight.shape[1]
    if layer.kind == "gemm":
        return 1, inputs
    if layer.kind == "matmul":
        return 1, layer.positions, inputs
    return 1, inputs, *layer.input_size[: 1 if layer.kind == "conv1d" else None]


def drawn(*shape: int) -> Array:
    """Normal values, scaled so that a chain of them neither fades nor explodes; quickly, for only time matters."""
    scaled: Array = np.resize(_DRAWN, shape) / np.float32(math.sqrt(max(math.prod(shape[1:]), 1)))
    return scaled


def random_factors(layer: Layer, choice: Choice) -> Factors:
    """A chain of the right shapes."""
    return filled(choice, layer.weight, drawn(len(layer.weight)), drawn)


def _copy(layer: Layer, index: int) -> Layer:
    name = f"layer{index}"
    nodes = (name, f"{name}/add") if layer.kind == "matmul" else (name,)
    return replace(layer, name=name, input=INPUT, output=f"{name}/output", nodes=nodes, others=())


def _nodes(layer: Layer) -> Sequence[NodeProto]:
    name, weight, bias = layer.name, f"{layer.name}/weight", f"{layer.name}/bias"
    if layer.kind == "matmul":
        return (
            helper.make_node("MatMul", [INPUT, weight], [f"{name}/product"], name),
            helper.make_node("Add", [f"{name}/product", bias], [layer.output], f"{name}/add"),
        )
    if layer.kind == "gemm":
        return (helper.make_node("Gemm", [INPUT, weight, bias], [layer.output], name, transB=1),)
    if layer.kind == "map":
        return (
            helper.make_node("Flatten", [INPUT], [f"{name}/flat"], f"{name}/flatten"),
            helper.make_node("Gemm", [f"{name}/flat", weight, bias], [layer.output], name, transB=1),
        )
    axes = slice(0, 1 if layer.kind == "conv1d" else None)
    margins = layer.geometry.margins[axes]
    return (
        helper.make_node(
            "Conv",
            [INPUT, weight, bias],
            [layer.output],
            name,
            strides=layer.geometry.strides[axes],
            pads=[begin for begin, _ in margins] + [end for _, end in margins],
            dilations=layer.geometry.dilations[axes],
        ),
    )


def _weights(layer: Layer) -> dict[str, NDArray[np.generic]]:
    outputs, inputs, *kernel = layer.weight.shape
    if layer.kind == "matmul":
        shape: tuple[int, ...] = (inputs, outputs)
    elif layer.kind in ("gemm", "map"):
        shape = (outputs, layer.patch)
    else:
        shape = (outputs, inputs, *kernel[: 1 if layer.kind == "conv1d" else None])
    dtype = np.float16 if layer.half else np.float32
    return {f"{layer.name}/weight": drawn(*shape).astype(dtype), f"{layer.name}/bias": drawn(outputs).astype(dtype)}
