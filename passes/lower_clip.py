"""Training copy: Clip with a bound that is computed at run time becomes Max and Min.

Clip(x, a, b) = min(max(x, a), b)

The runtime's gradient of Clip leaves out the bounds without a word; those of Max and Min reach every input.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Clip that has a computed bound."""
    return rewritten(model, {"Clip": _clip})


def _clip(writer: Writer) -> None:
    bounds = [(operator, index) for operator, index in (("Max", 1), ("Min", 2)) if writer.input(index) is not None]
    if all(writer.is_constant(index) for _, index in bounds):
        raise Kept("its own gradient is right")
    value = writer.node.input[0]
    for operator, index in bounds:
        output = writer.node.output[0] if index == bounds[-1][1] else None
        value = writer.add(operator, [value, writer.node.input[index]], output)
