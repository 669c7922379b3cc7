"""Fold a BatchNormalization in inference form into the Conv, ConvTranspose, Gemm or MatMul before it.

    BN(y) = gamma (y - mean) / sqrt(var + epsilon) + beta = s y + t
    s = gamma / sqrt(var + epsilon),   t = beta - s mean

Ioffe and Szegedy, Batch Normalization, ICML 2015.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.affine import Editor, batchnorm_affine
from onnxneutrino.graph import declared_shape, inferred


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Fold every BatchNormalization whose input is the output of a linear layer that nobody else reads."""
    editor = Editor(model)
    notes: list[str] = []
    ranks: dict[str, int] | None = None
    for node in [node for node in editor.graph.node if node.op_type == "BatchNormalization"]:
        layer = editor.linear(node.input[0])
        affine = batchnorm_affine(node, editor.arrays)
        if layer is None or affine is None or affine[0].shape != (layer.channels,):
            continue
        if layer.node.op_type == "MatMul":
            # Channels are axis 1 of a BatchNormalization, the last axis of a MatMul: the same at rank 2 only.
            ranks = _ranks(model) if ranks is None else ranks
            if ranks.get(layer.output) != 2:
                continue
        if editor.fold(layer, *affine, node):
            notes.append(f"BatchNormalization {node.name} folded into {layer.node.op_type} {layer.node.name}")
    return editor.result(), notes


def _ranks(model: ModelProto) -> dict[str, int]:
    graph = inferred(model).graph
    shapes = {value.name: declared_shape(value) for value in (*graph.value_info, *graph.output)}
    return {name: len(shape) for name, shape in shapes.items() if shape is not None}
