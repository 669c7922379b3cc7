"""Rewrites of a model, one idea per file: `run(model)` gives a new model and one line per thing done.

`NORMALIZE` makes the deployable graph simpler; `LOWER_FIRST`, before the opset is brought up, and `LOWER` make a
training copy that has correct gradients. Each runs in its order. `OTHERS` are the modules that are called with more
than a model or by their own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onnx import ModelProto

from onnxneutrino.passes import (
    drop_identity,
    drop_unused,
    fold_batchnorm,
    fold_constants,
    fold_scale,
    lower_auto_pad,
    lower_batchnorm,
    lower_cast,
    lower_clip,
    lower_constants,
    lower_conv_transpose,
    lower_cumsum,
    lower_depth_space,
    lower_einsum,
    lower_exponential,
    lower_formula,
    lower_gelu,
    lower_group_conv,
    lower_half,
    lower_hard,
    lower_indexing,
    lower_lp_normalization,
    lower_lrn,
    lower_matmul,
    lower_normalization,
    lower_pad,
    lower_piecewise,
    lower_pool,
    lower_pow,
    lower_reduce,
    lower_removed,
    lower_resize,
    lower_shapes,
    lower_softplus,
    lower_sum,
    lower_where,
    slim,
)

Pass: TypeAlias = Callable[[ModelProto], tuple[ModelProto, list[str]]]

NORMALIZE: tuple[Pass, ...] = (
    fold_constants.run,
    slim.run,
    drop_identity.run,
    fold_scale.run,  # Conv, Add, BatchNormalization: the Add must go in first
    fold_batchnorm.run,
    fold_scale.run,  # and what followed the BatchNormalization
    drop_unused.run,
)
LOWER_FIRST: tuple[Pass, ...] = (
    lower_half.run,
    lower_constants.run,
    lower_removed.run,  # no shape is known behind them
    lower_shapes.run,
    lower_resize.run,  # before the conversion, which changes what old ones compute
)
LOWER: tuple[Pass, ...] = (
    lower_constants.run,
    lower_shapes.run,
    drop_identity.run,
    lower_batchnorm.run,
    lower_auto_pad.run,
    lower_hard.run,
    lower_resize.run,
    lower_pad.run,
    lower_depth_space.run,
    lower_conv_transpose.run,
    lower_group_conv.run,  # that of a ConvTranspose too
    lower_pool.run,
    lower_einsum.run,
    lower_matmul.run,
    lower_normalization.run,
    lower_lp_normalization.run,
    lower_lrn.run,
    lower_reduce.run,
    lower_cast.run,
    lower_clip.run,
    lower_cumsum.run,
    lower_exponential.run,
    lower_formula.run,
    lower_gelu.run,
    lower_piecewise.run,
    lower_pow.run,
    lower_softplus.run,
    lower_sum.run,
    lower_where.run,  # those that the others wrote too
    lower_indexing.run,  # what the others have written, too
    drop_unused.run,
)
OTHERS: tuple[str, ...] = ("drop_channels", "factorize", "find_layers", "free_batch")
