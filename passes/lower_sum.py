"""Training copy: Sum and Mean of any number of tensors become a chain of Add, which broadcasts as they do.

Sum(x₁ … xₙ) = ((x₁ + x₂) + …) + xₙ        Mean(x₁ … xₙ) = Sum(x₁ … xₙ) / n
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Sum and Mean."""
    return rewritten(model, {"Sum": _sum, "Mean": _mean})


def _sum(writer: Writer) -> None:
    inputs, target = list(writer.node.input), writer.node.output[0]
    if len(inputs) == 1:
        writer.add("Identity", inputs, target)
    else:
        writer.add("Add", [_chain(writer, inputs[:-1]), inputs[-1]], target)


def _mean(writer: Writer) -> None:
    inputs = list(writer.node.input)
    writer.add("Mul", [_chain(writer, inputs), writer.number(1 / len(inputs))], writer.node.output[0])


def _chain(writer: Writer, tensors: list[str]) -> str:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = writer.add("Add", [total, tensor])
    return total
