"""Data sets in one `.npz` file: `x_train y_train x_test y_test`, and `x_val y_val` where there are any.

Arrays of an uncompressed file are mapped into memory, so that one larger than memory can be used;
compressed ones are read once and stay in the type of the file. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
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


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Rows of one array, preprocessed."""

    array: NDArray[Any]
    prepare: Preprocess

    def __call__(self, rows: Rows, generator: np.random.Generator | None) -> Inputs:
        """Return the model's input for `rows`."""
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
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is not an .npz file; write it with numpy.savez")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(info.filename).stem: info for info in archive.infolist()}
            if not any(name in members for name in wanted):
                return {name: np.empty(0) for name in members}
            return {name: _member(path, archive, members[name]) for name in wanted if name in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, struct.error) as error:
        raise DataError(f"{path}: is damaged and cannot be read ({error}); write it again") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    name = Path(info.filename).stem
    try:
        with archive.open(info) as stream:
            mapped = None
            version = np.lib.format.read_magic(stream)
            if info.compress_type == zipfile.ZIP_STORED and version in ((1, 0), (2, 0)):
                mapped = _mapped(path, info, version, stream)
        if mapped is not None:
            return mapped
        with archive.open(info) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except ValueError as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise DataError(
                f"{path}: array '{name}' is pickled (dtype object), which is never loaded; "
                "store it as numbers of one shape"
            ) from error
        raise DataError(f"{path}: array '{name}' cannot be read ({error}); write it again") from error


def _mapped(path: Path, info: zipfile.ZipInfo, version: tuple[int, int], stream: Any) -> NDArray[Any] | None:
    """Map an uncompressed member; None where it cannot be (objects, no elements)."""
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject or 0 in shape:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset)
        # Length of name and extra field, as the local header has them: the central directory may differ.
        name_length, extra_length = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:30])
    offset = info.header_offset + _LOCAL_HEADER + name_length + extra_length + stream.tell()
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


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
    return IndexedSplit(ArrayReader(values, prepare), targets, np.arange(len(values)))
