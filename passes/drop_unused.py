"""Drop nodes and initializers that no output depends on."""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino import graph


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Drop what is not needed, and say how much."""
    result = graph.drop_unused(model)
    nodes = len(model.graph.node) - len(result.graph.node)
    weights = len(model.graph.initializer) - len(result.graph.initializer)
    counts = ((nodes, "unused nodes"), (weights, "unused initializers"))
    return result, [f"{count} {what} dropped" for count, what in counts if count]
