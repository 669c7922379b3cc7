"""Training copy: Pow in the forms whose own gradient is wrong or missing.

The runtime leaves out the gradient with respect to the exponent without a word, and an exponent of integers breaks
its gradient graph; that with respect to a base that it broadcasts is wrong. So the base is expanded, a constant
exponent becomes float, and with one that is computed at run time

aᵇ = e^(b log a) where a > 0, else Pow(a, ⌈b⌉)

where a negative base has a power for an integer b only, and none has a gradient with respect to b. Each branch is
given the base 1 where the other is chosen, so that no gradient is NaN.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite Pow with a computed exponent, a constant one of another type than float, or a base that broadcasts."""
    return rewritten(model, {"Pow": _pow})


def _pow(writer: Writer) -> None:
    base, exponent = writer.node.input
    target = writer.node.output[0]
    if writer.dtype(base) != np.float32:
        raise Kept("its base is not float")
    constant = writer.is_constant(1)
    is_float = writer.dtype(exponent) == np.float32
    shape = writer.shape(target)
    broadcast = not writer.is_constant(0) and writer.shape(base) != shape
    if constant and is_float and not broadcast:
        raise Kept("its own gradient is right")
    if broadcast:
        base = writer.add("Expand", [base, writer.store(list(shape), np.int64)])
    if not is_float:
        exponent = writer.add("Cast", [exponent], to=TensorProto.FLOAT)
    if constant:
        writer.add("Pow", [base, exponent], target)
    elif writer.is_constant(0) and (np.asarray(writer.constant(0)) > 0).all():
        logarithm = writer.store(np.log(np.asarray(writer.constant(0), np.float64)))
        writer.add("Exp", [writer.add("Mul", [exponent, logarithm])], target)
    else:
        _of_computed(writer, base, exponent, target)


def _of_computed(writer: Writer, base: str, exponent: str, target: str) -> None:
    one = writer.store(1.0)
    positive = writer.add("Greater", [base, writer.store(0.0)])
    logarithm = writer.add("Log", [writer.add("Where", [positive, base, one])])
    curve = writer.add("Exp", [writer.add("Mul", [exponent, logarithm])])
    rest = writer.add("Pow", [writer.add("Where", [positive, one, base]), _next_integer(writer, exponent)])
    writer.add("Where", [positive, curve, rest], target)


def _next_integer(writer: Writer, exponent: str) -> str:
    """The exponent rounded up, through integers, which stop the gradient."""
    cut = writer.add("Cast", [writer.add("Cast", [exponent], to=TensorProto.INT64)], to=TensorProto.FLOAT)
    more = writer.add("Cast", [writer.add("Greater", [exponent, cut])], to=TensorProto.FLOAT)
    return writer.add("Add", [cut, more])
