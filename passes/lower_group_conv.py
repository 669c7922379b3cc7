"""Training copy: a grouped Conv over one or three axes, in the forms whose gradient is right.

ONNX Runtime's gradient of a grouped Conv is right over two axes, wrong over three, and wrong over one with dilations.
Over one axis `(N, C, L)` becomes `(N, C, 1, L)`; over three, each group becomes a Conv of its own on slices of the
input and the weight.
"""

from __future__ import annotations

from typing import Any

from onnx import ModelProto

from onnxneutrino.graph import attribute_values
from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite each Conv with groups over other than two axes."""
    return rewritten(model, {"Conv": _group_conv})


def _group_conv(writer: Writer) -> None:
    if writer.attribute("group", 1) == 1:
        raise Kept("it has one group")
    own = attribute_values(writer.node)
    rank = len(writer.shape(writer.node.input[1])) - 2
    if rank == 1:
        _over_two_axes(writer, own)
    elif rank == 3:
        _each_alone(writer, own)
    else:
        raise Kept("its gradient is right")


def _over_two_axes(writer: Writer, own: dict[str, Any]) -> None:
    source, weight, *bias = writer.node.input
    result = writer.shape(writer.node.output[0])
    for name in ("kernel_shape", "strides", "dilations"):
        if name in own:
            own[name] = [1, *own[name]]
    if "pads" in own:
        own["pads"] = [0, own["pads"][0], 0, own["pads"][1]]
    flat = [writer.reshape(name, [*writer.shape(name)[:2], 1, writer.shape(name)[2]]) for name in (source, weight)]
    writer.reshape(writer.add("Conv", [*flat, *bias], **own), result, writer.node.output[0])


def _each_alone(writer: Writer, own: dict[str, Any]) -> None:
    groups, weight, bias = own.pop("group"), writer.node.input[1], writer.input(2)
    shape = writer.shape(weight)
    made, taken = shape[0] // groups, shape[1]
    parts = []
    for group in range(groups):
        inputs = [
            writer.slice(writer.node.input[0], 1, group * taken, (group + 1) * taken),
            writer.slice(weight, 0, group * made, (group + 1) * made),
        ]
        if bias:
            inputs.append(writer.slice(bias, 0, group * made, (group + 1) * made))
        parts.append(writer.add("Conv", inputs, **own))
    writer.add("Concat", parts, writer.node.output[0], axis=1)
