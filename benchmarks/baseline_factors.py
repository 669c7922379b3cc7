"""Factors of one layer from its weight alone: what is done where nothing is known of the layer's inputs.

| form | chain of `W` (`O × I × kh × kw`) |
|---|---|
| `svd`, `channel` | truncated SVD of `W` as `(O, I·kh·kw)`: `kh×kw (I → r)`, `1×1 (r → O)` |
| `spatial_hv` | truncated SVD of `W` as `(I·kh, O·kw)`: `kh×1 (I → r)`, `1×kw (r → O)` (Jaderberg et al. 2014) |
| `tucker2` | truncated HOSVD and a few steps of HOOI: `1×1 (I → r1)`, `kh×kw (r1 → r2)`, `1×1 (r2 → O)` |

The bias stays as it is. Singular values are shared evenly by the two stages; in `tucker2` the outer stages are
orthogonal, as Kim et al. (2016) have them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.factors import Factors, Stage
from onnxneutrino.plan import Array, Choice, Form

HOOI_STEPS = 3


def plain_form(shape: tuple[int, ...]) -> Form:
    """`svd` for a weight `(O, I, 1, 1)`, else `channel`."""
    return "svd" if max(shape[2:]) == 1 else "channel"


def weight_factors(choice: Choice, weight: Array, bias: Array) -> Factors:
    """The chain of `choice` nearest to the weight, in its Frobenius norm (near to it for `tucker2`).

    Args:
        choice: form `svd`, `channel`, `spatial_hv` or `tucker2`, and its ranks.
        weight: `(O, I, *kernel)`.
        bias: `(O,)`.
    """
    if choice.form == "tucker2":
        stages = _tucker2(weight, *choice.ranks)
    elif choice.form == "spatial_hv":
        stages = _spatial(weight, *choice.ranks)
    else:
        stages = _channel(weight, *choice.ranks)
    return Factors(choice.form, choice.ranks, tuple(_stage(own) for own in stages), np.asarray(bias, np.float32))


def _stage(weight: NDArray[Any]) -> Stage:
    return Stage(np.ascontiguousarray(weight, np.float32))


def _halves(matrix: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """`(n, r)` and `(r, m)`, each with the roots of the singular values: the best product of that rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def _channel(weight: Array, rank: int) -> tuple[NDArray[Any], ...]:
    outputs, inputs, *kernel = weight.shape
    last, first = _halves(weight.reshape(outputs, -1), rank)
    return first.reshape(rank, inputs, *kernel), last.reshape(outputs, rank, *[1] * len(kernel))


def _spatial(weight: Array, rank: int) -> tuple[NDArray[Any], ...]:
    outputs, inputs, kh, kw = weight.shape
    first, last = _halves(weight.transpose(1, 2, 0, 3).reshape(inputs * kh, outputs * kw), rank)
    return (
        first.T.reshape(rank, inputs, kh, 1),
        last.reshape(rank, outputs, 1, kw).transpose(1, 0, 2, 3),
    )


def _tucker2(weight: Array, inner: int, outer: int) -> tuple[NDArray[Any], ...]:
    """Stages at ranks `inner` (r1, of the inputs) and `outer` (r2, of the outputs)."""
    outputs, inputs, *kernel = weight.shape
    taps = math.prod(kernel)
    tensor = np.asarray(weight, np.float64).reshape(outputs, inputs, taps)
    of_inputs = _leading(tensor.transpose(1, 0, 2).reshape(inputs, -1), inner)
    of_outputs = _leading(tensor.reshape(outputs, -1), outer)
    for _ in range(HOOI_STEPS):
        seen = np.einsum("oit,or->rit", tensor, of_outputs, optimize=True)
        of_inputs = _leading(seen.transpose(1, 0, 2).reshape(inputs, -1), inner)
        seen = np.einsum("oit,ir->ort", tensor, of_inputs, optimize=True)
        of_outputs = _leading(seen.reshape(outputs, -1), outer)
    core = np.einsum("oit,or,is->rst", tensor, of_outputs, of_inputs, optimize=True)
    ones = [1] * len(kernel)
    return (
        of_inputs.T.reshape(inner, inputs, *ones),
        core.reshape(outer, inner, *kernel),
        of_outputs.reshape(outputs, outer, *ones),
    )


def _leading(unfolding: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """The top left singular vectors of `(n, m)`, `(n, r)`, from its Gram matrix."""
    _, vectors = np.linalg.eigh(unfolding @ unfolding.T)
    return np.asarray(vectors[:, ::-1][:, :rank])
