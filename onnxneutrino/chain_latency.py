"""Time of every way to write a layer, measured on this machine: what the objective `latency` counts.

Each layer shape is measured once, as it is and as chains on a coarse grid of ranks, in graphs of its own
(`chain_graph`); ranks between are interpolated. What else runs on the cores changes times by a factor of two within
seconds, so only ratios of times taken in turn are used: of each chain to its layer, of each layer to the network.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock
from onnxneutrino.candidates import fast_ranks, next_fast, rank_axes
from onnxneutrino.chain_graph import INPUT, drawn, input_shape, layer_graph
from onnxneutrino.forms import applicable
from onnxneutrino.plan import Choice, Form, Layer
from onnxneutrino.runtime import Runner

QUANTILE = 0.25
SETTLE_SECONDS = 0.0015  # idle threads of the graph that ran before wait in a loop about that long
RUNS = 3  # timed in a turn
LEAST_TURNS, MOST_TURNS = 4, 30
BUILD_SECONDS, WEIGHT_SECONDS = 0.006, 2e-8  # of a session: for a small graph, and for each weight
SIDE_BY_SIDE = 8  # layers in sessions at a time
COPIES = 3
LEAST_MS = 1e-4
WHOLE_SHARE = 0.1


@dataclass(frozen=True)
class Grid:
    """How finely to measure: ranks on the axis of a form of one rank, on each axis of one of two, and turns."""

    single: int
    pair: int
    turns: int


GRIDS = (Grid(10, 4, 8), Grid(7, 4, 6), Grid(5, 3, 6), Grid(4, 3, 5), Grid(3, 2, 4), Grid(2, 2, LEAST_TURNS))


@dataclass(frozen=True, eq=False)
class FormTimes:
    """Times of one form: `axes` holds the measured ranks of each axis, rising; `ms` is indexed in their order."""

    axes: tuple[tuple[int, ...], ...]
    ms: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Raise ValueError where ranks and times do not agree."""
        if self.ms.shape != tuple(len(ranks) for ranks in self.axes):
            raise ValueError(f"times {self.ms.shape} for ranks {self.axes}")

    def at(self, ranks: Sequence[int]) -> float:
        """Time in ms, linear between the measured ranks on each axis; infinite above the largest.

        A rank between two at which the runtime is fast takes as long as the larger one, see `fast_ranks`.
        """
        values = self.ms
        for measured, rank in zip(self.axes, ranks, strict=True):
            if rank > measured[-1]:
                return math.inf
            # The last of the measured ranks need not be one of the fast ones.
            place = rank if rank in measured else min(next_fast(rank), measured[-1])
            values = np.apply_along_axis(lambda own, x, xs: np.interp(x, xs, own), 0, values, place, measured)
        return float(values)


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Times of one layer in all its places, in ms: as it is, and in every form."""

    whole: float
    forms: Mapping[Form, FormTimes]

    def ms(self, choice: Choice | None) -> float:
        """Time of the layer written as `choice`, None as it is; infinite for what was not measured."""
        if choice is None:
            return self.whole
        return self.forms[choice.form].at(choice.ranks) if choice.form in self.forms else math.inf

    def scaled(self, factor: float) -> LayerTimes:
        """All times multiplied."""
        forms = {form: replace(own, ms=own.ms * factor) for form, own in self.forms.items()}
        return LayerTimes(self.whole * factor, forms)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of all layers by name and of all the rest of the network, in ms."""

    layers: Mapping[str, LayerTimes]
    rest: float

    @property
    def total(self) -> float:
        """Time of the original network."""
        return self.rest + math.fsum(own.whole for own in self.layers.values())


def measure(
    model: ModelProto,
    layers: Sequence[Layer],
    inputs: Mapping[str, NDArray[Any]],
    threads: int,
    seconds: float,
) -> LatencyTable:
    """Measure the network, its layers and their chains at batch 1.

    Where the layers alone, each in a graph of its own, take longer than the network, which saves them some of
    their reading and writing, all their times are scaled to add up to the network's.

    Args:
        model: the original; layers and inputs are its own.
        layers: in whose places chains may stand.
        inputs: of one example.
        threads: of the runtime.
        seconds: to spend; exceeded where even the coarsest grid with the fewest runs takes longer.
    """
    end = clock.now() + seconds
    places = {own.key: own for layer in layers for use in layer.uses for own in [_Place(use)]}
    network, wholes = _wholes(model, inputs, places, threads, WHOLE_SHARE * seconds)
    measured: dict[tuple[object, ...], LayerTimes] = {}
    pace = 1.0  # how much longer than estimated the measurements take
    for key, own in places.items():
        start = clock.now()
        left = max(end - start, 0.0)
        needs = [sum(places[k].seconds(grid, wholes[k]) for k in places if k not in measured) for grid in GRIDS]
        grid = next((grid for grid, need in zip(GRIDS, needs, strict=True) if pace * need <= left), GRIDS[-1])
        measured[key] = own.measured(grid, threads, wholes[key])
        estimate = own.seconds(grid, wholes[key])
        pace = max((clock.now() - start) / estimate, 1.0) if own.points(grid) else pace
    times = {layer.name: _summed([measured[_Place(use).key] for use in layer.uses]) for layer in layers}
    total = math.fsum(own.whole for own in times.values())
    if total > network:
        times = {name: own.scaled(network / total) for name, own in times.items()}
    return LatencyTable(times, max(network - total, 0.0))


def timed(
    runners: Sequence[Runner], inputs: Sequence[Mapping[str, NDArray[Any]]], turns: int, seconds: float = 0.0
) -> list[float]:
    """The lower quartile of the wall time of each session in ms, in turn; so many turns, up to 30 until `seconds`.

    In its turn a session first runs until the threads of the one before have gone to sleep, then three times.
    """
    end = time.perf_counter() + seconds
    times: list[list[float]] = [[] for _ in runners]
    for turn in range(MOST_TURNS):
        if turn >= turns and time.perf_counter() > end:
            break
        for series, runner, own in zip(times, runners, inputs, strict=True):
            settled = time.perf_counter() + SETTLE_SECONDS
            while time.perf_counter() < settled:
                runner(own)
            for _ in range(RUNS):
                start = time.perf_counter()
                runner(own)
                series.append((time.perf_counter() - start) * 1000.0)
    return [clock.noted(float(np.quantile(series, QUANTILE))) for series in times]


def _wholes(
    model: ModelProto,
    inputs: Mapping[str, NDArray[Any]],
    places: Mapping[tuple[object, ...], _Place],
    threads: int,
    seconds: float,
) -> tuple[float, dict[tuple[object, ...], float]]:
    """The time of the network, and of the graph of each layer as it is, in ms."""
    network = Runner(model, threads=threads, spinning=True)
    (first,) = timed([network], [inputs], LEAST_TURNS, 0.5 * seconds)
    found = {}
    keys = list(places)
    for start in range(0, len(keys), SIDE_BY_SIDE):
        some = keys[start : start + SIDE_BY_SIDE]
        own = [places[key] for key in some]
        runners = [network, *(place.runner(None, threads) for place in own)]
        every = [inputs, *(place.inputs for place in own)]
        now, *rest = timed(runners, every, LEAST_TURNS, 0.5 * seconds * len(some) / len(keys))
        found.update({key: ms * first / now for key, ms in zip(some, rest, strict=True)})
    return first, found


@dataclass(frozen=True, eq=False)
class _Place:
    """One layer in one place."""

    layer: Layer

    @property
    def key(self) -> tuple[object, ...]:
        """What the times depend on."""
        own = self.layer
        return own.kind, own.weight.shape, own.geometry, own.input_size, own.positions, own.half

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """Of the layer's graphs."""
        return {INPUT: drawn(*input_shape(self.layer)).astype(np.float16 if self.layer.half else np.float32)}

    def runner(self, choice: Choice | None, threads: int, copies: int = 1, pools: int = 1) -> Runner:
        """A session for a graph of the layer."""
        graph = layer_graph(self.layer, choice, copies=copies, pools=pools)
        return Runner(graph, threads=threads, spinning=True)

    def times(self, runners: Sequence[Runner], threads: int, whole: float, turns: int) -> list[float]:
        """Times in ms, `whole` being that of the layer's own graph, which runs in turn with them."""
        every = [self.runner(None, threads), *runners]
        first, *rest = timed(every, [self.inputs] * len(every), turns)
        return [ms * whole / first for ms in rest]

    def axes(self, grid: Grid) -> dict[Form, tuple[tuple[int, ...], ...]]:
        """The ranks to measure of every form that can gain."""
        found: dict[Form, tuple[tuple[int, ...], ...]] = {}
        for form in applicable(self.layer.weight.shape):
            offered = rank_axes(self.layer, form, fast_ranks)
            steps = grid.single if len(offered) == 1 else grid.pair
            if all(offered):
                found[form] = tuple(_thinned(ranks, steps) for ranks in offered)
        return found

    def points(self, grid: Grid) -> int:
        """How many chains there are to measure."""
        return sum(math.prod(len(ranks) for ranks in axes) for axes in self.axes(grid).values())

    def seconds(self, grid: Grid, whole: float) -> float:
        """About how long it takes to measure the chains, each as slow as the layer."""
        turn = SETTLE_SECONDS + (RUNS + 1) * whole / 1000.0
        build = BUILD_SECONDS + WEIGHT_SECONDS * self.layer.weight.size
        return self.points(grid) * (build + grid.turns * turn)

    def measured(self, grid: Grid, threads: int, whole: float) -> LayerTimes:
        """The times of the layer and of its forms, `whole` being that of the layer's own graph."""
        axes = self.axes(grid)
        smallest = next((Choice(form, tuple(ranks[0] for ranks in own)) for form, own in axes.items()), None)
        around = self._around(smallest, threads, whole, grid.turns)
        forms = {}
        for form, own in axes.items():
            chains = [self.runner(Choice(form, ranks), threads) for ranks in itertools.product(*own)]
            ms = np.maximum(np.array(self.times(chains, threads, whole, grid.turns)) - around, LEAST_MS)
            forms[form] = FormTimes(own, ms.reshape([len(ranks) for ranks in own]))
        if self.layer.kind == "map":
            around = self._call(threads, whole, grid.turns)  # the layer reads its map as it comes, its chain in blocks
        return LayerTimes(max(whole - around, LEAST_MS), forms)

    def _around(self, choice: Choice | None, threads: int, whole: float, turns: int) -> float:
        """What running a graph takes besides the chain: the call, reading the input, the pool.

        The chain's own time is the slope over copies of it on one input; a pool's time that of a second one.
        """
        if self.layer.kind in ("gemm", "matmul"):
            return self._call(threads, whole, turns)
        pools = 2 if self.layer.kind.startswith("conv") else 1
        variants = ((1, 1), (COPIES, 1), (1, pools))
        runners = [self.runner(choice, threads, copies, each) for copies, each in variants]
        one, many, pooled = self.times(runners, threads, whole, turns)
        pool = max(pooled - one, 0.0) if pools > 1 else 0.0
        # Each copy has a pool of its own.
        own = max((many - one) / (COPIES - 1) - pool, 0.0)
        return max(one - own, 0.0)

    def _call(self, threads: int, whole: float, turns: int) -> float:
        """What running a graph takes that does next to nothing."""
        return self.times([self.runner(None, threads, copies=0)], threads, whole, turns)[0]


def _thinned(ranks: Sequence[int], steps: int) -> tuple[int, ...]:
    """At most `steps` of the ranks, the first and the last among them."""
    places = np.linspace(0, len(ranks) - 1, min(steps, len(ranks)))
    return tuple(ranks[round(place)] for place in places)


def _summed(parts: Sequence[LayerTimes]) -> LayerTimes:
    """The times of a layer that stands in several places, at the ranks measured in the first."""
    first = parts[0]
    forms = {}
    for form, own in first.forms.items():
        ms = [math.fsum(part.ms(Choice(form, ranks)) for part in parts) for ranks in itertools.product(*own.axes)]
        forms[form] = FormTimes(own.axes, np.array(ms).reshape(own.ms.shape))
    return LayerTimes(math.fsum(part.whole for part in parts), forms)
