"""Small models from ONNX text for tests: weights drawn at random, or given."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def drawn(text: str, scaled: bool = False) -> ModelProto:
    """The graph of `text` with every declared tensor drawn at random, and a name for every node that has none.

    `scaled` divides a weight by the square root of what one output of it adds up.
    """
    model = parse_model(HEADER + text)
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) if scaled else rng.standard_normal(shape, "f4")
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), value.name))
    del model.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(body: str, inputs: str, **weights: NDArray) -> ModelProto:
    """A model of ONNX text whose output has the inferred shape and whose initializers are `weights`."""
    model = parse_model(f'<ir_version: 8, opset_import: ["" : 13]> g ({inputs}) => (float y) {{ {body} }}')
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0])
    return model
