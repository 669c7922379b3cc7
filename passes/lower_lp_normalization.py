"""Training copy: LpNormalization becomes a division by the p-norm over one axis, p = 1 or 2.

y = x / (sum |x|ᵖ)^(1/p), and 0 where the norm is 0
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.reductions import float_shape, power
from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every LpNormalization of a float32 tensor of known shape."""
    return rewritten(model, {"LpNormalization": _lp_normalization})


def _lp_normalization(writer: Writer) -> None:
    source, p = writer.node.input[0], writer.attribute("p", 2)
    axis = writer.attribute("axis", -1) % len(float_shape(writer))
    total = writer.reduce("ReduceSum", power(writer, source, p), [axis])
    # Where the sum is 0 so is x: any other divisor gives 0, and a finite gradient.
    positive = writer.add("Greater", [total, writer.store(0.0)])
    safe = writer.add("Where", [positive, total, writer.store(1.0)])
    writer.add("Div", [source, writer.add("Sqrt", [safe]) if p == 2 else safe], writer.node.output[0])
