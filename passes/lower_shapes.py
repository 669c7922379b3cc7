"""Training copy: Shape, Size and what is computed from them become constants, now that all shapes are fixed.

Exports compute the targets of Reshape, Expand, Resize or Slice at run time, through float scales too (Shape, Cast,
Mul, Floor, Cast, Concat). None of that has a gradient; as constants it tells the other passes what they need.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxneutrino.graph import arrays, attributes, copied, opset, tensor_types

LARGEST = 1024
LARGEST_FLOAT = 8  # a float constant of more elements may be a weight, which must stay one
ROUNDS = 8
SOURCES = ("Shape", "Size")
# What exports do with shapes; the results of these operators on tensors of a few numbers are exact.
# fmt: off
ARITHMETIC = frozenset((
    "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "Floor", "Ceil", "Round", "Cast", "Identity",
    "Gather", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Tile", "Transpose",
    "ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum", "Equal", "Greater", "Less", "Not", "And", "Or", "Where",
    "ConstantOfShape", "Range", "Sqrt", "Pow",
))
# fmt: on


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Fold until nothing more is known: each folded Reshape may tell the shape that a later Shape asks for."""
    notes: list[str] = []
    for _ in range(ROUNDS):
        if not any(node.op_type in SOURCES for node in model.graph.node):
            break
        model, found = _folded(model)
        if not found:
            break
        notes += found
    return model, notes


def _folded(model: ModelProto) -> tuple[ModelProto, list[str]]:
    types, constants = tensor_types(model, {}), arrays(model)
    version = opset(model) or 0
    outputs = {value.name for value in model.graph.output}
    folded: dict[str, NDArray[np.generic]] = {}
    kept: list[NodeProto] = []
    notes: list[str] = []
    for node in model.graph.node:
        values = None
        if node.domain in ("", "ai.onnx") and not outputs.intersection(node.output):
            if node.op_type in SOURCES and node.input[0] in types:
                values = [_source(node, types[node.input[0]].shape)]
            elif node.op_type in ARITHMETIC and folded.keys() & set(node.input):
                values = _computed(node, {**constants, **folded}, folded, version)
        if values is None:
            kept.append(node)
            continue
        folded.update(zip(node.output, values, strict=True))
        notes.append(f"{node.op_type} {node.name} made a constant: all shapes are fixed")
    if not notes:
        return model, []
    copy = copied(model)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    copy.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in folded.items())
    return copy, notes


def _source(node: NodeProto, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if node.op_type == "Size":
        return np.asarray(np.prod(shape, dtype=np.int64), np.int64)
    own = attributes(node)
    start = own["start"].i if "start" in own else 0
    end = own["end"].i if "end" in own else None
    return np.asarray(shape[start:end], np.int64)


def _computed(
    node: NodeProto, values: dict[str, NDArray[np.generic]], folded: dict[str, NDArray[np.generic]], version: int
) -> list[NDArray[np.generic]] | None:
    """The node's outputs, None where an input is unknown or may be a weight."""
    given = {name: values[name] for name in node.input if name and name in values}
    if any(name and name not in given for name in node.input):
        return None
    for name, value in given.items():
        if value.size > LARGEST or (value.dtype.kind == "f" and name not in folded and value.size > LARGEST_FLOAT):
            return None
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "fold", inputs, results)
    alone = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        found = ReferenceEvaluator(alone).run(None, given)
    except Exception:  # what the reference cannot compute stays in the graph
        return None
    made = [np.asarray(value) for value in found]
    return made if all(value.size <= LARGEST for value in made) else None
