"""Training copy: Gelu and Swish become products of x and a gate (Hendrycks and Gimpel 2016; Ramachandran et al. 2017).

Gelu(x) = x/2 (1 + erf(x / √2)), or with approximate="tanh" x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))
Swish(x) = x sigmoid(α x)

The runtime differentiates the first form whichever the node has, which misses the second's gradient by up to 9e-4.
"""

from __future__ import annotations

import math

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten

CUBIC = 0.044715


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Gelu and Swish."""
    return rewritten(model, {"Gelu": _gelu, "Swish": _swish})


def _gelu(writer: Writer) -> None:
    source, form = writer.node.input[0], writer.attribute("approximate", "none")
    if form == "none":
        gate = writer.add("Erf", [writer.add("Mul", [source, writer.number(math.sqrt(0.5))])])
    elif form == "tanh":
        square = writer.add("Mul", [source, source])
        bend = writer.add("Add", [writer.add("Mul", [square, writer.number(CUBIC)]), writer.number(1.0)])
        scaled = writer.add("Mul", [source, writer.number(math.sqrt(2 / math.pi))])
        gate = writer.add("Tanh", [writer.add("Mul", [scaled, bend])])
    else:
        raise Kept(f"approximate = '{form}' is unknown")
    half = writer.add("Mul", [source, writer.number(0.5)])
    writer.add("Mul", [half, writer.add("Add", [gate, writer.number(1.0)])], writer.node.output[0])


def _swish(writer: Writer) -> None:
    source, alpha = writer.node.input[0], writer.attribute("alpha", 1.0)
    inner = source if alpha == 1 else writer.add("Mul", [source, writer.number(alpha)])
    writer.add("Mul", [source, writer.add("Sigmoid", [inner])], writer.node.output[0])
