"""Training copy: a BatchNormalization that could not be folded becomes Mul and Add with constants.

ONNX Runtime's training graph would switch it to batch statistics without a word. With `s = gamma /
sqrt(var + epsilon)` and `t = beta - s mean` it is `s x + t`, both of shape `(C, 1, ..., 1)`.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxneutrino.affine import batchnorm_affine
from onnxneutrino.graph import (
    arrays,
    complete_inputs,
    copied,
    declared_shape,
    fresh_name,
    inferred,
    used_names,
)


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite each BatchNormalization in inference form whose input rank shape inference knows."""
    copy = copied(model)
    graph = copy.graph
    constants = arrays(model)
    taken = used_names(model)
    shapes = {value.name: declared_shape(value) for value in (*inferred(model).graph.value_info, *graph.input)}
    notes: list[str] = []
    for node in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        shape = shapes.get(node.input[0])
        affine = batchnorm_affine(node, constants)
        if affine is None or shape is None:
            why = "it is not in inference form with constant statistics" if affine is None else "its rank is unknown"
            notes.append(f"BatchNormalization {node.name} kept: {why}")
            continue
        dtype = constants[node.input[1]].dtype
        form = (-1,) + (1,) * (len(shape) - 2)
        names = []
        for suffix, value in zip(("scale", "shift"), affine, strict=True):
            names.append(fresh_name(taken, f"{node.name}.{suffix}"))
            graph.initializer.append(numpy_helper.from_array(value.astype(dtype).reshape(form), names[-1]))
        _replace(copy, node, names, fresh_name(taken, f"{node.output[0]}.scaled"), taken)
        notes.append(f"BatchNormalization {node.name} lowered to Mul and Add")
    return complete_inputs(copy), notes


def _replace(model: ModelProto, node: NodeProto, names: list[str], scaled: str, taken: set[str]) -> None:
    nodes = model.graph.node
    index = list(nodes).index(node)
    mul = helper.make_node("Mul", [node.input[0], names[0]], [scaled], fresh_name(taken, f"{node.name}.Mul"))
    add = helper.make_node("Add", [scaled, names[1]], [node.output[0]], fresh_name(taken, f"{node.name}.Add"))
    nodes.insert(index, mul)
    nodes.insert(index + 1, add)
    del nodes[index + 2]
