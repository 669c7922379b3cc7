"""What the search asks of a network, answered with a user's other methods: plain factors, one number for all layers.

A `Method` says which form and ranks every layer gets at a setting from 0 (least) to 1 (all that still saves something).
The largest setting whose network costs no more than what the search asks for is found by bisection; the factors come
from the weights alone. Training, measuring, acceptance and the choice of ratios are ours. From a trained network the
product of every trained chain is truncated in the same way, so that the search can anneal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from baseline_factors import plain_form, weight_factors
from baseline_vbmf import evbmf_rank

from onnxneutrino import metrics, range_test
from onnxneutrino.allocate import Option
from onnxneutrino.bench import Candidate
from onnxneutrino.candidates import point, whole_point
from onnxneutrino.errors import TrainingError
from onnxneutrino.factors import Factors
from onnxneutrino.forms import full_ranks
from onnxneutrino.layer_options import Objective
from onnxneutrino.looks import metric_rows
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Choice, Layer
from onnxneutrino.probe import divergence, probe_batches
from onnxneutrino.runtime import Runner
from onnxneutrino.sensitivity import Curve
from onnxneutrino.task import Network, Task, build
from onnxneutrino.tuning import Tuner

BISECTIONS = 40
PROBE_IMAGES = 256
Tell = Callable[[str, float], None]


class Method(Protocol):
    """A rule for the ranks of all layers."""

    def choices(self, setting: float) -> Mapping[str, Choice]:
        """Form and ranks of every layer; no layer's ranks fall while the setting, 0 to 1, rises."""


class UniformSvd:
    """Truncated SVD at one share of the full rank for all layers but the last.

    The last layer has as many outputs as there are classes: at the share of the others it could not tell them apart.
    """

    def __init__(self, task: Task) -> None:
        self._layers = task.layers

    def choices(self, setting: float) -> Mapping[str, Choice]:
        """`r = setting · full rank`, at least 1; the last layer at full rank, which saves nothing."""
        shares = {layer.name: setting for layer in self._layers[:-1]}
        return {layer.name: svd_choice(layer, shares.get(layer.name, 1.0)) for layer in self._layers}


def svd_choice(layer: Layer, share: float) -> Choice:
    """Truncated SVD at a share of the full rank."""
    form = plain_form(layer.weight.shape)
    return Choice(form, (max(1, round(share * full_ranks(form, layer.weight.shape)[0])),))


class VbmfTucker:
    """Tucker-2 with ranks by empirical VBMF, matrices by SVD (Kim et al. 2016), and one number for all layers.

    That number multiplies all ranks, or (`weakened`) moves them from VBMF's towards full rank, as the weakening of
    Gusak et al. 2019 (MUSCO, Automated multi-stage compression of neural networks) does, or towards 0. The last layer
    stays whole, as in `UniformSvd`.
    """

    def __init__(self, task: Task, weakened: bool) -> None:
        self._weakened = weakened
        self._full: dict[str, Choice] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}
        for layer in task.layers:
            outputs, inputs = layer.weight.shape[:2]
            # A Gemm behind a map is a convolution in name alone.
            matrix = max(layer.weight.shape[2:]) == 1 or layer.kind == "map"
            form = plain_form(layer.weight.shape) if matrix else "tucker2"
            unfoldings = [layer.weight.reshape(outputs, -1)]
            if form == "tucker2":
                unfoldings.insert(0, np.moveaxis(layer.weight, 1, 0).reshape(inputs, -1))
            self._full[layer.name] = Choice(form, full_ranks(form, layer.weight.shape))
            self._ranks[layer.name] = tuple(max(1, evbmf_rank(own)) for own in unfoldings)
        last = task.layers[-1].name
        self._ranks[last] = self._full[last].ranks
        pairs = [pair for name in self._full for pair in zip(self._full[name].ranks, self._ranks[name], strict=True)]
        self._most = max(full / rank for full, rank in pairs)

    def choices(self, setting: float) -> Mapping[str, Choice]:
        """At 0 all ranks are 1, at 1 they are full."""
        found = {}
        for name, full in self._full.items():
            ranks = []
            for top, rank in zip(full.ranks, self._ranks[name], strict=True):
                if rank == top:
                    own = float(top)
                elif not self._weakened:
                    own = self._most * setting**2 * rank
                elif setting < 0.5:
                    own = 2 * setting * rank
                else:
                    own = rank + (2 * setting - 1) * (top - rank)
                ranks.append(min(top, max(1, round(own))))
            found[name] = Choice(full.form, tuple(ranks))
        return found


class PlainTuner(Tuner):
    """Trains at the usual rate: the range test of ours is for networks that start close to a minimum."""

    def _found_rate(self, *given: Any, **named: Any) -> float:
        return range_test.DEFAULT_RATE


class Baseline:
    """The search's `Bench` with a method of its own, trained and measured as ours; nothing is calibrated."""

    calibration_images = 0
    known_sensitivities: Mapping[str, Curve] = MappingProxyType({})

    def __init__(self, task: Task, tell: Tell, methods: Callable[[Task], Sequence[Method]]) -> None:
        learned = task.loss if task.training is None else task.training.loss
        if learned.fed or learned.reconstructed:
            raise TrainingError("the baselines train end to end alone, and no gradient reaches all of this network")
        self.task = task
        self._teacher = Runner(task.batched, task.loss.outputs, threads=task.threads)
        self.tuner = PlainTuner(task, self._teacher, None, tell)
        self._probed = probe_batches(task.train, task.evaluation_batch, task.seed, PROBE_IMAGES)
        self._wanted = [self._teacher(inputs) for inputs in self._probed]
        self._methods = methods(task)

    @property
    def full_cost(self) -> float:
        """Cost of the original network."""
        return self.task.rest + sum(layer_cost(layer, None, self.task.objective) for layer in self.task.layers)

    @property
    def least_cost(self) -> float:
        """Cost of the smallest network there is."""
        return min(self._cost(self._chosen(method, 0.0, Network())) for method in self._methods)

    def step_seconds(self, candidate: Candidate) -> float:
        """0: the time to come is not counted on, the first network is where ten delta are lost (`quality_run`)."""
        return 0.0

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        """The largest network of the method that costs at most `cost`; its smallest where none does.

        Of several methods the network that diverges least from the original.
        """
        made = [self._proposed(method, source, cost, name) for method in self._methods]
        return min(made, key=lambda candidate: candidate.divergence)

    def _proposed(self, method: Method, source: Candidate | None, cost: float, name: str) -> Candidate:
        start = time.perf_counter()
        network: Network = Network() if source is None else source.network
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self._cost(self._chosen(method, middle, network)) <= cost:
                low = middle
            else:
                high = middle
        choices = self._chosen(method, low, network)
        objective = self.task.objective
        made = Network(self._factors(choices, network), network.arrays)
        return Candidate(
            name=name,
            network=made,
            choices={
                layer.name: Option(choices[layer.name], layer_cost(layer, choices[layer.name], objective), 0.0)
                for layer in self.task.layers
            },
            cost=self._cost(choices),
            divergence=self._divergence(made),
            trained=0.0 if source is None else source.trained,
            seconds=time.perf_counter() - start,
        )

    def measured(self, candidate: Candidate) -> Candidate:
        """With its drop on the deciding images."""
        start = time.perf_counter()
        rows = metric_rows(self.task, candidate.network, self.task.select)
        drop = metrics.drop(self.task.metric, self.task.original_rows, rows, seed=self.task.seed)
        return replace(candidate, drop=drop, seconds=candidate.seconds + time.perf_counter() - start)

    def trained(self, candidate: Candidate, seconds: float, name: str, hopeless: float = math.inf) -> Candidate | None:
        """Fine-tuned for `seconds`; None when the loss did not stay finite."""
        start = time.perf_counter()
        network = self.tuner.tuned(candidate.network, seconds, name, hopeless)
        if network is None:
            return None
        spent = time.perf_counter() - start
        return replace(
            candidate,
            name=name,
            network=network,
            trained=candidate.trained + spent,
            seconds=candidate.seconds + spent,
        )

    def _divergence(self, network: Network) -> float:
        """Divergence from the original on a few augmented training inputs."""
        run = Runner(build(self.task, network, batched=True), self.task.loss.outputs, threads=self.task.threads)
        return divergence(self.task.loss, self._wanted, [run(batch) for batch in self._probed])

    def _chosen(self, method: Method, setting: float, network: Network) -> dict[str, Choice | None]:
        """Ranks at a setting, none above those of the trained chain; None where a chain costs what the layer does."""
        found: dict[str, Choice | None] = {}
        asked = method.choices(setting)
        for layer in self.task.layers:
            choice = asked[layer.name]
            current = network.factors.get(layer.name)
            if current is not None:
                ranks = tuple(min(pair) for pair in zip(choice.ranks, current.ranks, strict=True))
                found[layer.name] = Choice(current.form, ranks)
                continue
            whole = layer_cost(layer, None, self.task.objective)
            found[layer.name] = choice if layer_cost(layer, choice, self.task.objective) < whole else None
        return found

    def _cost(self, choices: Mapping[str, Choice | None]) -> float:
        own = sum(layer_cost(layer, choices[layer.name], self.task.objective) for layer in self.task.layers)
        return self.task.rest + own

    def _factors(self, choices: Mapping[str, Choice | None], network: Network) -> dict[str, Factors]:
        trained = {
            layer.name: layer
            for layer in find_layers(build(self.task, network), self.task.types)
            if isinstance(layer, Layer)
        }
        found = {}
        for layer in self.task.layers:
            choice, current = choices[layer.name], network.factors.get(layer.name)
            if choice is None:
                continue
            if current is not None and current.ranks == choice.ranks:
                found[layer.name] = current
            elif current is not None:
                found[layer.name] = weight_factors(choice, current.product(), current.bias)
            else:
                own = trained.get(layer.name, layer)
                found[layer.name] = weight_factors(choice, own.weight, own.bias)
        return found


def layer_cost(layer: Layer, choice: Choice | None, objective: Objective) -> float:
    """Params or MACs of a layer in a form; as it is for None."""
    own = whole_point(layer) if choice is None else point(layer, choice)
    return float(own.macs if objective == "macs" else own.params)


def shrunk(layer: Layer, network: Network, choice: Choice) -> Network:
    """The network with one layer of the original in another form."""
    return replace(network, factors={**network.factors, layer.name: weight_factors(choice, layer.weight, layer.bias)})
