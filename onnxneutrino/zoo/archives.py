"""The official files of MNIST and CIFAR as arrays; nothing is extracted to disk, and nothing is unpickled.

MNIST (idx): a big-endian head of magic number and sizes, then bytes. CIFAR (binary version): records of the label,
one byte (CIFAR-100: coarse and fine label, two bytes), and 3072 bytes of an image, C×H×W
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.errors import DataError

Bytes: TypeAlias = NDArray[np.uint8]
CIFAR_IMAGE = (3, 32, 32)
MOST_CIFAR, MOST_MNIST = 50_000, 60_000  # images in a file
MNIST_IMAGE = (28, 28)
IDX_BYTES = 0x08
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, struct.error, ValueError)


def read_mnist(images: Path, labels: Path) -> tuple[Bytes, Bytes]:
    """Images `(N, 28, 28)` and labels `(N,)` of one split.

    Raises:
        DataError: damaged, or not of this form.
    """
    x, y = _idx(images, MNIST_IMAGE), _idx(labels, ())
    if len(x) != len(y):
        raise DataError(f"{labels}: holds {len(y)} labels for {len(x)} images; remove it and fetch again")
    return x, y


def _idx(path: Path, shape: tuple[int, ...]) -> Bytes:
    """The array of a compressed idx file whose entries have this shape."""
    head = struct.Struct(f">BBBB{1 + len(shape)}I")
    try:
        with gzip.open(path) as file:
            zero, nought, kind, axes, count, *size = map(int, head.unpack(file.read(head.size)))
            sound = (zero, nought, kind, axes, tuple(size)) == (0, 0, IDX_BYTES, 1 + len(shape), shape)
            if not sound or count > MOST_MNIST:
                raise ValueError("its head is that of other data")
            data: Bytes = np.frombuffer(_exactly(file, count * math.prod(shape)), np.uint8)
            return data.reshape(count, *shape)
    except DAMAGED as error:
        raise _damaged(path, error) from error


def read_cifar(
    archive: Path, splits: Mapping[str, Sequence[str]], label_bytes: int, classes: int
) -> dict[str, tuple[Bytes, Bytes]]:
    """Images `(N, 32, 32, 3)` and labels `(N,)` of every split.

    Args:
        archive: the compressed tar file.
        splits: names of its members by split; all others are passed over.
        label_bytes: bytes before an image; the last one is the label.
        classes: labels lie below.

    Raises:
        DataError: damaged, a member missing, too large or not of this form.
    """
    record = label_bytes + math.prod(CIFAR_IMAGE)
    wanted = {name for names in splits.values() for name in names}
    found: dict[str, Bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() and member.name in wanted else None
                if file is None:
                    continue
                if member.size % record or not 0 < member.size <= MOST_CIFAR * record:
                    raise ValueError(f"its member {member.name} has {member.size} bytes")
                found[member.name] = np.frombuffer(_exactly(file, member.size), np.uint8).reshape(-1, record)
        missing = sorted(wanted - set(found))
        if missing:
            raise ValueError(f"it has no member {missing[0]}")
    except DAMAGED as error:
        raise _damaged(archive, error) from error
    read = {}
    for split, names in splits.items():
        rows = np.concatenate([found[name] for name in names])
        labels = rows[:, label_bytes - 1].copy()
        if labels.max() >= classes:
            raise _damaged(archive, ValueError(f"a label is {labels.max()}"))
        images = rows[:, label_bytes:].reshape(-1, *CIFAR_IMAGE).transpose(0, 2, 3, 1)
        read[split] = np.ascontiguousarray(images), labels
    return read


def _exactly(file: IO[bytes] | gzip.GzipFile, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"it ends after {len(data)} of {count} bytes")
    return data


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read: {' '.join(str(error).split())}; remove it and fetch again")
