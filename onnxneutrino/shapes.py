"""Shapes of a model's inputs and tensors, and which axis is the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from onnxneutrino.errors import ModelError, UsageError
from onnxneutrino.walk import copied
from onnxneutrino.weights import copy_fields

LARGEST_SHAPE = 1024


@dataclass(frozen=True)
class TensorType:
    """Static shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Graph inputs that are not initializers: what a user feeds."""
    stored = {tensor.name for tensor in model.graph.initializer}
    stored |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in stored]


def declared_shape(value: ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """Declared dimensions: a number, a symbol, or None (absent or negative); None without a shape."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_param or None if dim.HasField("dim_param") else dim.dim_value if _fixed(dim) else None
        for dim in kind.shape.dim
    )


def _fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return bool(dim.HasField("dim_value") and dim.dim_value >= 0)


def set_shape(value: ValueInfoProto, shape: Sequence[int | str | None]) -> None:
    """Declare these dimensions, in place."""
    declared = value.type.tensor_type.shape
    del declared.dim[:]
    declared.SetInParent()
    for entry in shape:
        dim = declared.dim.add()
        if isinstance(entry, str):
            dim.dim_param = entry
        elif entry is not None:
            dim.dim_value = entry


def batch_axes(model: ModelProto) -> dict[str, int | None]:
    """Which axis of each real input is the batch; None where there is none.

    A symbol that is some input's first axis is the batch wherever it stands (a state `[2, N, 128]`).
    A fixed first axis counts in inputs of rank 2 and more, and only if no input leaves its first axis free.
    """
    shapes = {value.name: declared_shape(value) or () for value in real_inputs(model)}
    symbols = {shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)}
    free = any(shape and not isinstance(shape[0], int) for shape in shapes.values())
    axes: dict[str, int | None] = {}
    for name, shape in shapes.items():
        shared = [axis for axis, entry in enumerate(shape) if entry in symbols]
        if shared:
            axes[name] = shared[0]
        elif shape and (shape[0] is None or (len(shape) >= 2 and not free)):
            axes[name] = 0
        else:
            axes[name] = None
    return axes


def has_free_sizes(model: ModelProto) -> bool:
    """Whether an input leaves more than its batch free."""
    axes = batch_axes(model)
    return any(
        axis != axes[value.name] and not isinstance(entry, int)
        for value in real_inputs(model)
        for axis, entry in enumerate(declared_shape(value) or ())
    )


def fixed_shapes(model: ModelProto, input_shape: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shape of every real input at batch 1, or as `input_shape` gives it.

    Raises:
        UsageError: `input_shape` names no input.
        ModelError: an input's shape is free on another axis than the batch, or `input_shape` contradicts it.
    """
    values = real_inputs(model)
    names = [value.name for value in values]
    for name in input_shape:
        if name not in names:
            raise UsageError(f"--input-shape: the model has no input '{name}'; its inputs are {', '.join(names)}")
    axes = batch_axes(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for value in values:
        declared = declared_shape(value)
        given = input_shape.get(value.name)
        if given is not None:
            if declared is not None and not _agrees(given, declared, axes[value.name]):
                raise ModelError(
                    f"input '{value.name}' is declared {_text(declared)}, which --input-shape "
                    f"{'x'.join(map(str, given))} contradicts; give a shape that fits"
                )
            shapes[value.name] = tuple(given)
            continue
        fixed = [1 if axis == axes[value.name] else entry for axis, entry in enumerate(declared or ())]
        numbers = tuple(entry for entry in fixed if isinstance(entry, int))
        if declared is None or len(numbers) < len(fixed):
            hint = "x".join(str(entry) if isinstance(entry, int) else "?" for entry in fixed) or "?x?"
            shape = _text(declared) if declared is not None else "without a shape"
            raise ModelError(
                f"input '{value.name}' is declared {shape}: its size is free; fix it with "
                f"--input-shape {value.name}={hint} (a number for each ?)"
            )
        shapes[value.name] = numbers
    return shapes


def _agrees(given: Sequence[int], declared: Sequence[int | str | None], batch: int | None) -> bool:
    return len(given) == len(declared) and all(
        axis == batch or not isinstance(entry, int) or entry == given[axis] for axis, entry in enumerate(declared)
    )


def _text(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if entry is None else str(entry) for entry in shape) + "]"


def tensor_types(model: ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorType]:
    """Static shapes and types of the main graph's tensors, initializers included, as far as inference knows.

    Args:
        model: the model.
        input_shapes: shapes of its real inputs; an empty mapping takes them as declared.
    """
    copy = copied(model)
    for value in real_inputs(copy):
        if value.name in input_shapes:
            set_shape(value, input_shapes[value.name])
    if input_shapes:
        # What was declared for another size would contradict this one.
        del copy.graph.value_info[:]
        for value in copy.graph.output:
            value.type.tensor_type.ClearField("shape")
    graph = inferred(copy).graph
    types: dict[str, TensorType] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape = declared_shape(value)
        kind = value.type.tensor_type.elem_type
        if shape is not None and kind != TensorProto.UNDEFINED and all(isinstance(entry, int) for entry in shape):
            numbers = tuple(entry for entry in shape if isinstance(entry, int))
            types[value.name] = TensorType(numbers, element_dtype(kind))
    for tensor in graph.initializer:
        types[tensor.name] = TensorType(tuple(tensor.dims), element_dtype(tensor.data_type))
    return types


def element_dtype(kind: int) -> np.dtype[np.generic]:
    """NumPy's type for an ONNX element type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))


def inferred(model: ModelProto) -> ModelProto:
    """A copy with the shapes that ONNX shape inference finds; the model itself where it fails.

    Large weights have their type and dimensions in it, and no data: inference would copy them four times.
    """
    try:
        return onnx.shape_inference.infer_shapes(_without_data(model), data_prop=True)
    except Exception:  # what inference cannot do leaves shapes unknown, which callers handle
        return model


def _without_data(model: ModelProto) -> ModelProto:
    """A copy in which initializers of more than a few elements, which cannot be shapes or axes, have no data."""
    copy = ModelProto()
    copy_fields(model, copy, "graph")
    copy_fields(model.graph, copy.graph, "initializer")
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > LARGEST_SHAPE:
            copy.graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        else:
            copy.graph.initializer.append(tensor)
    return copy
