"""Training copy: HardSwish and HardSigmoid become Mul, Add and Clip, which have gradients.

HardSigmoid(x) = clip(alpha x + beta, 0, 1)        HardSwish(x) = x clip(x / 6 + 1/2, 0, 1)
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every HardSwish and HardSigmoid."""
    return rewritten(model, {"HardSwish": _hard_swish, "HardSigmoid": _hard_sigmoid})


def _hard_swish(writer: Writer) -> None:
    source, target = writer.node.input[0], writer.node.output[0]
    writer.add("Mul", [source, _clipped_line(writer, 1 / 6, 0.5)], target)


def _hard_sigmoid(writer: Writer) -> None:
    alpha, beta = writer.attribute("alpha", 0.2), writer.attribute("beta", 0.5)
    _clipped_line(writer, alpha, beta, writer.node.output[0])


def _clipped_line(writer: Writer, slope: float, offset: float, output: str | None = None) -> str:
    scaled = writer.add("Mul", [writer.node.input[0], writer.store(slope)])
    shifted = writer.add("Add", [scaled, writer.store(offset)])
    return writer.add("Clip", [shifted, writer.store(0.0), writer.store(1.0)], output)
