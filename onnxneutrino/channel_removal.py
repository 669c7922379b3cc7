"""Channels that the layers behind them hardly need: Optimal Brain Surgeon for whole channels.

A layer `y = W x + b` that loses the elements `R` of its input gets the weights that come nearest to its output on
centred inputs, `W_K + W_R Σ_RK Σ_KK⁻¹`. With `H = Σ⁻¹` the least error is `Σ_o w_oR (H_RR)⁻¹ w_oRᵀ`, and both `W`
and `H` of what is left follow by one block of elimination (Hassibi and Stork 1993; for blocks Frantar and Alistarh
2022, eq. 7 and 8). Those groups of channels go first that cost least for what they save. No ONNX here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.factors import Moments
from onnxneutrino.plan import Array

Matrix = NDArray[np.float64]
RIDGE = 1e-4  # of the mean variance of an input element
LEAST_CHANNELS = 4
AT_ONCE = 64  # one of so many groups goes with the cheapest one: what was computed for all serves more than one


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer, as far as the removal of channels concerns it.

    Attributes:
        weight: `(O, I, k)`, k the elements of its kernel.
        sigma: covariance of its input patches, `(I·k, I·k)`; None where its inputs all stay.
        inputs: the group of each of the I channels that it reads; 0 stays.
        outputs: the group of each of the O channels that it makes.
        price: divergence at the output of the network for a squared error of 1 in this layer's output.
        positions: by which its weights count in the cost.
    """

    weight: Array
    sigma: Matrix | None
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]
    price: float = 0.0
    positions: int = 1


def covariance(moments: Moments) -> Matrix:
    """`Σ` of a layer's input patches, `(D, D)`, with a small ridge."""
    sigma = np.array(moments.matrix(), np.float64)
    scale = float(np.trace(sigma)) / len(sigma)
    sigma[np.diag_indices(len(sigma))] += max(RIDGE * scale, 1e-30)
    return sigma


class _State:
    """A reader on the way: what is left of its weight and of the inverse covariance of its inputs."""

    def __init__(self, reader: Reader) -> None:
        self.kernel = reader.weight.shape[2]
        self.weight = np.asarray(reader.weight, np.float64).reshape(len(reader.weight), -1)
        self.inverse = None if reader.sigma is None else np.linalg.inv(reader.sigma)
        self.inputs, self.outputs = reader.inputs, reader.outputs
        self.price, self.positions = reader.price, reader.positions
        self.costs = self._costs()

    def _costs(self) -> Matrix:
        """The error that the removal of each input channel leaves, times the price."""
        if self.inverse is None:
            return np.zeros(len(self.inputs))
        count, kernel = len(self.inputs), self.kernel
        blocks = np.einsum("iaib->iab", self.inverse.reshape(count, kernel, count, kernel))
        rows = self.weight.reshape(-1, count, kernel)
        solved = np.linalg.solve(blocks, rows.transpose(1, 2, 0))  # (I, k, O)
        return np.asarray(self.price * np.einsum("oik,iko->i", rows, solved, optimize=True))

    def drop(self, groups: Sequence[int]) -> None:
        """Take some groups out of the inputs, the others making up for them, and out of the outputs."""
        gone, kept = np.isin(self.inputs, groups), ~np.isin(self.outputs, groups)
        if kept.all() and not gone.any():
            return
        part = np.repeat(gone, self.kernel)
        if self.inverse is not None and gone.any():
            column = self.inverse[:, part]
            block = np.linalg.solve(column[part], column.T)
            self.weight -= self.weight[:, part] @ block
            self.inverse -= column @ block
            self.inverse = self.inverse[np.ix_(~part, ~part)]
        self.weight = self.weight[:, ~part][kept]
        self.inputs, self.outputs = self.inputs[~gone], self.outputs[kept]
        self.costs = self._costs()


def removal_order(
    readers: Sequence[Reader],
    count: int,
    extra: Matrix,
    most: float,
    going_on: Callable[[], bool] = lambda: True,
) -> list[int]:
    """Groups in the order in which they should go.

    Args:
        readers: all layers that read or make channels.
        count: groups are numbered below it; 0 stays.
        extra: `(count,)`, what a group saves outside the layers (depthwise convolutions, scales).
        most: divergence at the output up to which the layers' errors, each with its price, may add up.
        going_on: asked before each removal.
    """
    states = [_State(reader) for reader in readers]
    read = np.zeros(count, bool)
    for state in states:
        if state.inverse is not None:
            read[state.inputs] = True
    read[0] = False
    order: list[int] = []
    spent = 0.0
    while going_on():
        costs, savings = np.zeros(count), extra.copy()
        left = read.copy()
        for state in states:
            costs += np.bincount(state.inputs, state.costs, count)
            columns = len(state.outputs) * state.kernel * state.positions
            savings += columns * np.bincount(state.inputs, minlength=count)
            row = len(state.inputs) * state.kernel * state.positions + 1
            savings += row * np.bincount(state.outputs, minlength=count)
            for own in (state.inputs, state.outputs):
                if len(own) <= LEAST_CHANNELS:
                    left[own] = False
        if not left.any():
            break
        rate = np.where(left, costs / np.maximum(savings, 1), np.inf)
        some = _cheapest(rate, states, max(int(left.sum() / AT_ONCE), 1))
        within = spent + np.cumsum(costs[some]) <= most
        some = [group for group, good in zip(some, within, strict=True) if good]
        if not some:
            break
        spent += float(costs[some].sum())
        order += some
        read[some] = False
        for state in states:
            state.drop(some)
    return order


def _cheapest(rate: Matrix, states: Sequence[_State], most: int) -> list[int]:
    """Up to `most` groups of the lowest finite rate, of each layer's channels at most an eighth, or one."""
    chosen: list[int] = []
    for group in np.argsort(rate, kind="stable")[:most].tolist():
        sides = [own for state in states for own in (state.inputs, state.outputs) if (own == group).any()]
        small = all(np.isin(own, chosen).sum() < max(len(own) // 8, 1) for own in sides)
        if np.isfinite(rate[group]) and small:
            chosen.append(group)
    return chosen


def made_good(weight: Array, bias: Array, mean: Array, sigma: Matrix, gone: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Weight and bias of a layer that lost input channels, nearest to its outputs on the calibration inputs.

    Args:
        weight: `(O, I, k)`.
        bias: `(O,)`.
        mean: of the input patches, `(I·k,)`.
        sigma: their covariance.
        gone: `(I,)`, the channels that are lost.

    Returns:
        The weight, of the same shape, with zeros for what is lost, and the bias.
    """
    lost = np.repeat(gone, weight.shape[2])
    flat = np.asarray(weight, np.float64).reshape(len(weight), -1)
    new = np.where(lost, 0.0, flat)
    kept = ~lost
    new[:, kept] += np.linalg.solve(sigma[np.ix_(kept, kept)], sigma[np.ix_(kept, lost)] @ flat[:, lost].T).T
    shift = (flat - new) @ np.asarray(mean, np.float64)
    return np.asarray(new.reshape(weight.shape), np.float32), np.asarray(bias + shift, np.float32)
