"""The probe: a fixed set of training inputs on which the answers of the original, or of a trained network, are kept.

Against it what is made of that network is refitted (each layer's outputs) and scored (the network's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.calibrate import Keep, Run, in_place, outputs_at, patches, sample_positions
from onnxneutrino.data import Inputs, Split
from onnxneutrino.factors import Stage, stage_geometries
from onnxneutrino.losses import Loss, rows, softmax
from onnxneutrino.plan import Array, Layer
from onnxneutrino.runtime import Runner

RunNamed = Callable[[Inputs], Mapping[str, NDArray[Any]]]
PROBE_BYTES = 64 << 20
PROBE_IMAGES = (64, 2048)
REFIT_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs in batches, a network's outputs on them, and each layer's outputs at sampled positions.

    Attributes:
        batches: inputs.
        outputs: for each batch the tensors that the loss reads.
        positions: for each layer, each of its places under its own name, and batch, `(n, k)`.
        targets: for each layer its outputs there, `(rows, O)`; of one example all places stand together.
    """

    batches: Sequence[Inputs]
    outputs: Sequence[Sequence[NDArray[Any]]]
    positions: Mapping[str, Sequence[NDArray[np.int64]]]
    targets: Mapping[str, Array]


def probe_batches(
    split: Split, size: int, seed: int, images: int | None = None, most: int = PROBE_IMAGES[1]
) -> list[Inputs]:
    """Shuffled, augmented training inputs: `images`, or as many as 64 MB hold, from 64 to `most`."""
    taken: list[Inputs] = []
    count = 0
    wanted = math.inf if images is None else images
    for batch in split.batches(size, seed=seed, augment=True):
        if images is None and not taken:
            own = sum(array.nbytes for array in batch.inputs.values()) / len(batch)
            wanted = min(max(PROBE_BYTES / max(own, 1.0), PROBE_IMAGES[0]), most)
        taken.append(batch.inputs)
        count += len(batch)
        if count >= wanted:
            break
    return taken


def by_name(model: ModelProto, outputs: Sequence[str], layers: Sequence[Layer], threads: int) -> RunNamed:
    """Run a network for what the loss reads and what the layers put out, in one go."""
    names = list(dict.fromkeys([*outputs, *(use.output for layer in layers for use in layer.uses)]))
    runner = Runner(model, names, threads=threads)
    return lambda inputs: dict(zip(names, runner(inputs), strict=True))


def take_probe(
    batches: Sequence[Inputs],
    layers: Sequence[Layer],
    outputs: Sequence[str],
    run: RunNamed,
    seed: int,
    most: int | None = None,
    keep: Keep = in_place,
) -> Probe:
    """Run a network on the probe.

    Args:
        batches: the inputs.
        layers: whose outputs to keep.
        outputs: the tensors that the loss reads.
        run: gives these tensors and the layers' outputs by name.
        seed: of the sampled positions.
        most: rows of a layer, about, where it has several positions; None for 8192.
        keep: puts an array where it may stay.
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    per_example = max(1, (REFIT_ROWS if most is None else most) // max(sum(sizes), 1))
    positions = {
        use.name: [sample_positions(use, size, per_example, seed + index) for index, size in enumerate(sizes)]
        for layer in layers
        for use in layer.uses
    }
    targets: dict[str, list[Array]] = {layer.name: [] for layer in layers}
    originals = []
    for index, batch in enumerate(batches):
        values = run(batch)
        originals.append([values[name] for name in outputs])
        for layer in layers:
            taken = [outputs_at(use, values[use.output], positions[use.name][index]) for use in layer.uses]
            targets[layer.name].append(_by_example(taken, sizes[index]))
    return Probe(
        batches, originals, positions, {layer.name: keep(np.concatenate(targets.pop(layer.name))) for layer in layers}
    )


def features_at(probe: Probe, layer: Layer, stages: Sequence[Stage], run: Run) -> Array:
    """What the last of `stages` reads at the layer's probe positions, in the order of its targets; `(rows, d)`.

    Args:
        probe: the inputs and positions.
        layer: the layer.
        stages: its chain.
        run: gives the tensor that feeds the last stage, in each of the layer's places.
    """
    geometries = [stage_geometries(stages, use.geometry)[-1] for use in layer.uses]
    found = []
    for index, batch in enumerate(probe.batches):
        fed = zip(layer.uses, geometries, run(batch), strict=True)
        taken = [patches(use, own, tensor, probe.positions[use.name][index]) for use, own, tensor in fed]
        found.append(_by_example(taken, len(probe.positions[layer.name][index])))
    return np.concatenate(found)


def _by_example(taken: Sequence[Array], examples: int) -> Array:
    """Rows of several places, each in the order of the examples, as one such array."""
    if len(taken) == 1:
        return taken[0]
    joined = np.concatenate([rows.reshape(examples, -1, rows.shape[-1]) for rows in taken], axis=1)
    return joined.reshape(-1, joined.shape[-1])


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
