"""The probe: a fixed set of training inputs on which the original's answers are kept.

Against it a compressed network is refitted (each layer's original outputs) and scored (the original's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.calibrate import Run, outputs_at, patches, sample_positions
from onnxneutrino.data import Inputs, Split
from onnxneutrino.losses import Loss, rows, softmax
from onnxneutrino.plan import Array, Geometry, Layer

RunNamed = Callable[[Inputs], Mapping[str, NDArray[Any]]]
PROBE_BYTES = 64 << 20
PROBE_IMAGES = (64, 2048)
REFIT_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs in batches, the original's outputs on them, and each layer's outputs at sampled positions.

    Attributes:
        batches: inputs.
        outputs: for each batch the tensors that the loss reads.
        positions: for each layer and batch, `(n, k)`.
        targets: for each layer the original's outputs there, `(rows, O)`.
    """

    batches: Sequence[Inputs]
    outputs: Sequence[Sequence[NDArray[Any]]]
    positions: Mapping[str, Sequence[NDArray[np.int64]]]
    targets: Mapping[str, Array]


def probe_batches(split: Split, size: int, seed: int, images: int | None = None) -> list[Inputs]:
    """Shuffled, augmented training inputs: `images`, or as many as 64 MB hold, from 64 to 2048."""
    taken: list[Inputs] = []
    count = 0
    wanted = math.inf if images is None else images
    for batch in split.batches(size, seed=seed, augment=True):
        if images is None and not taken:
            own = sum(array.nbytes for array in batch.inputs.values()) / len(batch)
            wanted = min(max(PROBE_BYTES / max(own, 1.0), PROBE_IMAGES[0]), PROBE_IMAGES[1])
        taken.append(batch.inputs)
        count += len(batch)
        if count >= wanted:
            break
    return taken


def take_probe(
    batches: Sequence[Inputs], layers: Sequence[Layer], outputs: Sequence[str], run: RunNamed, seed: int
) -> Probe:
    """Run the original on the probe.

    Args:
        batches: the inputs.
        layers: whose outputs to keep.
        outputs: the tensors that the loss reads.
        run: gives these tensors and the layers' outputs by name.
        seed: of the sampled positions.
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    per_example = max(1, REFIT_ROWS // max(sum(sizes), 1))
    positions = {
        layer.name: [sample_positions(layer, size, per_example, seed + index) for index, size in enumerate(sizes)]
        for layer in layers
    }
    targets: dict[str, list[Array]] = {layer.name: [] for layer in layers}
    originals = []
    for index, batch in enumerate(batches):
        values = run(batch)
        originals.append([values[name] for name in outputs])
        for layer in layers:
            targets[layer.name].append(outputs_at(layer, values[layer.output], positions[layer.name][index]))
    return Probe(batches, originals, positions, {name: np.concatenate(own) for name, own in targets.items()})


def features_at(probe: Probe, layer: Layer, geometry: Geometry, run: Run) -> Array:
    """Patches of the tensor that `run` returns, at the layer's probe positions; `(rows, d)`."""
    return np.concatenate(
        [
            patches(layer, geometry, run(batch)[0], probe.positions[layer.name][index])
            for index, batch in enumerate(probe.batches)
        ]
    )


def divergence(loss: Loss, original: Sequence[Sequence[Any]], own: Sequence[Sequence[Any]]) -> float:
    """How far outputs are from the original's, per example.

    `classes`: mean Kullback-Leibler divergence of the softmax outputs, in nats. `values`: squared error over
    the variance of the original's outputs.
    """
    if loss.kind == "classes":
        p = softmax(np.concatenate([rows(outputs[0]) for outputs in original]))
        q = softmax(np.concatenate([rows(outputs[0]) for outputs in own]))
        tiny = np.float32(1e-12)
        return float(np.mean(np.sum(p * (np.log(p + tiny) - np.log(q + tiny)), axis=-1)))
    errors = []
    for index in range(len(original[0])):
        a = np.concatenate([np.asarray(outputs[index], np.float64).reshape(-1) for outputs in original])
        b = np.concatenate([np.asarray(outputs[index], np.float64).reshape(-1) for outputs in own])
        errors.append(float(np.mean((a - b) ** 2)) / max(float(np.var(a)), 1e-12))
    return float(np.mean(errors))
