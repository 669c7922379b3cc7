"""Training copy: Elu, Selu and Celu become Where and Exp.

Elu(x) = x where x > 0, else α (eˣ - 1)        Selu(x) = γ Elu(x)        Celu(x) = x where x > 0, else α (e^(x/α) - 1)

Both branches of a Where are differentiated, and an infinite one times zero is NaN: the exponential is taken of 0
where x > 0. At x = 0 the gradient is that of the exponential, which is the right one where the function is smooth.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten

# Klambauer et al. 2017, "Self-Normalizing Neural Networks"; ONNX's defaults.
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Elu, Selu and Celu."""
    return rewritten(model, {"Elu": _elu, "Selu": _selu, "Celu": _celu})


def _elu(writer: Writer) -> None:
    _unit(writer, writer.attribute("alpha", 1.0), 1.0, 1.0)


def _selu(writer: Writer) -> None:
    gamma = writer.attribute("gamma", SELU_GAMMA)
    _unit(writer, gamma * writer.attribute("alpha", SELU_ALPHA), gamma, 1.0)


def _celu(writer: Writer) -> None:
    alpha = writer.attribute("alpha", 1.0)
    if alpha == 0:
        raise Kept("its alpha is 0")
    _unit(writer, alpha, 1.0, 1.0 / alpha)


def _unit(writer: Writer, height: float, slope: float, rate: float) -> None:
    """`slope · x` where x > 0, else `height (e^(rate x) - 1)`."""
    source, zero = writer.node.input[0], writer.number(0.0)
    positive = writer.add("Greater", [source, zero])
    below = writer.add("Where", [positive, zero, source])
    line = source
    if slope != 1:
        line = writer.add("Mul", [source, writer.number(slope)])
    if rate != 1:
        below = writer.add("Mul", [below, writer.number(rate)])
    grown = writer.add("Sub", [writer.add("Exp", [below]), writer.number(1.0)])
    curve = writer.add("Mul", [grown, writer.number(height)])
    writer.add("Where", [positive, line, curve], writer.node.output[0])
