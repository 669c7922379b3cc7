"""Training copy: Constant nodes become initializers, and no initializer is a graph input any more."""

from __future__ import annotations

from onnx import ModelProto, numpy_helper

from onnxneutrino.graph import arrays, copied

FIRST_IR_WITH_FREE_INITIALIZERS = 4


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Move the constants; the IR version becomes at least 4, which initializers outside the inputs need."""
    copy = copied(model)
    graph = copy.graph
    values = arrays(model)
    notes: list[str] = []
    for node in list(graph.node):
        if node.op_type == "Constant" and node.output[0] in values:
            graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
            graph.node.remove(node)
            notes.append(f"Constant {node.name} made an initializer")
    stored = {tensor.name for tensor in graph.initializer}
    for value in list(graph.input):
        if value.name in stored:
            graph.input.remove(value)
    copy.ir_version = max(copy.ir_version, FIRST_IR_WITH_FREE_INITIALIZERS)
    return copy, notes
