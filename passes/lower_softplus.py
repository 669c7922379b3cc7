"""Training copy: Softplus and Mish become Relu, Where, Exp and Log (Misra 2019, "Mish").

Softplus(x) = log(1 + eˣ) = max(x, 0) + log(1 + e^(-|x|))        Mish(x) = x tanh(Softplus(x))

-|x| is written as a Where whose gradient at x = 0 is one: with Abs, whose gradient there is zero, the whole would
have the gradient 0 instead of 1/2.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Softplus and Mish."""
    return rewritten(model, {"Softplus": _softplus, "Mish": _mish})


def _softplus(writer: Writer) -> None:
    _soft(writer, writer.node.output[0])


def _mish(writer: Writer) -> None:
    gate = writer.add("Tanh", [_soft(writer)])
    writer.add("Mul", [writer.node.input[0], gate], writer.node.output[0])


def _soft(writer: Writer, output: str | None = None) -> str:
    source = writer.node.input[0]
    positive = writer.add("Greater", [source, writer.number(0.0)])
    below = writer.add("Where", [positive, writer.add("Neg", [source]), source])
    one_more = writer.add("Add", [writer.add("Exp", [below]), writer.number(1.0)])
    return writer.add("Add", [writer.add("Relu", [source]), writer.add("Log", [one_more])], output)
