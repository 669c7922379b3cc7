"""Rewrites of a model, one idea per file: `run(model)` gives a new model and one line per thing done.

`NORMALIZE` makes the deployable graph simpler, `LOWER` makes a training copy that has correct gradients; both
run in this order. `OTHERS` are the modules that are called with more than a model or by their own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onnx import ModelProto

from onnxneutrino.passes import (
    drop_identity,
    drop_unused,
    fold_batchnorm,
    fold_scale,
    lower_auto_pad,
    lower_batchnorm,
    lower_constants,
    lower_hard,
    slim,
)

Pass: TypeAlias = Callable[[ModelProto], tuple[ModelProto, list[str]]]

NORMALIZE: tuple[Pass, ...] = (
    slim.run,
    drop_identity.run,
    fold_scale.run,  # Conv, Add, BatchNormalization: the Add must go in first
    fold_batchnorm.run,
    fold_scale.run,  # and what followed the BatchNormalization
    drop_unused.run,
)
LOWER: tuple[Pass, ...] = (
    lower_constants.run,
    drop_identity.run,
    lower_batchnorm.run,
    lower_auto_pad.run,
    lower_hard.run,
    drop_unused.run,
)
OTHERS: tuple[str, ...] = ("find_layers", "factorize", "free_batch")
