"""Which channels a network does without, before any layer is factorized.

How much an error of each layer costs is measured at the network's output by noise in its weight. All groups of
channels are then put in one order (`channel_removal`), and as many of them go as leave the network, measured on
other inputs than those it was fitted on, next to where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock, cost
from onnxneutrino.calibrate import calibrate, images_needed
from onnxneutrino.channel_removal import Matrix, Reader, covariance, made_good, removal_order
from onnxneutrino.channels import Channels, find_channels
from onnxneutrino.data import Split
from onnxneutrino.factors import Moments
from onnxneutrino.graph import arrays, attributes, with_arrays
from onnxneutrino.losses import Loss
from onnxneutrino.passes.drop_channels import drop_channels
from onnxneutrino.plan import Array, Layer
from onnxneutrino.probe import divergence, probe_batches
from onnxneutrino.runtime import Runner
from onnxneutrino.task import Marked, untouched_nodes

NOISE = 0.05  # of a layer's output variance
SHARE = 0.2  # of what such noise in one layer does to the output, in the mean of all layers: that much may be lost
SLACK = 2.0  # predictions and measurements differ by about as much
BATCH = 32
PRICE_IMAGES, PRICE_MACS = 128, 2 * 10**11
JUDGE_IMAGES, JUDGE_MACS = 1024, 5 * 10**10
MOMENT_ROWS, LEAST_ROWS = 3, 2  # patches by their dimension; with fewer a covariance seems empty in some directions
STATE_BYTES = 2**30  # of covariances and their inverses
TRIALS = 6


@dataclass(frozen=True, eq=False)
class Removal:
    """Groups that go, and the constants that make up for them, in the shapes of before.

    Attributes:
        channels: of the graph.
        groups: that go.
        weights: new values of constants by their name.
        biases: of Conv and Gemm that had none, by the name of the node.
    """

    channels: Channels
    groups: tuple[int, ...] = ()
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    biases: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def applied(self, model: ModelProto) -> ModelProto:
        """The graph without these channels."""
        made: ModelProto = drop_channels(model, self.channels, self.groups, self.weights, self.biases)
        return made


def spare_channels(
    marked: Marked,
    loss: Loss,
    train: Split,
    batch: int,
    by_macs: bool,
    threads: int,
    seed: int,
    seconds: float,
    kept: Callable[[ModelProto], bool] = lambda model: True,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> Removal:
    """The channels that can go.

    Args:
        marked: the network and its layers.
        loss: in which a divergence is counted.
        train: inputs.
        batch: of an inference run.
        by_macs: a channel is worth the multiply-accumulates that go with it; else the parameters.
        threads: for the runtime.
        seed: of the sampled inputs and the noise.
        seconds: for calibration, for measuring what errors cost and for putting the channels in order, each; where the
            second is not done by then, nothing goes.
        kept: whether a network still has what counts beside its outputs; asked about the last one, then about smaller
            removals.
        tell: progress.
    """
    model, types = marked.batched, marked.types

    def found(mending: Collection[str]) -> Channels:
        return find_channels(marked.model, types, marked.layers, mending, untouched_nodes(marked))

    channels = found(_affordable(marked.layers))
    layers = [layer for layer in marked.layers if (channels.inputs.get(layer.name, np.zeros(1)) > 0).any()]
    macs = max(cost.macs(marked.model, types), 1)
    images = min(PRICE_IMAGES, PRICE_MACS // (macs * max(len(layers), 1)))
    if not layers or not images:
        return Removal(channels)
    moments = _moments(model, layers, train, batch, threads, seed, seconds, tell)
    layers = [layer for layer in layers if moments[layer.name].count >= LEAST_ROWS * layer.patch]
    channels = found({layer.name for layer in layers})
    if not layers:
        return Removal(channels)
    judges = probe_batches(train, batch, seed + 1, None, max(min(JUDGE_IMAGES, JUDGE_MACS // macs), 1))
    before = Runner(model, loss.outputs, threads=threads)
    wanted = [before(own) for own in judges]

    def lost(network: ModelProto, first: int | None = None) -> float:
        run = Runner(network, loss.outputs, threads=threads)
        if first is None:
            return divergence(loss, wanted, [run(own) for own in judges])
        some = {name: array[:first] for name, array in judges[0].items()}
        return divergence(loss, [[array[:first] for array in wanted[0]]], [run(some)])

    sigmas = {layer.name: covariance(moments[layer.name]) for layer in layers}
    prices: dict[str, float] = {}
    total, end = 0.0, clock.now() + seconds
    for index, layer in enumerate(layers):
        if clock.now() > end:
            return Removal(channels)
        tell("measuring what errors of layers cost", index / len(layers))
        noisy, energy = _with_noise(model, layer, sigmas[layer.name], seed)
        own = lost(noisy, images)
        total += own
        prices[layer.name] = own / max(energy, 1e-30)
    bound = SHARE * total / len(layers)
    readers = [_reader(layer, channels, sigmas, prices, by_macs) for layer in marked.layers]
    end = clock.now() + seconds
    tell("putting channels in order", 0.0)
    extra = _extra(marked, channels, by_macs)
    order = removal_order(readers, channels.count, extra, SLACK * bound, lambda: clock.now() < end)

    def removal(count: int) -> Removal:
        return _removal(marked, channels, order[:count], layers, moments, sigmas)

    low, high = 0, len(order) + 1
    best = Removal(channels)
    trial = len(order)
    for _ in range(TRIALS):
        if not low < trial < high:
            break
        tell(f"removing {trial} of {len(order)} channels", trial / len(order))
        tried = removal(trial)
        if lost(tried.applied(model)) <= bound:
            low, best = trial, tried
        else:
            high = trial
        trial = (low + high) // 2
    while best.groups and not kept(best.applied(model)):
        best = removal(len(best.groups) // 2)
    return best


def _affordable(layers: Sequence[Layer]) -> set[str]:
    """Names of the layers whose covariances may be held, the smallest first."""
    chosen: set[str] = set()
    left = STATE_BYTES
    for layer in sorted(layers, key=lambda own: own.patch):
        left -= 16 * layer.patch**2
        if left >= 0:
            chosen.add(layer.name)
    return chosen


def _moments(
    model: ModelProto,
    layers: Sequence[Layer],
    train: Split,
    batch: int,
    threads: int,
    seed: int,
    seconds: float,
    tell: Callable[[str, float], None],
) -> dict[str, Moments]:
    tensors = sorted({layer.input for layer in layers})
    wanted = min(images_needed(layers, MOMENT_ROWS), len(train))
    batches: Any = (own.inputs for own in train.batches(min(batch, BATCH), seed=seed, augment=True))
    run = Runner(model, tensors, threads=threads)
    end = clock.now() + seconds if seconds < math.inf else seconds
    found, _ = calibrate(
        run,
        tensors,
        layers,
        batches,
        wanted,
        seed,
        end,
        lambda done: tell(f"looking at channels, {done} of {wanted} inputs", min(done / wanted, 1.0)),
        threads,
        MOMENT_ROWS,
    )
    return found


def _with_noise(model: ModelProto, layer: Layer, sigma: Matrix, seed: int) -> tuple[ModelProto, float]:
    """The network with noise in one layer, equally strong in all of its outputs, and its squared error."""
    weight = np.asarray(layer.weight, np.float64).reshape(len(layer.weight), -1)
    noise = np.random.default_rng([seed, len(layer.name)]).standard_normal(weight.shape)
    wanted = NOISE * np.einsum("od,od->", weight @ sigma, weight) / len(weight)
    own = np.einsum("od,od->o", noise @ sigma, noise)
    noise *= np.sqrt(wanted / np.maximum(own, 1e-30))[:, None]
    noisy = np.asarray(weight + noise, np.float32).reshape(layer.weight.shape)
    return with_arrays(model, {layer.initializers[0]: _stored(model, layer, noisy)}), float(wanted * len(weight))


def _stored(model: ModelProto, layer: Layer, weight: Array) -> NDArray[Any]:
    """A layer's weight as its node holds it; only of layers of which `Channels.inputs` knows."""
    if layer.op == "Conv":
        return weight.reshape(layer.weight_shape)
    node = next(node for node in model.graph.node if node.name == layer.name)
    turned = "transB" in attributes(node) and attributes(node)["transB"].i
    flat = weight.reshape(len(weight), -1)
    return flat if turned else flat.T


def _reader(
    layer: Layer,
    channels: Channels,
    sigmas: Mapping[str, Matrix],
    prices: Mapping[str, float],
    by_macs: bool,
) -> Reader:
    weight = layer.weight.reshape(*layer.weight.shape[:2], -1)
    stays = np.zeros(weight.shape[1], np.int64)
    known = layer.name in channels.inputs
    return Reader(
        weight,
        sigmas[layer.name] if known else None,
        channels.inputs.get(layer.name, stays),
        channels.outputs.get(layer.name, np.zeros(len(weight), np.int64)),
        prices[layer.name] if known else 0.0,
        layer.positions if by_macs else 1,
    )


def _extra(marked: Marked, channels: Channels, by_macs: bool) -> Matrix:
    """What the groups save in depthwise convolutions."""
    values = arrays(marked.model)
    total = np.zeros(channels.count)
    for node in marked.model.graph.node:
        if node.name in channels.depthwise:
            kernel = math.prod(values[node.input[1]].shape[2:])
            size = math.prod(marked.types[node.output[0]].shape[2:])
            own = kernel * size if by_macs else kernel + 1
            total += own * np.bincount(channels.depthwise[node.name], minlength=channels.count)
    return total


def _removal(
    marked: Marked,
    channels: Channels,
    groups: Sequence[int],
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    sigmas: Mapping[str, Matrix],
) -> Removal:
    """The groups with the weights that make up for them."""
    weights: dict[str, NDArray[Any]] = {}
    biases: dict[str, NDArray[Any]] = {}
    values = arrays(marked.model)
    for layer in layers:
        gone = np.isin(channels.inputs[layer.name], groups)
        if not gone.any():
            continue
        flat = layer.weight.reshape(*layer.weight.shape[:2], -1)
        weight, bias = made_good(flat, layer.bias, moments[layer.name].mean, sigmas[layer.name], gone)
        weights[layer.initializers[0]] = _stored(marked.model, layer, weight.reshape(layer.weight.shape))
        if len(layer.initializers) > 1:
            name = layer.initializers[1]
            weights[name] = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, values[name].shape))
        else:
            biases[layer.name] = bias
    return Removal(channels, tuple(groups), weights, biases)
