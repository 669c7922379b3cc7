"""Arrays in temporary files: what a search over gigabytes of weights keeps, without memory of its own.

What is kept comes back as a read-only view of a map of its file. A graph can refer to it (`weights.initializer`), and
its pages go back to the system when nobody reads them (`weights.let_go`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino import weights

SEGMENT_BYTES = 2**28
ALIGNMENT = 64


class Spool:
    """A folder of temporary files; each goes with the last array in it, the folder with the spool."""

    def __init__(self, segment: int = SEGMENT_BYTES) -> None:
        """Files of `segment` bytes, where no single array is larger."""
        self._folder = Path(tempfile.mkdtemp(prefix="onnxneutrino-spool-"))
        self._segment = segment
        self._lock = threading.Lock()
        self._map: np.memmap[Any, Any] | None = None
        self._used = 0
        self._count = 0
        weakref.finalize(self, _remove_empty, self._folder)

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array as a view of a file; the array itself where it is small or in a file already."""
        if array.nbytes < weights.LARGE_TENSOR_BYTES or weights.is_mapped(array):
            return array
        with self._lock:
            if self._map is None or self._used + array.nbytes > len(self._map):
                self._begin(array.nbytes)
            assert self._map is not None
            start = self._used
            with open(self._map.filename or "", "r+b") as file:
                file.seek(start)
                file.write(np.ascontiguousarray(array).data)
            self._used = -(-(start + array.nbytes) // ALIGNMENT) * ALIGNMENT
            data = self._map[start : start + array.nbytes].view(np.ndarray)
        return data.view(array.dtype).reshape(array.shape)

    def keep_all(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All of them."""
        return {name: self.keep(array) for name, array in arrays.items()}

    def _begin(self, least: int) -> None:
        path = self._folder / str(self._count)
        self._count += 1
        size = max(self._segment, least)
        with path.open("wb") as file:
            file.truncate(size)  # a hole: only what is written takes space
        self._map = np.memmap(path, np.uint8, "r")
        self._used = 0
        weights.hold(os.fspath(path), self._map)
        weakref.finalize(self._map, _remove, path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _remove_empty(path.parent)


def _remove_empty(folder: Path) -> None:
    """The folder, once the last file in it is gone."""
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
