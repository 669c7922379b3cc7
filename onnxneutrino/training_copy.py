"""The training copy of a graph: the same function in operators with right gradients, in float32, of fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.finetune import MINIMUM_OPSET
from onnxneutrino.graph import (
    TensorType,
    batch_axes,
    convert_opset,
    declared_shape,
    element_dtype,
    opset,
    real_inputs,
    set_shape,
    tensor_types,
    with_batch,
)
from onnxneutrino.opset_down import brought_down
from onnxneutrino.passes import LOWER, LOWER_FIRST
from onnxneutrino.runtime import Runner, observed_types

TRAINING_OPSET = 17
TOLERANCE = 1e-3
HALF_TOLERANCE = 2e-2


def training_copy(model: ModelProto, batch: int, types: Mapping[str, TensorType] | None = None) -> ModelProto:
    """The lowered copy with opset 13 to 21, batch `batch` and known shapes.

    Args:
        model: any graph.
        batch: examples of a step.
        types: of the inputs at batch 1, where the graph leaves more than the batch free.

    Raises:
        TrainingError: an operator cannot be brought to an opset that the training runtime differentiates.
    """
    copy = fixed(brought_down(model), batch, types or {})
    for lower in LOWER_FIRST:
        copy, _ = lower(copy)
    current = opset(copy)
    if current is None or current < MINIMUM_OPSET:
        try:
            copy = fixed(convert_opset(copy, TRAINING_OPSET), batch, types or {})
        except ModelError as error:
            raise TrainingError(f"no training copy: {error}; use --trainer none") from error
    copy = with_seen_types(copy)
    for lower in LOWER:
        copy, _ = lower(copy)
    return copy


def fixed(model: ModelProto, batch: int, types: Mapping[str, TensorType]) -> ModelProto:
    """A copy whose inputs have batch `batch` and otherwise the sizes in `types`."""
    copy = with_batch(model, batch)
    axes = batch_axes(model)
    for value in real_inputs(copy):
        if value.name in types:
            shape = list(types[value.name].shape)
            axis = axes[value.name]
            if axis is not None:
                shape[axis] = batch
            set_shape(value, shape)
    return copy


def with_seen_types(model: ModelProto) -> ModelProto:
    """The model with the types noted that shape inference does not find: those of one run on zeros.

    Reshape targets that are computed at run time hide the shapes of all that follows.
    """
    shapes = {value.name: declared_shape(value) or () for value in real_inputs(model)}
    sizes = {name: tuple(size for size in shape if isinstance(size, int)) for name, shape in shapes.items()}
    known = tensor_types(model, {})
    made = [name for node in model.graph.node for name in node.output if name]
    if all(name in known for name in made) or any(len(sizes[name]) < len(shape) for name, shape in shapes.items()):
        return model
    try:
        seen = observed_types(model, known, sizes)
    except ModelError:  # what does not run on zeros keeps its unknown shapes
        return model
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(seen[name].dtype), seen[name].shape)
        for name in made
        if name in seen and name not in known
    )
    return model


def fed_types(model: ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs in the types that the model declares: a training copy takes float32 where its model took float16."""
    declared = {value.name: element_dtype(value.type.tensor_type.elem_type) for value in real_inputs(model)}
    return {name: np.asarray(array, declared.get(name, array.dtype)) for name, array in inputs.items()}


def check_training_copy(model: ModelProto, copy: ModelProto, inputs: Mapping[str, NDArray[Any]], threads: int) -> None:
    """Compare the copy's outputs with the model's on one batch.

    Raises:
        TrainingError: they differ by more than 1e-3 of the largest value; 2e-2 where the model is float16.
    """
    names = [value.name for value in model.graph.output]
    wanted, got = Runner(model, threads=threads)(inputs), Runner(copy, names, threads=threads)(fed_types(copy, inputs))
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    for name, a, b in zip(names, wanted, got, strict=True):
        difference = float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0.0))
        scale = float(np.max(np.abs(np.asarray(a, np.float64)), initial=0.0))
        if not difference <= tolerance * max(scale, 1e-6):
            raise TrainingError(
                f"output '{name}' of the training copy differs from the model's by {difference:.2g}; "
                "use --trainer none, and please report the model"
            )
