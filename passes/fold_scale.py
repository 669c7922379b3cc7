"""Fold a constant per-channel Add, Sub, Mul or Div after a linear layer into its weight and bias.

TensorFlow writes the bias of a Conv as an Add: `s y + t` with `s = 1`. A scalar counts as the same value in
every channel; a constant that varies along any other axis than the channels is no such thing and stays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxneutrino.affine import Editor, Linear, Vector

OPS = ("Add", "Sub", "Mul", "Div")


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Fold until nothing more folds: chains (Mul, then Add) go in one after the other."""
    editor = Editor(model)
    notes: list[str] = []
    for node in [node for node in editor.graph.node if node.op_type in OPS and len(node.input) == 2]:
        for index in (0, 1):
            layer = editor.linear(node.input[index])
            constant = editor.arrays.get(node.input[1 - index])
            if layer is None or layer.node is node or constant is None:
                continue
            values = per_channel(layer, editor.arrays[layer.node.input[1]].ndim, constant)
            if values is None:
                continue
            affine = _affine(node, index, values)
            if affine is not None and editor.fold(layer, *affine, node):
                notes.append(f"{node.op_type} {node.name} folded into {layer.node.op_type} {layer.node.name}")
            break
    return editor.result(), notes


def per_channel(layer: Linear, rank: int, constant: NDArray[np.generic]) -> Vector | None:
    """The constant as one value per output channel `(O,)`, or None where broadcasting says otherwise.

    Args:
        layer: the linear layer.
        rank: of its output, equal to that of its weight; a MatMul's may be higher, so only vectors count.
        constant: broadcast against the output from the right.
    """
    matmul = layer.node.op_type == "MatMul"
    if constant.ndim > (1 if matmul else rank) or constant.dtype.kind != "f":
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    expected = list(shape)
    expected[1] = 1
    if any(entry != 1 for entry in expected) or shape[1] not in (1, layer.channels):
        return None
    return constant.astype(np.float64).ravel() * np.ones(layer.channels)


def _affine(node: NodeProto, index: int, values: Vector) -> tuple[Vector, Vector] | None:
    """Scale and shift that the node applies to its input number `index`."""
    one, zero = np.ones_like(values), np.zeros_like(values)
    if node.op_type == "Add":
        return one, values
    if node.op_type == "Mul":
        return values, zero
    if node.op_type == "Sub":
        return (one, -values) if index == 0 else (-one, values)
    if index == 1 or not values.all():
        return None
    return one / values, zero
