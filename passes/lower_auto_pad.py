"""Training copy: `auto_pad` of Conv and the pools becomes explicit pads.

The gradient of ONNX Runtime's Conv with SAME padding is wrong without an error. On each axis, with input size
`n`, stride `s` and effective kernel `k = d (kernel - 1) + 1`:

    total = max((ceil(n / s) - 1) s + k - n, 0)

of which SAME_UPPER puts the smaller half before the data, SAME_LOWER the larger. Where a stride leaves two or more
values out at the end, the runtime leaves half of them out at the beginning, which pads cannot say.
"""

from __future__ import annotations

from onnx import AttributeProto, ModelProto, NodeProto, helper

from onnxneutrino.graph import arrays, attributes, copied, declared_shape, inferred

OPS = ("Conv", "MaxPool", "AveragePool", "LpPool")


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Write the pads out where the input size is known, or the stride is 1 and it does not matter."""
    copy = copied(model)
    constants = arrays(model)
    graph = inferred(model).graph
    shapes = {value.name: declared_shape(value) for value in (*graph.value_info, *graph.input)}
    notes: list[str] = []
    for node in copy.graph.node:
        own = attributes(node)
        mode = own["auto_pad"].s.decode() if node.op_type in OPS and "auto_pad" in own else "NOTSET"
        if mode == "NOTSET":
            continue
        kernel = list(own["kernel_shape"].ints) if "kernel_shape" in own else []
        if not kernel and node.op_type == "Conv" and node.input[1] in constants:
            kernel = list(constants[node.input[1]].shape[2:])
        shape = shapes.get(node.input[0]) or (None,) * (len(kernel) + 2)
        dilations = _ints(own, "dilations")
        if mode != "VALID" and set(dilations) - {1} and node.op_type != "Conv":
            notes.append(f"{node.op_type} {node.name} keeps auto_pad={mode}: the runtime leaves its dilations out")
            continue
        pads = explicit_pads(mode, shape[2:], kernel, _ints(own, "strides"), dilations)
        if pads is None:
            known = bool(kernel) and all(isinstance(size, int) for size in shape[2:])
            why = "its strides leave data out" if known else "its kernel or input size is unknown"
            notes.append(f"{node.op_type} {node.name} keeps auto_pad={mode}: {why}")
            continue
        _set_pads(node, pads)
        notes.append(f"{node.op_type} {node.name}: auto_pad={mode} written as pads {pads}")
    return copy, notes


def explicit_pads(
    mode: str,
    sizes: tuple[int | str | None, ...],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
) -> list[int] | None:
    """Pads in ONNX order (all beginnings, then all ends), None where a needed size is unknown or data is left out.

    Args:
        mode: SAME_UPPER, SAME_LOWER or VALID.
        sizes: input size of each spatial axis; None or a symbol where it is unknown.
        kernel: kernel size of each spatial axis.
        strides: of each axis; empty for ones.
        dilations: of each axis; empty for ones.
    """
    if not kernel or len(sizes) != len(kernel):
        return None
    before, after = [], []
    for axis, (size, own) in enumerate(zip(sizes, kernel, strict=True)):
        stride = strides[axis] if strides else 1
        effective = (dilations[axis] if dilations else 1) * (own - 1) + 1
        if mode == "VALID":
            total = 0
        elif stride == 1:
            total = effective - 1
        elif isinstance(size, int):
            total = (-(-size // stride) - 1) * stride + effective - size
            if total < -1:
                return None
            total = max(total, 0)
        else:
            return None
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before + after


def _ints(own: dict[str, AttributeProto], name: str) -> list[int]:
    return list(own[name].ints) if name in own else []


def _set_pads(node: NodeProto, pads: list[int]) -> None:
    for attribute in list(node.attribute):
        if attribute.name in ("auto_pad", "pads"):
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute("pads", pads))
