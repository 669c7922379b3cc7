"""Make an ONNX model smaller and faster, its metric at most delta worse.

import onnxneutrino

result = onnxneutrino.compress("in.onnx", delta=1.0)
print(result.report.enhancement.params)
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxneutrino.errors import (
    DataError,
    MetricError,
    ModelError,
    NeutrinoError,
    OutputError,
    TrainingError,
    UsageError,
)

if TYPE_CHECKING:
    from onnx import ModelProto

    from onnxneutrino.conductor import Result
    from onnxneutrino.events import Event

__all__ = [
    "DataError",
    "MetricError",
    "ModelError",
    "NeutrinoError",
    "OutputError",
    "TrainingError",
    "UsageError",
    "compress",
]


def compress(
    model: str | PathLike[str] | ModelProto,
    *,
    progress: Callable[[Event], None] = lambda event: None,
    **options: Any,
) -> Result:
    """Compress a model; what `onnxneutrino compress` does, without writing a file.

    Args:
        model: a path, beside which a TOML file may describe the data, or a model.
        progress: called with events.
        **options: those of the command line and the keys of the TOML file, with underscores: `data`, `delta`,
            `metric`, `time_limit` (seconds or "15m"), `stage`, `objective`, `max_params` (a number or "200k"),
            `exclude`, `layout`, `scale` ...

    Returns:
        The compressed model and the report; `report.missed()` lists the hard targets that were not met.

    Raises:
        NeutrinoError: see `onnxneutrino.errors`.
    """
    from onnxneutrino import conductor
    from onnxneutrino.config import load_config
    from onnxneutrino.cost import size_bytes
    from onnxneutrino.graph import load

    if isinstance(model, (str, PathLike)):
        path = Path(model)
        config = load_config(path, options)
        given = load(path).model
        return conductor.compress(given, config, name=path.name, size_bytes=size_bytes(path), tell=progress)
    return conductor.compress(model, load_config(None, options), tell=progress)
