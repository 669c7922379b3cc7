"""Training copy: float16 becomes float32; ONNX Runtime has no float16 gradients on the CPU, and steps would vanish."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxneutrino.graph import attributes, copied
from onnxneutrino.walk import graphs
from onnxneutrino.weights import array

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Constants, inputs, outputs and Casts, bodies of If, Loop and Scan included."""
    copy = copied(model)
    found = [_single(graph) for graph in graphs(copy.graph)]
    if not any(found):
        return model, []
    del copy.graph.value_info[:]
    return copy, [f"{sum(found)} float16 constants and tensors made float32"]


def _single(graph: GraphProto) -> int:
    count = 0
    for tensor in graph.initializer:
        count += _single_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        count += _single_type(value)
    for node in graph.node:
        own = attributes(node)
        for attribute in own.values():
            if attribute.type == AttributeProto.TENSOR:
                count += _single_tensor(attribute.t)
        # `dtype` names the type of what a node makes up: EyeLike, RandomNormal and their kind.
        for name in ("to", "dtype"):
            if name in own and own[name].i == HALF:
                own[name].CopyFrom(helper.make_attribute(name, SINGLE))
                count += 1
    return count


def _single_tensor(tensor: TensorProto) -> int:
    if tensor.data_type != HALF:
        return 0
    value = array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return 1


def _single_type(value: ValueInfoProto) -> int:
    if value.type.tensor_type.elem_type != HALF:
        return 0
    value.type.tensor_type.elem_type = SINGLE
    return 1
