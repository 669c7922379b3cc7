"""Training copy: PRelu, LeakyRelu with a negative slope, ThresholdedRelu and Shrink become Where.

PRelu(x) = s x where x < 0, else x; the slope s may be learned        ThresholdedRelu(x) = x where x > α, else 0
Shrink(x) = x + b where x < -λ, x - b where x > λ, else 0

LeakyRelu's own gradient takes the sign of x from the output, which a negative slope turns round.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every PRelu, ThresholdedRelu and Shrink, and LeakyRelu where its slope is negative."""
    return rewritten(model, {"PRelu": _prelu, "LeakyRelu": _leaky, "ThresholdedRelu": _thresholded, "Shrink": _shrink})


def _prelu(writer: Writer) -> None:
    _bent(writer, writer.node.input[1])


def _leaky(writer: Writer) -> None:
    alpha = writer.attribute("alpha", 0.01)
    if alpha >= 0:
        raise Kept("its own gradient is right")
    _bent(writer, writer.number(alpha))


def _bent(writer: Writer, slope: str) -> None:
    source = writer.node.input[0]
    negative = writer.add("Less", [source, writer.number(0.0)])
    writer.add("Where", [negative, writer.add("Mul", [source, slope]), source], writer.node.output[0])


def _thresholded(writer: Writer) -> None:
    source = writer.node.input[0]
    above = writer.add("Greater", [source, writer.number(writer.attribute("alpha", 1.0))])
    writer.add("Where", [above, source, writer.number(0.0)], writer.node.output[0])


def _shrink(writer: Writer) -> None:
    source, width = writer.node.input[0], writer.attribute("lambd", 0.5)
    bias = writer.number(writer.attribute("bias", 0.0))
    below = writer.add("Less", [source, writer.number(-width)])
    above = writer.add("Greater", [source, writer.number(width)])
    right = writer.add("Where", [above, writer.add("Sub", [source, bias]), writer.number(0.0)])
    writer.add("Where", [below, writer.add("Add", [source, bias]), right], writer.node.output[0])
