"""Data sets in one `.npz` file: `x_train y_train x_test y_test`, and `x_val y_val` where there are any.

Large arrays of an uncompressed file are mapped into memory, so that one larger than memory can be used; the others
are read once and stay in the type of the file. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.config import DataConfig
from onnxneutrino.data_checks import check_finite, check_labels, check_range
from onnxneutrino.data_images import Preprocess, preprocess
from onnxneutrino.data_values import IndexedSplit, Inputs, InputSpec, Rows
from onnxneutrino.errors import DataError

_LOCAL_HEADER = 30
_NPY_HEADER = 10_012  # of an array: what numpy takes, with magic, version and length
COPIED_BYTES = 2**28  # smaller arrays are read: a map of a file that another program cuts short ends the process
# An array that inflates to more than both is no data: white images come to a few hundred times at most.
INFLATED_BYTES, INFLATED_FACTOR = 2**28, 300


@dataclass(frozen=True)
class Stamp:
    """A file's size and time of change, as they were."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Take them now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Compare with the file as it is: its pages can no longer be read once it has been cut short.

        Raises:
            DataError: the file is gone or has changed.
        """
        try:
            same = Stamp.of(self.path) == self
        except OSError as error:
            raise DataError(f"{self.path}: is gone since the run began ({error.strerror}); start again") from error
        if not same:
            raise DataError(f"{self.path}: has changed since the run began; leave it alone and start again")


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Rows of one array, preprocessed; `mapped` is the file that it is a map of, as it was when it was opened."""

    array: NDArray[Any]
    prepare: Preprocess
    mapped: Stamp | None = None

    def __call__(self, rows: Rows, generator: np.random.Generator | None) -> Inputs:
        """Return the model's input for `rows`.

        Raises:
            DataError: the mapped file is gone or has changed.
        """
        if self.mapped is not None:
            self.mapped.check()
        return self.prepare(np.asarray(self.array[rows]), generator)


def open_npz(path: Path, config: DataConfig, spec: InputSpec, classes: int | None) -> dict[str, IndexedSplit | None]:
    """Open the splits `train`, `val` (None where it is absent) and `test` of an `.npz` file.

    Raises:
        DataError: not an npz file, arrays missing, pickled, of the wrong shape, type or length, empty, with
            NaN or with labels out of range.
    """
    arrays = read_npz(path)
    for name in ("x_train", "x_test"):
        if name not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise DataError(f"{path}: has no array '{name}' (it holds {found}); needed are x_train and x_test")
    return {
        split: _split(path, split, arrays, config, spec, classes) if f"x_{split}" in arrays else None
        for split in ("train", "val", "test")
    }


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of the splits from an `.npz` file, mapped into memory where they are uncompressed.

    Raises:
        DataError: not an npz file, damaged, or with pickled arrays.
    """
    wanted = [f"{kind}_{split}" for split in ("train", "val", "test") for kind in "xy"]
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: is not an .npz file; write it with numpy.savez")
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem: info for info in archive.infolist()}
            if not any(name in members for name in wanted):
                return {name: np.empty(0) for name in members}
            return {name: _member(path, archive, members[name]) for name in wanted if name in members}
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise DataError(f"{path}: is damaged and cannot be read ({error}); write it again") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    name = Path(info.filename).stem
    try:
        with archive.open(info) as stream:
            start = io.BytesIO(stream.read(_NPY_HEADER))
        shape, fortran, dtype = _header(start)
    # What numpy raises for a header depends on how far its parser comes.
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
        SyntaxError,
        tokenize.TokenError,
    ) as error:
        raise DataError(f"{path}: array '{name}' cannot be read ({error}); write it again") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: array '{name}' is pickled (dtype object), which is never loaded; store it as numbers of one shape"
        )
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or start.tell() + size != info.file_size:
        raise DataError(
            f"{path}: array '{name}' of shape {shape} and type {dtype} takes {size} bytes and has "
            f"{info.file_size - start.tell()}; write it again"
        )
    if size > max(INFLATED_BYTES, INFLATED_FACTOR * info.compress_size):
        raise DataError(
            f"{path}: array '{name}' would inflate from {info.compress_size} to {size} bytes; "
            "where that is right, write it with numpy.savez, uncompressed"
        )
    try:
        if info.compress_type == zipfile.ZIP_STORED and size > COPIED_BYTES:
            offset = _data_offset(path, info) + start.tell()
            return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
        with archive.open(info) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except ValueError as error:
        raise DataError(f"{path}: array '{name}' cannot be read ({error}); write it again") from error


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order (True: Fortran) and type of an array; the stream stands at its data then."""
    version = np.lib.format.read_magic(stream)
    # Version 3 differs from 2 in the encoding of field names, and arrays with fields are none of ours.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's data begin in the file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        # Length of name and extra field, as the local header has them: the central directory may differ.
        name_length, extra_length = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:30])
    return int(info.header_offset + _LOCAL_HEADER + name_length + extra_length)


def _split(
    path: Path,
    split: str,
    arrays: dict[str, NDArray[Any]],
    config: DataConfig,
    spec: InputSpec,
    classes: int | None,
) -> IndexedSplit:
    values, targets = arrays[f"x_{split}"], arrays.get(f"y_{split}")
    where = f"{path}: x_{split}"
    if values.ndim == 0 or len(values) == 0:
        raise DataError(f"{where}: has no examples; every split needs some")
    if targets is not None:
        if targets.ndim == 0 or len(targets) != len(values):
            length = "a scalar" if targets.ndim == 0 else f"{len(targets)} entries"
            raise DataError(f"{path}: x_{split} has {len(values)} examples, y_{split} {length}; make them equal")
        targets = check_labels(targets, classes, f"{path}: y_{split}")
    prepare = preprocess(config, spec, values.shape[1:], values.dtype, where)
    check_finite(values, where)
    check_range(values, spec, where)
    mapped = Stamp.of(path) if isinstance(values, np.memmap) else None
    return IndexedSplit(ArrayReader(values, prepare, mapped), targets, np.arange(len(values)))
