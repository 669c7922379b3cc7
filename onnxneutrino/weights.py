"""Weights that stay in their file: a model of gigabytes as a small graph whose large tensors are memory maps.

Such a *light* tensor has external data with an absolute path, its offset and its length. Copies of the graph
are then cheap, the pages of one map are shared by all who read it, and the system can take them back. It is
always an initializer of the main graph; everything else of a model is in memory.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_tensor,
    set_external_data,
    uses_external_data,
)

from onnxneutrino.walk import data_bytes, graphs, tensor_bytes, tensors

Tensor: TypeAlias = NDArray[np.generic]
# From here on copies cost more than they are worth: about ten graphs stand at once during a search.
LARGE_MODEL_BYTES = 2**28
# Smaller tensors (shapes, axes, biases, scales) are read at once: passes look into them, and all together are small.
LARGE_TENSOR_BYTES = 2**16
MAPPED = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.INT32,
        TensorProto.UINT32,
        TensorProto.INT64,
        TensorProto.UINT64,
        TensorProto.BOOL,
    }
)


class Target(Protocol):
    """Where tensors are written to."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append."""

    def tell(self) -> int:
        """Bytes written."""


_maps: WeakValueDictionary[tuple[str, int, int], np.memmap[Any, Any]] = WeakValueDictionary()
_held: WeakValueDictionary[str, np.memmap[Any, Any]] = WeakValueDictionary()


def is_light(tensor: TensorProto) -> bool:
    """Whether the tensor's data lies in a file at an absolute path."""
    return uses_external_data(tensor) and os.path.isabs(ExternalDataInfo(tensor).location)


def light_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """The model's light tensors."""
    return (tensor for tensor in model.graph.initializer if is_light(tensor))


def array(tensor: TensorProto) -> Tensor:
    """The value of any tensor; that of a light one is a read-only view of its file."""
    if not is_light(tensor):
        return numpy_helper.to_array(tensor)
    info = ExternalDataInfo(tensor)
    offset, length = info.offset or 0, info.length or 0
    data = _map(info.location)[offset : offset + length].view(np.ndarray)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return data.view(dtype).reshape(tuple(tensor.dims))


def _map(path: str) -> np.memmap[Any, Any]:
    """The bytes of a file, mapped once for all who hold a view of it."""
    held = _held.get(path)
    if held is not None:
        return held
    status = os.stat(path)
    key = (path, status.st_ino, status.st_mtime_ns)
    found = _maps.get(key)
    if found is None:
        found = _maps[key] = np.memmap(path, np.uint8, "r")
    return found


def hold(path: str, bytes_of_file: np.memmap[Any, Any]) -> None:
    """Let this map stand for a file that is still written to, for as long as somebody holds the map."""
    _held[path] = bytes_of_file


def let_go() -> None:
    """Give the pages of all maps back to the system; they are read again where they are needed.

    Pages of a file count as memory of every process that has read them, until the system wants them back.
    """
    for found in (*_maps.values(), *_held.values()):
        advise = getattr(found.base, "madvise", None)  # not on Windows
        if advise is not None:
            advise(mmap.MADV_DONTNEED)


def is_mapped(value: Tensor) -> bool:
    """Whether an array is a view of a memory map."""
    return _root(value) is not None


def _root(value: Tensor) -> np.memmap[Any, Any] | None:
    """The map that an array is a view of."""
    found: np.memmap[Any, Any] | None = None
    base: Any = value
    while isinstance(base, np.ndarray):
        found = base if isinstance(base, np.memmap) else found
        base = base.base
    return found


def initializer(value: Tensor, name: str) -> TensorProto:
    """An initializer of this value; a light one where the value is a large, contiguous view of a file."""
    root = _root(value)
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    whole = root is not None and value.flags.c_contiguous and value.nbytes >= LARGE_TENSOR_BYTES
    if root is None or not whole or kind not in MAPPED:
        return numpy_helper.from_array(np.asarray(value), name)
    made = TensorProto(name=name, dims=value.shape, data_type=kind)
    _refer(made, os.path.abspath(root.filename or ""), value.ctypes.data - root.ctypes.data, value.nbytes)
    return made


def attach(model: ModelProto, folder: Path) -> None:
    """Point the large initializers at their data below `folder` and read all other external data, in place.

    Raises:
        ValueError: a location is absolute, or data does not fit its tensor.
        Exception: what onnx raises for a location that leaves the folder.
    """
    for tensor in tensors(model):
        if is_light(tensor):
            raise ValueError(f"tensor '{tensor.name}' has an absolute location")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and tensor.data_type in MAPPED and declared_bytes(tensor) >= LARGE_TENSOR_BYTES:
            _attach(tensor, folder)
    for tensor in tensors(model):
        if uses_external_data(tensor) and not is_light(tensor):
            load_external_data_for_tensor(tensor, str(folder))
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT


def _attach(tensor: TensorProto, folder: Path) -> None:
    info, size = ExternalDataInfo(tensor), declared_bytes(tensor)
    offset = info.offset or 0
    # onnx's own checks of the location, on the first byte of the data.
    probe = TensorProto(name=tensor.name, dims=[1], data_type=TensorProto.UINT8, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", info.location), ("offset", str(offset)), ("length", "1")):
        probe.external_data.add(key=key, value=value)
    load_external_data_for_tensor(probe, str(folder))
    file = (folder / info.location).resolve()
    if info.length not in (None, size) or offset + size > file.stat().st_size:
        raise ValueError(f"the data of tensor '{tensor.name}' is not {size} bytes long")
    _refer(tensor, str(file), offset, size)


def declared_bytes(tensor: TensorProto) -> int:
    """Bytes that a tensor's shape and type take as raw data; for types of less than a byte, at most."""
    width: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * width)


def _refer(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    """Let the data of a tensor without data of its own be in `file`, in place."""
    tensor.raw_data = b""  # what onnx asks for before it sets a location
    set_external_data(tensor, file, offset, length)
    tensor.ClearField("raw_data")


def hidden(model: ModelProto) -> ModelProto:
    """A copy in which light tensors are inputs: for libraries that check or convert graphs and cannot read them."""
    names = {tensor.name for tensor in light_tensors(model)}
    copy = ModelProto()
    copy_fields(model, copy, "graph")
    copy_fields(model.graph, copy.graph, "initializer")
    copy.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    listed = {value.name for value in copy.graph.input}
    for tensor in light_tensors(model):
        if tensor.name not in listed:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def shown(model: ModelProto, original: ModelProto) -> None:
    """Undo what `hidden(original)` did to what a library made of it, in place."""
    graph, listed = model.graph, {value.name for value in original.graph.input}
    light = {tensor.name: tensor for tensor in light_tensors(original)}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in light and graph.input[index].name not in listed:
            del graph.input[index]
    graph.initializer.extend(light.values())


def moved(model: ModelProto, file: Target, threshold: int, light: bool = False) -> tuple[ModelProto, list[TensorProto]]:
    """Write the initializers of `threshold` bytes and more into `file`, one after the other, as raw data.

    Args:
        model: the model; it stays as it is, and its data is copied one tensor at a time.
        file: where to write, from its start.
        threshold: smaller tensors stay in the model as raw data; strings stay as they are.
        light: what is in a file stays where it is.

    Returns:
        The model whose tensors refer to offsets in the file, and these tensors: `place` names the file.
    """
    copy = ModelProto()
    copy_fields(model, copy, "graph")
    copy_fields(model.graph, copy.graph, "initializer")
    for tensor in model.graph.initializer:
        copy.graph.initializer.append(_moved(tensor, file, threshold, light))
    for graph in graphs(copy.graph):
        for tensor in graph.initializer if graph is not copy.graph else ():
            tensor.CopyFrom(_moved(tensor, file, threshold, light))
    entries = [tensor for graph in graphs(copy.graph) for tensor in graph.initializer]
    return copy, [tensor for tensor in entries if uses_external_data(tensor) and not is_light(tensor)]


def _moved(tensor: TensorProto, file: Target, threshold: int, light: bool) -> TensorProto:
    data = None if light and is_light(tensor) else _raw(tensor)
    if data is None:
        return tensor
    if len(data) < threshold:
        return tensor if tensor.HasField("raw_data") else _in_memory(tensor, data)
    outside = _in_memory(tensor, b"")
    set_external_data(outside, "", file.tell(), len(data))
    outside.ClearField("raw_data")
    file.write(data)
    return outside


def place(written: Iterable[TensorProto], location: str) -> None:
    """Name the file of tensors that `moved` wrote, in place."""
    for tensor in written:
        info = ExternalDataInfo(tensor)
        _refer(tensor, location, info.offset or 0, info.length or 0)


def spilled(model: ModelProto, folder: Path) -> ModelProto:
    """The model with every large initializer light, those that are in memory written below `folder`.

    ONNX Runtime holds four copies of a tensor that it is given in memory, and none of one that is in a file.
    """
    path = folder / "weights"
    with path.open("wb") as file:
        copy, written = moved(model, file, LARGE_TENSOR_BYTES, light=True)
    place(written, str(path))
    return copy


def in_memory(model: ModelProto) -> ModelProto:
    """A copy that has all its data itself."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in light_tensors(copy):
        tensor.CopyFrom(_in_memory(tensor, bytes(array(tensor).tobytes())))
    return copy


def stored_bytes(model: ModelProto) -> int:
    """Bytes of the model as a file, external data included."""
    if data_bytes(model) < LARGE_MODEL_BYTES:
        return int(model.ByteSize())
    rest = ModelProto()
    copy_fields(model, rest, "graph")
    copy_fields(model.graph, rest.graph, "initializer")
    return int(rest.ByteSize()) + sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def _raw(tensor: TensorProto) -> bytes | memoryview | None:
    """A tensor's raw data, None for strings."""
    if tensor.data_type == TensorProto.STRING:
        return None
    if is_light(tensor):
        return array(tensor).reshape(-1).view(np.uint8).data
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _in_memory(tensor: TensorProto, data: bytes | memoryview) -> TensorProto:
    """A tensor of this name, type and shape with other raw data."""
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=bytes(data))


def copy_fields(source: Any, target: Any, *left_out: str) -> None:
    """Copy the fields of a message, but for those named, into an empty one of its type."""
    for field, value in source.ListFields():
        if field.name in left_out:
            continue
        if isinstance(value, (int, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)
