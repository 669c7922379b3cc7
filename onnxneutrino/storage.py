"""ONNX files: load with checks, write in one piece."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx.defs
import onnx.inliner
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    uses_external_data,
)

from onnxneutrino import weights
from onnxneutrino.errors import ModelError, OutputError
from onnxneutrino.opset_down import too_new
from onnxneutrino.soundness import constant_fault, structure_fault
from onnxneutrino.walk import (
    all_nodes,
    data_bytes,
    name_nodes,
    named_tensors,
    opset,
    subgraphs,
    tensors,
)

OPSETS = (7, onnx.defs.onnx_opset_version())
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
QUANTIZED = re.compile(
    r"(Quantize|Dequantize|DynamicQuantize)Linear|QLinear.*|(MatMul|Conv)Integer.*|QAttention|QGemm|MatMulNBits"
    r"|DynamicQuantize.*"
)
# An infinity is a mask or a bound for these; in any other operator's constant it is a broken weight.
TAKES_INFINITY = frozenset({"Add", "Clip", "Expand", "Max", "Min", "Pad", "Where", "ConstantOfShape"})
PROTOBUF_LIMIT = 2**31 - 2**20
EXTERNAL_THRESHOLD = 1024
CHECKER_TEXT = 240


@dataclass(frozen=True, eq=False)
class Source:
    """A model as it was loaded: whether its weights lay in a file of their own, and where it came from."""

    model: ModelProto
    external: bool
    path: Path | None


def load(path: Path, quantized: bool = False) -> Source:
    """Load a model with all its weights; its nodes get unique names, local functions are inlined.

    The large weights of a large model with external data stay in their file; see `weights`.

    Args:
        path: of the ONNX file.
        quantized: take a model that runs in integers, too: it can be run, and not compressed.

    Raises:
        ModelError: the file is missing, unreadable or not ONNX, its external data is missing, or its opset,
            a domain or quantization is not supported.
    """
    path = Path(path)
    model = _parse(path)
    fault = structure_fault(model)
    if fault is not None:
        raise ModelError(f"{path}: {fault}")
    _check_supported(model, path, quantized)
    external = _load_external(model, path)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:
            raise ModelError(f"{path}: its local functions cannot be inlined: {_first_line(error)}") from error
        _check_supported(model, path, quantized)
    name_nodes(model.graph)
    return Source(model, external, path)


def _parse(path: Path) -> ModelProto:
    if not os.path.exists(path):  # false for a link to itself, too
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the path of an ONNX file")
    if not path.is_file():
        raise ModelError(f"{path}: is a device or pipe, which may never end; give the path of a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from error
    if not data:
        raise ModelError(f"{path}: the file is empty; export or download the model again")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a Git LFS pointer, not the model; run `git lfs pull`")
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise ModelError(f"{path}: not an ONNX model, or corrupt or truncated; export or download it again") from error
    if not model.graph.output:
        raise ModelError(f"{path}: holds no graph with outputs; give the path of an ONNX model")
    return model


def _check_supported(model: ModelProto, path: Path, quantized: bool) -> None:
    low, high = OPSETS
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path}: IR version {model.ir_version} is newer than the installed onnx reads ({onnx.IR_VERSION}); "
            "update onnx"
        )
    if not model.opset_import:
        raise ModelError(f"{path}: no opset_import (IR version {model.ir_version}); export with opset {low} to {high}")
    version = opset(model)
    if version is None:
        raise ModelError(f"{path}: imports no ai.onnx opset; export it again with opset {low} to {high}")
    if version > high:
        raise ModelError(
            f"{path}: opset {version} is not supported ({low} to {high} are); update onnx, or export with a lower one"
        )
    if version < low:
        raise ModelError(f"{path}: opset {version} is not supported ({low} to {high} are); export or convert it again")
    newer = too_new(model)
    if newer is not None:
        raise ModelError(f"{path}: {newer}")
    constants = _constant_names(model)
    local = {function.domain for function in model.functions}
    for node in all_nodes(model.graph):
        where = f"node '{node.name or ', '.join(node.output)}'"
        if node.domain not in DOMAINS and node.domain not in local:
            raise ModelError(
                f"{path}: {where} is {node.domain}.{node.op_type}, which a stock ONNX runtime does not have; "
                "export the model without custom operators"
            )
        # Stored weights are folded; what runs in integers cannot be factorized.
        stored = node.op_type == "DequantizeLinear" and constants.issuperset(node.input)
        if QUANTIZED.fullmatch(node.op_type) and not stored and not quantized:
            raise ModelError(
                f"{path}: already quantized ({where} is {node.op_type}); "
                "compress the float model first and quantize the result"
            )


def _constant_names(model: ModelProto) -> set[str]:
    """Tensors that depend on no input; "" is an input that is left out."""
    names = {"", *(name for name, _ in named_tensors(model))}
    for node in all_nodes(model.graph):
        if node.op_type == "Constant" or (node.input and not any(subgraphs(node)) and names.issuperset(node.input)):
            names.update(node.output)
    return names


def _load_external(model: ModelProto, path: Path) -> bool:
    outside = [tensor for tensor in tensors(model) if uses_external_data(tensor)]
    try:
        for tensor in outside:
            _check_external(tensor, path)
        if outside and data_bytes(model) >= weights.LARGE_MODEL_BYTES:
            weights.attach(model, path.parent)
        elif outside:
            load_external_data_for_model(model, str(path.parent))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: its external data cannot be read: {_first_line(error)}") from error
    return bool(outside)


def _check_external(tensor: TensorProto, path: Path) -> None:
    """Compare what a tensor says about its data with the file, and note the length where it is left out."""
    info = ExternalDataInfo(tensor)
    file = path.parent / info.location
    # A folder, a device or a pipe is none either; whether the file may be read is for onnx to say.
    if not file.is_file():
        raise ModelError(
            f"{path}: its external data '{info.location}' (tensor '{tensor.name}') is missing; "
            "put that file beside the model"
        )
    declared = weights.declared_bytes(tensor)
    if info.length is None:
        tensor.external_data.add(key="length", value=str(declared))
    elif info.length > declared:
        raise ModelError(
            f"{path}: its external data '{info.location}' has {info.length} bytes for tensor '{tensor.name}', "
            f"whose shape and type take {declared}; export the model again"
        )
    if (info.offset or 0) + (declared if info.length is None else info.length) > file.stat().st_size:
        raise ModelError(f"{path}: its external data '{info.location}' ends before '{tensor.name}'; get the file again")


def check(model: ModelProto, name: str) -> None:
    """Check the model against the ONNX specification and its constants for NaN and infinity.

    A negative or positive infinity passes where all readers take it as a mask or bound. What is in memory
    of a model must be below 2 GB for `onnx.checker`; else only its constants are checked.

    Args:
        model: the model.
        name: how messages call it: its path.

    Raises:
        ModelError: the specification is not met, or a weight is not finite.
    """
    fault = structure_fault(model)
    if fault is not None:
        raise ModelError(f"{name}: {fault}")
    shown = weights.hidden(model)
    if data_bytes(shown) < PROTOBUF_LIMIT:
        try:
            onnx.checker.check_model(shown)
        except Exception as error:
            # The checker spreads one sentence, and the node it is about, over several lines.
            text = " ".join(str(error).split())[:CHECKER_TEXT]
            raise ModelError(f"{name}: not a valid ONNX model: {text}; export it again") from error
    fault = constant_fault(model)
    if fault is not None:
        raise ModelError(f"{name}: {fault}")
    readers: dict[str, list[str]] = {}
    for node in all_nodes(model.graph):
        for tensor_name in node.input:
            readers.setdefault(tensor_name, []).append(node.op_type)
    for tensor_name, tensor in named_tensors(model):
        try:
            array = weights.array(tensor)
        except Exception as error:
            raise ModelError(f"{name}: tensor '{tensor_name}' is damaged: {_first_line(error)}") from error
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        masks = all(op in TAKES_INFINITY for op in readers.get(tensor_name, ["?"]))
        if np.isnan(array).any() or not masks:
            what = "NaN" if np.isnan(array).any() else "infinity"
            raise ModelError(f"{name}: tensor '{tensor_name}' holds {what}; export the model from a sound checkpoint")


def check_writable(path: Path) -> None:
    """Find out, before any work is done, whether `path` can be written.

    Raises:
        OutputError: the folder is missing or not writable, or `path` is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a device or pipe, which a rename would replace; give the name of a file")
    if not folder.exists():
        raise OutputError(f"{path}: the folder {folder} does not exist; create it first")
    if not folder.is_dir():
        raise OutputError(f"{path}: {folder} is not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable; choose another or change its permissions")


def save(model: ModelProto, path: Path, external: bool) -> None:
    """Write the model in one piece: afterwards `path` is the old file or the whole new one, never a part.

    With external data the weights lie in `<name>.<digest>.data` beside it, which is complete before the model
    that refers to it appears; the data of the model that was there is removed last.

    Raises:
        OutputError: the disk or the system refuses.
    """
    path = Path(path)
    temporary = _temporary(path)
    made = [temporary]
    written = False
    try:
        data: Path | None = None
        if external or data_bytes(model) >= PROTOBUF_LIMIT:
            model, data = _save_data(model, path, made)
        else:
            model = weights.in_memory(model)
        _write(temporary, model.SerializeToString(deterministic=True))
        written = True
        old = _data_of(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
        for file in old:
            if file != data:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        # Also on an interrupt: where the new model has not taken its place, nothing of it stays.
        if not written or temporary.exists():
            for file in made:
                file.unlink(missing_ok=True)


def _data_of(path: Path) -> set[Path]:
    """The data files that the model at `path` reads and an earlier `save` to this name wrote; none without a model.

    Data that only looks like it may belong to a model that was renamed since.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # no file, or not a model: nothing of ours
        return set()
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    outside = (ExternalDataInfo(tensor).location for tensor in tensors(model) if uses_external_data(tensor))
    return {path.with_name(location) for location in outside if ours.fullmatch(location)}


def _save_data(model: ModelProto, path: Path, made: list[Path]) -> tuple[ModelProto, Path | None]:
    temporary = _temporary(path)
    made.append(temporary)
    with temporary.open("xb") as file:
        digested = _Digested(file)
        copy, tensors = weights.moved(model, digested, EXTERNAL_THRESHOLD)
        file.flush()
        os.fsync(file.fileno())
    if not tensors:
        temporary.unlink()
        return copy, None
    data = path.with_name(f"{path.name}.{digested.hexdigest()[:16]}.data")
    weights.place(tensors, data.name)
    if not data.exists():
        made.append(data)
    os.replace(temporary, data)
    return copy, data


class _Digested:
    """A file being written, and the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file in one piece.

    Raises:
        OSError: the disk or the system refuses.
    """
    temporary = _temporary(path)
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have what was renamed in a folder outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].strip() if text else type(error).__name__
