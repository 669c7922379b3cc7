"""Make the batch axis symbolic where the export fixed it, for evaluating and training in batches.

What this cannot see (a batch of 1 folded into other constants) shows when the result is run: the caller
compares a batch with single runs and keeps the fixed model where they differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, numpy_helper

from onnxneutrino.graph import (
    arrays,
    batch_axes,
    complete_inputs,
    copied,
    declared_shape,
    fresh_name,
    reads,
    real_inputs,
    set_shape,
    tensor_types,
    used_names,
)

SYMBOL = "batch"


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Free axis 0 of the inputs and of the shapes that Reshape, Expand and Resize hold as constants."""
    axes = batch_axes(model)
    shapes = {value.name: declared_shape(value) or () for value in real_inputs(model)}
    sizes = {shapes[name][axis] for name, axis in axes.items() if axis is not None}
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) != 1 or len(sizes) != 1:
        return copied(model), []
    batch = fixed[0]
    copy = copied(model)
    types = tensor_types(model, {})
    constants = arrays(model)
    taken = used_names(model)
    fed = {value.name for value in real_inputs(model)}
    notes = [f"batch of {batch} made free"]
    for node in copy.graph.node:
        if not fed.isdisjoint(reads(node)):
            fed.update(name for name in node.output if name)
            target = _shape_input(node)
            if target is not None and node.input[0] in fed and target in constants:
                known = {name: types[name].shape for name in (node.input[0], node.output[0]) if name in types}
                before = known.get(node.input[0])
                after = known.get(node.output[0])
                freed = _freed(node, constants[target], before, after, batch)
                if freed is not None:
                    name = fresh_name(taken, f"{target}.free")
                    copy.graph.initializer.append(numpy_helper.from_array(freed, name))
                    _read_instead(node, name)
                    notes.append(f"{node.op_type} {node.name}: batch made free")
    for value in real_inputs(copy):
        if axes[value.name] is not None:
            _free_axis(value, axes[value.name] or 0)
    for value in copy.graph.output:
        shape = declared_shape(value)
        if shape and shape[0] == batch:
            _free_axis(value, 0)
    del copy.graph.value_info[:]
    return complete_inputs(copy), notes


def _shape_input(node: NodeProto) -> str | None:
    """The input that holds the shape of the node's output, where it has one."""
    index = {"Reshape": 1, "Expand": 1, "Resize": 3}.get(node.op_type)
    return node.input[index] if index is not None and len(node.input) > index else None


def _freed(
    node: NodeProto,
    target: NDArray[np.generic],
    before: tuple[int, ...] | None,
    after: tuple[int, ...] | None,
    batch: int,
) -> NDArray[np.generic] | None:
    """The constant that does the same for any batch, or None where it does already or there is none.

    Args:
        node: a Reshape, Expand or Resize.
        target: its shape constant; `before` and `after` are the static shapes of its input and output.
        before: None where unknown.
        after: None where unknown.
        batch: the fixed batch.
    """
    if target.ndim != 1 or not target.size or target[0] != batch:
        return None
    if node.op_type == "Expand":
        # 1 broadcasts against the input's own batch.
        keeps = before is not None and len(before) == len(target) and before[0] == batch
        return np.array([1, *target[1:]], np.int64) if keeps and batch != 1 else None
    if node.op_type == "Resize":
        if before is None or len(before) != len(target) or before[0] != batch:
            return None
        sizes, scales = np.array(before), (target / np.array(before)).astype(np.float32)
        # The runtime gives floor(size * scale): take scales only where rounding does not lose a pixel.
        return scales if (np.floor(sizes.astype(np.float32) * scales) == target).all() else None
    if -1 not in target:
        return np.array([-1, *target[1:]], np.int64) if 0 not in target[1:] else _concrete(after)
    if before is not None and before[0] == batch:
        return np.array([0, *target[1:]], np.int64)
    return _concrete(after)


def _concrete(after: tuple[int, ...] | None) -> NDArray[np.generic] | None:
    return np.array([-1, *after[1:]], np.int64) if after else None


def _read_instead(node: NodeProto, name: str) -> None:
    if node.op_type == "Resize":
        # Scales stand before sizes; only one of the two may be given.
        node.input[2] = name
        del node.input[3:]
        return
    node.input[1] = name


def _free_axis(value: ValueInfoProto, axis: int) -> None:
    shape = list(declared_shape(value) or ())
    shape[axis] = SYMBOL
    set_shape(value, shape)
