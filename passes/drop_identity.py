"""Drop nodes that compute nothing: Identity, and Dropout when it is not training."""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from onnxneutrino.graph import arrays, consumers, copied, producers, replace_uses


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Join the input of such a node to its readers.

    Where its output is a graph output, the node before it writes that name instead; that needs a node whose
    output is no graph output itself. Otherwise the node stays.
    """
    copy = copied(model)
    graph = copy.graph
    constants = arrays(model)
    notes: list[str] = []
    for node in list(graph.node):
        if node.op_type == "Dropout":
            training = node.input[2] if len(node.input) > 2 else ""
            if any(node.output[1:]) and _is_read(copy, node.output[1]):
                continue
            if training and (training not in constants or constants[training].any()):
                continue
        elif node.op_type != "Identity":
            continue
        if _bypass(copy, node):
            graph.node.remove(node)
            notes.append(f"{node.op_type} {node.name} dropped")
    return copy, notes


def _is_read(model: ModelProto, tensor: str) -> bool:
    return bool(consumers(model.graph).get(tensor))


def _bypass(model: ModelProto, node: NodeProto) -> bool:
    graph = model.graph
    source, target = node.input[0], node.output[0]
    readers = consumers(graph)
    if None not in readers.get(target, []):
        replace_uses(graph, target, source)
        return True
    maker = producers(graph).get(source)
    others = [reader for reader in readers[source] if reader is not node]
    if maker is None or None in others:
        return False
    for index, name in enumerate(maker.output):
        if name == source:
            maker.output[index] = target
    replace_uses(graph, source, target)
    return True
