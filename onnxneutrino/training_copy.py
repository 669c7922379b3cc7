"""The training copy of a graph: the same function in operators with right gradients, with a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.finetune import MINIMUM_OPSET
from onnxneutrino.graph import convert_opset, opset, with_batch
from onnxneutrino.passes import LOWER
from onnxneutrino.runtime import Runner

TRAINING_OPSET = 17
TOLERANCE = 1e-3


def training_copy(model: ModelProto, batch: int) -> ModelProto:
    """The lowered copy with opset >= 13 and batch `batch`.

    Raises:
        TrainingError: an operator cannot be brought to an opset that the training runtime differentiates.
    """
    copy = with_batch(model, batch)
    current = opset(copy)
    if current is None or current < MINIMUM_OPSET:
        try:
            copy = with_batch(convert_opset(copy, TRAINING_OPSET), batch)
        except ModelError as error:
            raise TrainingError(f"no training copy: {error}; use --trainer none") from error
    for lower in LOWER:
        copy, _ = lower(copy)
    return copy


def check_training_copy(model: ModelProto, copy: ModelProto, inputs: Mapping[str, NDArray[Any]], threads: int) -> None:
    """Compare the copy's outputs with the model's on one batch.

    Raises:
        TrainingError: they differ by more than 1e-3 of the largest value.
    """
    names = [value.name for value in model.graph.output]
    wanted, got = Runner(model, threads=threads)(inputs), Runner(copy, names, threads=threads)(inputs)
    for name, a, b in zip(names, wanted, got, strict=True):
        difference = float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0.0))
        scale = float(np.max(np.abs(np.asarray(a, np.float64)), initial=0.0))
        if not difference <= TOLERANCE * max(scale, 1e-6):
            raise TrainingError(
                f"output '{name}' of the training copy differs from the model's by {difference:.2g}; "
                "use --trainer none, and please report the model"
            )
