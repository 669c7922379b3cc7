"""Records of steps: values of this package in a file, bit for bit, whole or not at all, and without pickle.

A record is an `.npz`: the arrays of a value, and the rest of it as JSON. Every member has a checksum.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.allocate import Option
from onnxneutrino.bench import Candidate
from onnxneutrino.blocks import Block
from onnxneutrino.chain_latency import FormTimes, LatencyTable, LayerTimes
from onnxneutrino.channels import Channels, Slice
from onnxneutrino.factors import Factors, Moments, Stage
from onnxneutrino.losses import Loss
from onnxneutrino.metrics import Drop
from onnxneutrino.narrowing import Removal
from onnxneutrino.plan import Choice
from onnxneutrino.task import FineTune, Network, Tuned
from onnxneutrino.training_plan import TrainingPlan

KINDS = {
    kind.__name__: kind
    for kind in (
        Block,
        Candidate,
        Channels,
        Choice,
        Drop,
        Factors,
        FineTune,
        FormTimes,
        LatencyTable,
        LayerTimes,
        Loss,
        Moments,
        Network,
        Option,
        Removal,
        Slice,
        Stage,
        TrainingPlan,
        Tuned,
    )
}
HEAD = "head"

Arrays = list[NDArray[Any]]
Read = TypeVar("Read")


def packed(value: Any) -> tuple[Any, Arrays]:
    """A value as JSON and arrays, each in the order of C: the runtime of linear algebra tells orders apart.

    Takes numbers, strings, bytes, None, arrays, and sequences, mappings and the dataclasses of `KINDS` made of them.
    """
    arrays: Arrays = []
    return _packed(value, arrays), arrays


def _packed(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(np.asarray(value, order="C"))
        return {"array": len(arrays) - 1}
    if isinstance(value, bytes):
        arrays.append(np.frombuffer(value, np.uint8))
        return {"bytes": len(arrays) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"map": [[_packed(key, arrays), _packed(item, arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_packed(item, arrays) for item in value]
    if dataclasses.is_dataclass(value):
        own = {field.name: _packed(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {KINDS[type(value).__name__].__name__: own}
    return value


def unpacked(value: Any, arrays: Arrays) -> Any:
    """What `packed` took; sequences become tuples.

    Raises:
        KeyError: of a kind that is not known.
    """
    if isinstance(value, list):
        return tuple(unpacked(item, arrays) for item in value)
    if not isinstance(value, dict):
        return value
    ((kind, own),) = value.items()
    if kind == "array":
        return arrays[own]
    if kind == "bytes":
        return arrays[own].tobytes()
    if kind == "map":
        return {unpacked(key, arrays): unpacked(item, arrays) for key, item in own}
    return KINDS[kind](**{name: unpacked(item, arrays) for name, item in own.items()})


def write_record(path: Path, head: Mapping[str, Any], arrays: Arrays) -> None:
    """Write JSON and arrays in one piece.

    The folder is not synchronized: a rename that a loss of power takes back costs the step.

    Raises:
        OSError: the disk or the system refuses; what was at `path` is still there.
    """
    members: dict[str, Any] = {HEAD: np.frombuffer(json.dumps(head).encode(), np.uint8)}
    members |= {str(index): array for index, array in enumerate(arrays)}
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **members)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_head(path: Path) -> dict[str, Any] | None:
    """The JSON of a record; None for a file that is none, or damaged."""
    return _read(path, lambda members: json.loads(members[HEAD].tobytes()))


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a record; None for a file that is none, or damaged."""
    return _read(path, lambda members: [members[str(index)] for index in range(len(members) - 1)])


def _read(path: Path, wanted: Callable[[Mapping[str, NDArray[Any]]], Read]) -> Read | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            return wanted(members)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
