"""The network under compression: what the search asks of it, answered with graphs, data and runtimes.

A `Network` is a value: the factors of the factorized layers and the trained arrays of everything else. The
workbench turns it into graphs, calibrates, refits, trains and measures it; it keeps caches, and no state that
changes an answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock, cost, metrics
from onnxneutrino.allocate import Option
from onnxneutrino.bench import Candidate
from onnxneutrino.budgets import allocate_measured
from onnxneutrino.calibrate import calibrate, images_needed, in_place
from onnxneutrino.data import Inputs
from onnxneutrino.events import TrainingStatus
from onnxneutrino.factor_interpolative import interpolated
from onnxneutrino.factors import Moments
from onnxneutrino.figures import figures
from onnxneutrino.journal import UNKEPT, Journal
from onnxneutrino.large import calibration_rows, is_large, probe_rows
from onnxneutrino.layer_options import GOAL, LayerOptions, chains, kept_factors
from onnxneutrino.looks import metric_rows
from onnxneutrino.passes.factorize import last_stage
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Choice, Layer
from onnxneutrino.probe import PROBE_IMAGES, Probe, by_name, divergence, features_at, probe_batches, take_probe
from onnxneutrino.proposals import least_cost, propose
from onnxneutrino.refit import refit
from onnxneutrino.runtime import Runner
from onnxneutrino.segments import between, resting_places
from onnxneutrino.sensitivity import Curve, measured_sensitivities
from onnxneutrino.spool import Spool
from onnxneutrino.task import Network, Task, build
from onnxneutrino.tuning import Tuner
from onnxneutrino.weightings import output_weightings

CALIBRATION_BATCH = 32  # the inputs of all layers are in memory at once
PROBE_MACS = 10**11
TRUNCATION_IMAGES = 4096
RESTING = 1 << 26  # elements of a tensor that is kept for all probe images


class Workbench:
    """The search's `Bench`."""

    def __init__(
        self,
        task: Task,
        calibration_seconds: float,
        tell: Callable[[str, float], None] = lambda what, share: None,
        watch: Callable[[TrainingStatus], None] = lambda status: None,
        images: int | None = None,
        before: Callable[[Candidate], None] = lambda candidate: None,
        journal: Journal = UNKEPT,
    ) -> None:
        """Run the original on the probe images and calibrate every layer.

        Args:
            task: the run.
            calibration_seconds: calibration uses the images it has seen by then.
            tell: progress: what is being done, and the share of it that is finished.
            watch: called while a candidate is trained.
            images: calibration images; None for as many as the layers need.
            before: called with a candidate before it is trained.
            journal: of the run.
        """
        self.task = task
        self._tell = tell
        self._before = before
        self._layers = {layer.name: layer for layer in task.layers}
        original = task.batched if task.teacher is None else task.teacher
        self._teacher = Runner(original, task.loss.outputs, threads=task.threads)
        self._keep = Spool().keep if is_large(task.layers) else None
        self._journal = journal
        self.tuner = Tuner(task, self._teacher, self._keep, tell, watch, journal)
        self._rows_wanted, probed = calibration_rows(task.layers), probe_rows(task.layers)
        affordable = PROBE_MACS // max(cost.macs(task.model, task.types), 1)
        most = min(probed, PROBE_IMAGES[1], max(affordable, PROBE_IMAGES[0]))
        batches = probe_batches(task.train, task.evaluation_batch, task.seed, images, most)
        self.probe: Probe = self._probed(task.batched, batches)
        if task.teacher is not None:
            answers = [self._teacher(batch) for batch in self.probe.batches]
            self.probe = dataclasses.replace(self.probe, outputs=answers)
        probed = sum(len(next(iter(batch.values()))) for batch in self.probe.batches)
        self._places = resting_places(task.batched, task.types, task.layers, task.loss.outputs, RESTING / probed)
        self._tell("measuring the curvature of the outputs", 0.0)
        # Before the moments: both are large.
        self._curvature = journal.step("curvature", lambda: output_weightings(task, self._teacher, calibration_seconds))
        wanted = min(images_needed(task.layers, self._rows_wanted), len(task.train)) if images is None else images
        moments, self.calibration_images = journal.step(
            "moments", lambda: self._moments(Network(), wanted, calibration_seconds)
        )
        self._original = {
            layer.name: LayerOptions(
                layer,
                moments[layer.name],
                task.objective,
                weighting=self._curvature.get(layer.name),
                keep=self._keep,
            )
            for layer in task.layers
        }
        self._derived: tuple[Candidate, dict[str, LayerOptions], Probe] | None = None
        self._sensitivities: Mapping[str, Curve] = {}
        self._targets = task.objective if isinstance(task.objective, tuple) else ()
        self._figures: dict[frozenset[tuple[str, Choice]], NDArray[np.float64]] = {}

    # --- costs and options ----------------------------------------------------------------------------------

    @property
    def full_cost(self) -> float:
        """Cost of the original network."""
        if self.task.full_cost is not None:
            return self.task.full_cost
        if self._targets:
            return float(max(self.figures({})))
        return self.task.rest + sum(own.whole.cost for own in self._original.values())

    def options(self, source: Candidate | None) -> tuple[Mapping[str, Sequence[Option]], float]:
        """Options of every layer and the cost of all the rest."""
        fitted = self._fitted(source)
        with ThreadPoolExecutor(self.task.threads) as pool:
            found = pool.map(lambda own: own.options, fitted.values())
            return dict(zip(fitted, found, strict=True)), self.task.rest

    def figures(self, choices: Mapping[str, Option]) -> NDArray[np.float64]:
        """The true costs of a plan in shares of the hard targets; the largest is the cost of its network."""
        plan = {name: option.choice for name, option in choices.items() if option.choice is not None}
        key = frozenset(plan.items())
        if key not in self._figures:
            self._figures[key] = figures(self.task, self._targets, plan)
        return self._figures[key]

    @property
    def least_of_targets(self) -> tuple[float, ...]:
        """For every hard target the least that any plan would have of this cost alone, estimated, in its own unit."""
        options, _ = self.options(None)
        return tuple(
            target.rest + target.limit * sum(min(option.costs[index] for option in own) for own in options.values())
            for index, target in enumerate(self._targets)
        )

    def _within(self, options: Mapping[str, Sequence[Option]], bound: float) -> Mapping[str, Option]:
        """The options of a network whose true costs are at most `bound` times the hard targets."""
        rests = np.array([target.rest / target.limit for target in self._targets])
        return allocate_measured(options, rests, bound, self.figures)

    def _fitted(self, source: Candidate | None) -> dict[str, LayerOptions]:
        """Fits on the original, or on the trained chains of `source` at their trained inputs."""
        return self._original if source is None else self._derived_from(source)[1]

    def _goal(self, source: Candidate | None) -> Probe:
        """What a network made of `source` should put out.

        A trained network gives other answers than the original, and better ones where it learned from labels.
        """
        return self.probe if source is None else self._derived_from(source)[2]

    def _derived_from(self, source: Candidate) -> tuple[Candidate, dict[str, LayerOptions], Probe]:
        if self._derived is None or self._derived[0] is not source:
            trained = build(self.task, source.network, batched=True)
            probe = self._probed(trained, self.probe.batches)
            self._derived = source, self._trained_fits(source.network), probe
        return self._derived

    def _probed(self, model: ModelProto, batches: Sequence[Inputs]) -> Probe:
        task, keep = self.task, self._keep or in_place
        run = by_name(model, task.loss.outputs, task.layers, task.threads)
        return take_probe(batches, task.layers, task.loss.outputs, run, task.seed, probe_rows(task.layers), keep)

    def _trained_fits(self, network: Network) -> dict[str, LayerOptions]:
        images = min(images_needed(self.task.layers, self._rows_wanted), len(self.task.train), TRUNCATION_IMAGES)
        moments, _ = self._moments(network, images, float("inf"))
        whole = {
            layer.name: layer
            for layer in find_layers(build(self.task, network), self.task.types)
            if isinstance(layer, Layer)
        }
        derived = {}
        for layer in self.task.layers:
            factors = network.factors.get(layer.name)
            if factors is None:
                trained = whole.get(layer.name, layer)
            else:
                product = (self._keep or in_place)(factors.product())
                trained = dataclasses.replace(layer, weight=product, bias=factors.bias)
            weighting = self._curvature.get(layer.name)
            derived[layer.name] = LayerOptions(
                trained, moments[layer.name], self.task.objective, factors, weighting, self._keep
            )
        return derived

    def _moments(self, network: Network, images: int, seconds: float) -> tuple[dict[str, Moments], int]:
        task = self.task
        tensors = sorted({use.input for layer in task.layers for use in layer.uses})
        run = Runner(build(task, network, batched=True), tensors, threads=task.threads)
        size = min(task.evaluation_batch, CALIBRATION_BATCH)
        batches = (batch.inputs for batch in task.train.batches(size, seed=task.seed, augment=True))
        return calibrate(
            run,
            tensors,
            task.layers,
            batches,
            images,
            task.seed,
            clock.now() + seconds if seconds < math.inf else seconds,
            lambda done: self._tell(f"calibrating, {done} of {images} inputs", min(done / images, 1.0)),
            task.threads,
            self._rows_wanted,
            self._keep or in_place,
        )

    def challenged(self, choices: Mapping[str, Option]) -> Mapping[str, Option]:
        """The plan with layers swapped to CP where that fits better at equal cost."""
        with ThreadPoolExecutor(self.task.threads) as pool:
            found = pool.map(lambda name: self._original[name].challenger(choices[name]), choices)
            return dict(zip(choices, found, strict=True))

    @property
    def least_cost(self) -> float:
        """Cost of the smallest network there is, or that there is a use for."""
        return GOAL if self._targets else least_cost(self)

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        """The plan of at most `cost` that diverges least from what it is made of."""
        within = self._within if self._targets else None
        self.sensitivities()  # a step of its own
        return self._journal.step(
            name, lambda: propose(self, source, cost, name, seconds, swap, self.task.seed, within)
        )

    # --- networks -------------------------------------------------------------------------------------------

    def realize(self, source: Candidate | None, choices: Mapping[str, Option], name: str) -> Candidate:
        """Factors of the plan, refitted to the outputs of what they are made of, and the divergence from these."""
        start = clock.now()
        fitted = self._fitted(source)
        factors = chains(fitted, choices, self.task.threads)
        goal = self._goal(source)
        made = [Network(factors, {} if source is None else source.network.arrays)]
        made.append(self._refitted(made[0], name, goal))
        # What was trained as a whole makes up for errors that a refit of single layers brings back.
        scored = [(self._divergence(network, goal), network) for network in (made if source else made[1:])]
        divergence, network = min(scored, key=lambda pair: pair[0])
        whole = self.task.rest + sum(option.cost for option in choices.values())
        return Candidate(
            name=name,
            network=network,
            choices=choices,
            cost=float(max(self.figures(choices))) if self._targets else whole,
            divergence=divergence,
            trained=0.0 if source is None else source.trained,
            seconds=clock.now() - start,
        )

    def _refitted(self, network: Network, name: str, goal: Probe) -> Network:
        """Solve the last factor of every chain anew toward the goal's outputs, in the order of the graph."""
        task = self.task
        factors = dict(network.factors)
        start: str | None = None
        probe = goal  # with what the network computes at `start`, up to where every layer is solved
        for index, layer in enumerate(task.layers):
            if layer.name not in factors:
                continue
            self._tell(f"{name}: refit", index / len(task.layers))
            own = factors[layer.name]
            graph = build(task, dataclasses.replace(network, factors=factors), batched=True)
            place = self._places[layer.name]
            if place is not None and place != start:
                step = Runner(between(graph, start, [place], task.types), threads=task.threads)
                fed = zip(goal.batches, probe.batches, strict=True)
                probe = dataclasses.replace(probe, batches=[{**plain, place: step(batch)[0]} for plain, batch in fed])
                start = place
            part = between(graph, start, [last_stage(use, own)[0] for use in layer.uses], task.types)
            run = Runner(part, threads=task.threads)
            features = features_at(probe, layer, own.stages, run)
            features = features - own.inner_bias if own.direct else features
            last = own.stages[-1]
            solved = refit(features, goal.targets[layer.name], last.weight.reshape(len(last.weight), -1), own.bias)
            stage = dataclasses.replace(last, weight=solved.weight.reshape(last.weight.shape))
            own = dataclasses.replace(own, stages=(*own.stages[:-1], stage), bias=solved.bias)
            own = interpolated(own) if own.direct else own
            factors[layer.name] = own if self._keep is None else kept_factors(layer, own, self._keep)
        return dataclasses.replace(network, factors=factors)

    def _divergence(self, network: Network, goal: Probe) -> float:
        """Divergence from the goal's outputs."""
        task = self.task
        run = Runner(build(task, network, batched=True), task.loss.outputs, threads=task.threads)
        return divergence(task.loss, goal.outputs, [run(batch) for batch in goal.batches])

    def sensitivities(self) -> Mapping[str, Curve]:
        """See `sensitivity`; measured on the original and kept: a trained network stays close enough to it."""
        if not self._sensitivities:
            batch = None if self._keep is not None else self.probe.batches[0]
            points = self._journal.step(
                "sensitivities",
                lambda: {
                    name: curve.points
                    for name, curve in measured_sensitivities(
                        self.task, self._original, self._places, batch, self._tell
                    ).items()
                },
            )
            self._sensitivities = {name: Curve(own) for name, own in points.items()}
        return self._sensitivities

    @property
    def known_sensitivities(self) -> Mapping[str, Curve]:
        """The curves that a proposal needed; none where there was no proposal."""
        return self._sensitivities

    # --- measuring and training -----------------------------------------------------------------------------

    def measured(self, candidate: Candidate) -> Candidate:
        """With its drop on the deciding images."""
        start = clock.now()
        self._tell(f"{candidate.name}: measuring", 0.0)
        task = self.task

        def drop_of_candidate() -> metrics.Drop:
            rows = metric_rows(task, candidate.network, task.select)
            return metrics.drop(task.metric, task.original_rows, rows, seed=task.seed)

        drop = self._journal.step("drop", drop_of_candidate)
        spent = clock.now() - start
        return dataclasses.replace(candidate, drop=drop, seconds=candidate.seconds + spent)

    def step_seconds(self, candidate: Candidate) -> float:
        """Wall time of one training step; infinite where it cannot be trained."""
        return self._journal.step("step seconds", lambda: self.tuner.step_seconds(candidate.network))

    def trained(self, candidate: Candidate, seconds: float, name: str, hopeless: float = math.inf) -> Candidate | None:
        """Fine-tune all that can be trained; None, with a warning, when the loss does not stay finite."""
        self._before(dataclasses.replace(candidate, name=name))
        start = clock.now()
        network = self.tuner.tuned(
            candidate.network, seconds, name, hopeless, lambda learned: self._mended(learned, name)
        )
        if network is None:
            return None
        spent = clock.now() - start
        return dataclasses.replace(
            candidate,
            name=name,
            network=network,
            trained=candidate.trained + spent,
            seconds=candidate.seconds + spent,
        )

    def _mended(self, network: Network, name: str) -> Network:
        """The network refitted where that helps: its blocks were trained beside each other."""
        training = self.task.training
        if training is None or not training.loss.fed:
            return network
        made = (network, self._refitted(network, name, self.probe))
        return min(made, key=lambda own: self._divergence(own, self.probe))
