"""Training copy: functions with a short closed form become that form.

Reciprocal(x) = 1 / x                 Tan(x) = sin x / cos x        Softsign(x) = x / (1 + |x|)
Sinh(x) = (eˣ - e⁻ˣ) / 2              Cosh(x) = (eˣ + e⁻ˣ) / 2
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Reciprocal, Softsign, Tan, Sinh and Cosh."""
    return rewritten(
        model, {"Reciprocal": _reciprocal, "Softsign": _softsign, "Tan": _tan, "Sinh": _sinh, "Cosh": _cosh}
    )


def _reciprocal(writer: Writer) -> None:
    writer.add("Div", [writer.number(1.0), writer.node.input[0]], writer.node.output[0])


def _softsign(writer: Writer) -> None:
    source = writer.node.input[0]
    size = writer.add("Add", [writer.add("Abs", [source]), writer.number(1.0)])
    writer.add("Div", [source, size], writer.node.output[0])


def _tan(writer: Writer) -> None:
    source = writer.node.input[0]
    writer.add("Div", [writer.add("Sin", [source]), writer.add("Cos", [source])], writer.node.output[0])


def _sinh(writer: Writer) -> None:
    _hyperbolic(writer, "Sub")


def _cosh(writer: Writer) -> None:
    _hyperbolic(writer, "Add")


def _hyperbolic(writer: Writer, joined: str) -> None:
    source = writer.node.input[0]
    rising, falling = writer.add("Exp", [source]), writer.add("Exp", [writer.add("Neg", [source])])
    both = writer.add(joined, [rising, falling])
    writer.add("Mul", [both, writer.number(0.5)], writer.node.output[0])
