"""Calibration: input patches of layers at sampled positions, their moments, and the outputs beside them.

Everything here is read off one run of a network whose layer inputs (or outputs) are exposed. A position is a
number in `0 .. positions - 1` of the layer's output map, row by row.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino import clock
from onnxneutrino.conv_geometry import windows
from onnxneutrino.factors import Moments
from onnxneutrino.moments import BLOCK, MomentSum
from onnxneutrino.plan import Array, Geometry, Layer

Run = Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
Keep = Callable[[NDArray[Any]], NDArray[Any]]
ROWS_PER_DIMENSION = 5
IMAGES = (512, 20480)


def in_place(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself."""
    return array


def images_needed(layers: Sequence[Layer], rows: float | None = None) -> int:
    """Examples to calibrate on, so that every layer gets `rows` (five) per dimension where its map allows."""
    rows = ROWS_PER_DIMENSION if rows is None else rows
    sizes = ((layer.patch, sum(use.positions for use in layer.uses)) for layer in layers)
    wanted = max((rows * patch / positions for patch, positions in sizes), default=0)
    return int(min(max(math.ceil(wanted), IMAGES[0]), IMAGES[1]))


def sample_positions(layer: Layer, examples: int, per_example: int, seed: int) -> NDArray[np.int64]:
    """Positions `(examples, per_example)`, drawn without repeats within an example, by seed and layer name."""
    generator = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
    count = min(per_example, layer.positions)
    if count == 1:
        return generator.integers(0, layer.positions, (examples, 1))
    return np.argsort(generator.random((examples, layer.positions)), axis=1)[:, :count].astype(np.int64)


def patches(layer: Layer, geometry: Geometry, tensor: NDArray[Any], positions: NDArray[np.int64]) -> Array:
    """Input patches `(n·k, D)` of a stage with `geometry` at `positions` `(n, k)`, `D = I·kh·kw`.

    `tensor` is what the stage reads: `(n, I, H, W)`, `(n, I, L)`, `(n, I, D, H, W)`, `(n, I)` or `(n, ..., I)`.
    """
    if layer.kind in ("gemm", "matmul"):
        rows = np.arange(len(positions))[:, None]
        picked = tensor.reshape(len(positions), -1, tensor.shape[-1])[rows, positions]
        return np.asarray(picked.reshape(positions.size, -1), np.float32)
    image = tensor[..., None] if layer.kind == "conv1d" else tensor
    return np.asarray(windows(geometry, image, positions), np.float32)


def outputs_at(layer: Layer, tensor: NDArray[Any], positions: NDArray[np.int64]) -> Array:
    """The layer's outputs `(n·k, O)` at the same positions."""
    examples, count = positions.shape
    rows = np.repeat(np.arange(examples), count)
    flat = positions.reshape(-1)
    if layer.kind in ("gemm", "matmul", "map"):
        return np.asarray(tensor.reshape(examples, -1, tensor.shape[-1])[rows, flat], np.float32)
    return np.asarray(tensor.reshape(examples, tensor.shape[1], -1)[rows, :, flat], np.float32)


def calibrate(
    run: Run,
    tensors: Sequence[str],
    layers: Sequence[Layer],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    examples: int,
    seed: int,
    deadline: float = math.inf,
    progress: Callable[[int], None] = lambda done: None,
    threads: int = 1,
    rows: float | None = None,
    keep: Keep = in_place,
) -> tuple[dict[str, Moments], int]:
    """Moments of every layer's input patches, and the number of examples they come from.

    Where several places apply one weight, each gives equally many of its patches, as far as its map has them.

    Args:
        run: runs the network on one batch and returns `tensors`.
        tensors: the tensors that the layers read.
        layers: whose moments to take.
        batches: inputs; taken until `examples` are used or `clock.now()` passes `deadline`.
        examples: how many to use.
        seed: of the sampled positions.
        deadline: on the clock of `clock.now`.
        progress: called with the examples done.
        threads: layers to work on at the same time.
        rows: patches of a layer, by their dimension; None for five.
        keep: puts an array where it may stay.
    """
    rows = ROWS_PER_DIMENSION if rows is None else rows
    sums = {layer.name: MomentSum(layer.patch) for layer in layers}
    done = 0

    def add(layer: Layer, inputs: Sequence[NDArray[Any]], size: int) -> None:
        per_example = math.ceil(rows * layer.patch / (examples * len(inputs)))
        for use, tensor in zip(layer.uses, inputs, strict=True):
            positions = sample_positions(use, size, per_example, seed + done)
            step = max(1, BLOCK // positions.shape[1])  # a batch's patches at once may take hundreds of megabytes
            for start in range(0, size, step):
                part = slice(start, start + step)
                sums[layer.name].add(patches(use, use.geometry, tensor[part], positions[part]))

    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            size = len(next(iter(batch.values())))
            values = dict(zip(tensors, run(batch), strict=True))
            inputs = [[values[use.input] for use in layer.uses] for layer in layers]
            list(pool.map(add, layers, inputs, [size] * len(layers)))
            del values, inputs  # or they would stay while the next batch runs
            done += size
            progress(done)
            # Without a deadline no time is read: a repetition may calibrate where the run itself still had the moments.
            if done >= examples or (deadline < math.inf and clock.now() > deadline):
                break
    # One layer after the other gives up its sum, so that sums and moments are not both there in full.
    return {layer.name: _kept(sums.pop(layer.name).moments(), keep) for layer in layers}, done


def _kept(moments: Moments, keep: Keep) -> Moments:
    sigma = None if moments.sigma is None else keep(moments.sigma)
    return replace(moments, sigma=sigma, rows=None if moments.rows is None else keep(moments.rows))
