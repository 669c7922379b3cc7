"""Fewer channels after the kernel, which are outputs themselves: `kh×kw (I → r)`, then `1×1 (r → O - r)` beside them.

A product of rank r, `M = U V`, holds r² numbers too many: `U A⁻¹` and `A V` give the same `M` for every regular `A`.
With `A` the rows of `U` at r outputs, these rows become the identity, which need not be stored or computed: r outputs
are the inner channels, the others combinations of them. An interpolative decomposition of `M` (Cheng, Gimbutas,
Martinsson and Rokhlin, On the compression of low rank matrices, 2005), here of the `M` that is best for the outputs.
The r outputs come from a QR decomposition with column pivoting, which keeps the combinations small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.linalg

from onnxneutrino.factor_channel import OutputProjection, OutputSpectrum
from onnxneutrino.factors import Factors, Stage
from onnxneutrino.plan import Array

TINY = 1e-9  # of a pivot beside the first: such rows say nothing that others do not


class Interpolative(OutputProjection):
    """The form `interpolative` of one layer."""

    def __init__(self, spectrum: OutputSpectrum) -> None:
        super().__init__("interpolative", spectrum)

    def factors(self, ranks: tuple[int, ...]) -> Factors:
        """The chain of `channel` at `ranks`, with r of the outputs as inner channels."""
        return interpolated(super().factors(ranks))


def interpolated(factors: Factors) -> Factors:
    """The same product, with the rows of the last stage at r outputs those of the identity.

    Args:
        factors: two stages, the last one `(O, r, 1, ...)`.
    """
    first, last = factors.stages
    combined = np.asarray(last.weight, np.float64).reshape(last.weight.shape[:2])
    rank = len(first.weight)
    upper, order = scipy.linalg.qr(combined.T, mode="r", pivoting=True)
    pivots = np.abs(upper.diagonal())
    sure = int(np.count_nonzero(pivots > TINY * pivots[0]))  # 0 for a last stage of zeros
    others = np.zeros((len(combined) - rank, rank))
    others[:, :sure] = scipy.linalg.solve_triangular(upper[:sure, :sure], upper[:sure, rank:]).T
    weight = np.zeros_like(combined)
    direct = np.sort(order[:rank])
    places = np.argsort(order[:rank])
    weight[direct] = np.eye(rank)
    weight[order[rank:]] = others[:, places]
    inner = combined[direct] @ np.asarray(first.weight, np.float64).reshape(rank, -1)
    stages = (
        replace(first, weight=np.asarray(inner.reshape(first.weight.shape), np.float32)),
        replace(last, weight=np.asarray(weight.reshape(last.weight.shape), np.float32)),
    )
    return replace(factors, stages=stages, direct=tuple(map(int, direct)))


def parts_of(factors: Factors) -> list[tuple[Stage, Array]]:
    """Stages and biases as a graph holds them: the `direct` outputs, and the others made of these.

    The inner channels have their own bias already: of the others' it takes off what comes with them. At full rank there
    are no others.
    """
    first, *last = factors.written
    parts = [(first, factors.inner_bias)]
    for stage in last:
        matrix = stage.weight.reshape(stage.weight.shape[:2])
        parts.append((stage, factors.bias[list(factors.others)] - matrix @ factors.inner_bias))
    return parts


def with_parts(factors: Factors, stages: Sequence[Stage], biases: Sequence[Array]) -> Factors:
    """The inverse of `parts_of`: `factors` with the values of such stages and biases; their error is not known."""
    direct, others = list(factors.direct), list(factors.others)
    last = factors.stages[-1]
    weight, bias = np.zeros_like(last.weight), np.zeros_like(factors.bias)
    weight[direct] = np.eye(len(direct), dtype=np.float32).reshape(len(direct), *last.weight.shape[1:])
    bias[direct] = biases[0]
    for stage, own in zip(stages[1:], biases[1:], strict=True):
        weight[others] = stage.weight
        bias[others] = own + stage.weight.reshape(stage.weight.shape[:2]) @ biases[0]
    return replace(factors, stages=(stages[0], replace(last, weight=weight)), bias=bias, error=float("nan"))
