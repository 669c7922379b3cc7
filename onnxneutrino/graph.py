"""Constants and edits of an ONNX graph, and the one door to `storage` (files), `shapes` and `walk`.

Functions that return a `ModelProto` return a new one; the model given stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    ModelProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from onnxneutrino import weights
from onnxneutrino.errors import ModelError
from onnxneutrino.shapes import (
    TensorType,
    batch_axes,
    declared_shape,
    element_dtype,
    fixed_shapes,
    has_free_sizes,
    inferred,
    real_inputs,
    set_shape,
    tensor_types,
)
from onnxneutrino.storage import Source, check, check_writable, load, save
from onnxneutrino.walk import (
    all_nodes,
    attribute_values,
    attributes,
    consumers,
    copied,
    data_bytes,
    fresh_name,
    name_nodes,
    opset,
    producers,
    reads,
    replace_uses,
    used_names,
)

__all__ = [
    "RUNTIME_IR",
    "Source",
    "TensorType",
    "all_nodes",
    "arrays",
    "attribute_values",
    "attributes",
    "batch_axes",
    "capped_ir",
    "check",
    "check_writable",
    "complete_inputs",
    "consumers",
    "convert_opset",
    "copied",
    "data_bytes",
    "declared_shape",
    "drop_unused",
    "element_dtype",
    "expose",
    "fixed_shapes",
    "fresh_name",
    "has_free_sizes",
    "inferred",
    "load",
    "name_nodes",
    "opset",
    "producers",
    "reads",
    "real_inputs",
    "replace_uses",
    "save",
    "set_shape",
    "tensor_types",
    "used_names",
    "with_arrays",
    "with_batch",
]

Tensor: TypeAlias = NDArray[np.generic]
RUNTIME_IR = 10


def arrays(model: ModelProto) -> dict[str, Tensor]:
    """Initializers and the values of Constant nodes of the main graph, by tensor name.

    Those of a large model that lie in a file are read-only memory maps.
    """
    found: dict[str, Tensor] = {tensor.name: weights.array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute:
            value = _constant(node.attribute[0])
            if value is not None:
                found[node.output[0]] = value
    return found


def _constant(attribute: AttributeProto) -> Tensor | None:
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    kinds: dict[str, type[np.generic]] = {"value_float": np.float32, "value_floats": np.float32}
    kinds |= {"value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kinds:
        return None
    return np.asarray(helper.get_attribute_value(attribute), kinds[attribute.name])


def with_arrays(model: ModelProto, arrays: Mapping[str, Tensor]) -> ModelProto:
    """A copy with these initializers and Constant nodes replaced, each cast to the type it has.

    Raises:
        ModelError: there is no such tensor.
    """
    copy = copied(model)
    missing = set(arrays)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            value = np.asarray(arrays[tensor.name]).astype(element_dtype(tensor.data_type), copy=False)
            tensor.CopyFrom(weights.initializer(value, tensor.name))
            missing.discard(tensor.name)
    for node in copy.graph.node:
        if node.op_type == "Constant" and node.output[0] in arrays:
            before = _constant(node.attribute[0])
            if before is not None:
                value = np.asarray(arrays[node.output[0]]).astype(before.dtype)
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value)))
                missing.discard(node.output[0])
    if missing:
        raise ModelError(f"no initializer or Constant named '{min(missing)}'; the arrays belong to another model")
    return copy


# --- edits ----------------------------------------------------------------------------------------------


def drop_unused(model: ModelProto) -> ModelProto:
    """A copy without the nodes and initializers no output depends on; real inputs stay."""
    copy = copied(model)
    graph = copy.graph
    needed = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        if needed.isdisjoint(name for name in graph.node[index].output if name):
            del graph.node[index]
        else:
            needed.update(reads(graph.node[index]))
    unused = {tensor.name for tensor in graph.initializer} - needed
    made = {name for node in graph.node for name in node.output}
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.sparse_initializer, lambda tensor: tensor.values.name in needed)
    _keep(graph.input, lambda value: value.name not in unused)
    _keep(graph.value_info, lambda value: value.name in made)
    return copy


def _keep(field: MutableSequence[Any], wanted: Callable[[Any], bool]) -> None:
    for index in reversed(range(len(field))):
        if not wanted(field[index]):
            del field[index]


def complete_inputs(model: ModelProto) -> ModelProto:
    """Below IR 4 every initializer must be a graph input: a copy that lists those not yet listed."""
    copy = copied(model)
    if copy.ir_version >= 4:
        return copy
    listed = {value.name for value in copy.graph.input}
    for tensor in copy.graph.initializer:
        if tensor.name not in listed:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def expose(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """A copy whose outputs are exactly these tensors; nodes, weights and inputs they do not need are gone.

    Raises:
        ModelError: the main graph has no such tensor.
    """
    graph = model.graph
    made = {name for node in graph.node for name in node.output if name}
    made |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for name in tensors:
        if name not in made:
            raise ModelError(f"the graph has no tensor '{name}'; name one that a node of the main graph makes")
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    if not all(name in known for name in tensors):
        found = inferred(model).graph
        known = {value.name: value for value in found.value_info} | known
    copy = copied(model)
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(name, ValueInfoProto(name=name)) for name in tensors)
    copy = drop_unused(copy)
    wanted = {name for node in copy.graph.node for name in reads(node)} | set(tensors)
    _keep(copy.graph.input, lambda value: value.name in wanted)
    return copy


def with_batch(model: ModelProto, size: int) -> ModelProto:
    """A copy whose inputs have batch `size`; shapes declared elsewhere that may contradict it are freed."""
    copy = copied(model)
    axes = batch_axes(copy)
    before: set[int | str | None] = set()
    for value in real_inputs(copy):
        axis, shape = axes[value.name], list(declared_shape(value) or ())
        if axis is not None:
            before.add(shape[axis])
            shape[axis] = size
            set_shape(value, shape)

    def freed(axis: int, entry: int | str | None) -> int | str | None:
        if isinstance(entry, str):
            return size if entry in before else entry
        return None if axis == 0 and entry in before else entry

    for value in copy.graph.output:
        declared = declared_shape(value)
        if declared:
            set_shape(value, [freed(axis, entry) for axis, entry in enumerate(declared)])
    del copy.graph.value_info[:]
    return copy


def convert_opset(model: ModelProto, target: int) -> ModelProto:
    """A copy in ai.onnx opset `target`, for training copies; what it computes must be compared by the caller.

    Raises:
        ModelError: an operator cannot be converted.
    """
    if opset(model) == target:
        return copied(model)
    copy = copied(model)
    for entry in copy.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    name_nodes(copy.graph)
    try:
        converted = onnx.version_converter.convert_version(weights.hidden(copy), target)
        weights.shown(converted, copy)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ModelError(f"the model cannot be converted from opset {opset(model)} to {target}: {reason}") from error
    name_nodes(converted.graph)
    for entry in copy.opset_import:
        if entry.domain and entry.domain not in {kept.domain for kept in converted.opset_import}:
            converted.opset_import.append(entry)
    converted.ir_version = min(max(converted.ir_version, copy.ir_version), RUNTIME_IR)
    return capped_ir(converted)


def capped_ir(model: ModelProto) -> ModelProto:
    """A copy with at most the IR version that the runtime reads."""
    copy = copied(model)
    copy.ir_version = min(copy.ir_version, RUNTIME_IR)
    return copy
