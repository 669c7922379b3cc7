"""Fine-tuning of one candidate: its lessons from the original, its training, and whether that helped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock, finetune, metrics, range_test
from onnxneutrino.calibrate import Keep, in_place
from onnxneutrino.data import Split
from onnxneutrino.directions import Directions, input_directions
from onnxneutrino.errors import TrainingError
from onnxneutrino.events import TrainingStatus
from onnxneutrino.external import External
from onnxneutrino.groups import GroupTraining, grouped
from onnxneutrino.journal import UNKEPT, Journal
from onnxneutrino.kept_training import KeptTraining
from onnxneutrino.large import GROUP_BYTES
from onnxneutrino.looks import STOP_IMAGES, Looks, metric_rows
from onnxneutrino.losses import Loss
from onnxneutrino.memory import Made, fitting, needed_for
from onnxneutrino.passes.factorize import read_factors, stage_arrays, stage_names
from onnxneutrino.prefetch import prefetched
from onnxneutrino.runtime import Runner
from onnxneutrino.task import FineTune, Network, Task, Tuned, build, trainable_names
from onnxneutrino.teaching import Lessons, Memory, examples, teacher_error
from onnxneutrino.training_copy import check_training_copy, training_copy

RATE_SHARE = 0.1
SEEN_BATCHES = 8
RATE_BATCHES = 32  # the range test takes 30 at most
TEACHER_BATCHES = 16
LABEL_WEIGHTS = (0.1, 0.8)
LABEL_KINDS = "iufb"
DOUBT = 2.0  # standard errors


class Tuner:
    """Trains networks of one task, one after the other."""

    def __init__(
        self,
        task: Task,
        teacher: Runner,
        keep: Keep | None,
        tell: Callable[[str, float], None],
        watch: Callable[[TrainingStatus], None] = lambda status: None,
        journal: Journal = UNKEPT,
    ) -> None:
        """Take the task, the original on what its loss reads, where arrays go, who hears of progress, the journal."""
        self.task = task
        self._journal = journal
        self._watch = watch
        self.fine_tunes: list[FineTune] = []
        self.warnings: list[str] = []
        self._keep = keep
        self._tell = tell
        self._layers = {layer.name: layer for layer in task.layers}
        own = task.loss if task.training is None else task.training.loss
        learned = (*own.outputs, *own.reconstructed)
        alike = learned == task.loss.outputs
        self._rate = task.recipe.learning_rate
        self._memory = Memory()
        self._tutor = teacher if alike else Runner(task.batched, learned, threads=task.threads)

    def tuned(
        self,
        network: Network,
        seconds: float,
        name: str,
        hopeless: float = math.inf,
        mended: Callable[[Network], Network] = lambda network: network,
    ) -> Network | None:
        """Fine-tune all that can be trained.

        Args:
            network: its factors and arrays.
            seconds: wall time to spend.
            name: for the report.
            hopeless: a drop; above it after half of the steps, training ends there.
            mended: puts right what was trained in blocks beside each other.

        Returns:
            The trained network, or `network` itself, with a warning, where training made it worse; None, with a
            warning, when the loss does not stay finite.
        """
        own = self._journal.step("fine-tune", lambda: self._tuned(network, seconds, name, hopeless, mended))
        self._rate = own.learning_rate
        self.task = dataclasses.replace(self.task, batch=own.batch)
        self.warnings.extend(own.warnings)
        if own.fine_tune is not None:
            self.fine_tunes.append(own.fine_tune)
        return own.network

    def _tuned(
        self,
        network: Network,
        seconds: float,
        name: str,
        hopeless: float,
        mended: Callable[[Network], Network],
    ) -> Tuned:
        if self.task.external is not None:
            return self._elsewhere(self.task.external, network, seconds, name)
        start, halved = clock.now(), list[str]()
        try:
            made = self._fitting(lambda: self._here(network, start, seconds, name, hopeless, mended), halved)
        except TrainingError as error:
            made = Tuned(None, None, (f"{name}: {error}; the candidate is dropped",), self._rate, self.task.batch)
        return dataclasses.replace(made, warnings=(*halved, *made.warnings))

    def _fitting(self, made: Callable[[], Made], told: list[str]) -> Made:
        """Make something with batches that memory has room for, smaller ones from then on; see `memory.fitting`."""

        def of(batch: int) -> Made:
            if batch != self.task.batch:
                self._memory = Memory()  # of answers to batches of one size
            self.task = dataclasses.replace(self.task, batch=batch)
            return made()

        return fitting(of, self.task.batch, told, self._journal.forget)[0]

    def _here(
        self,
        network: Network,
        start: float,
        seconds: float,
        name: str,
        hopeless: float,
        mended: Callable[[Network], Network],
    ) -> Tuned:
        """As `_tuned`, `start` on the clock being when `seconds` begin."""
        task = self.task
        loss, graph = self.loss, build(task, network, batched=True)
        names = list(trainable_names(task, network, graph))
        lessons = Lessons(self._tutor, self._fed(network), self._memory)
        labels = task.labels and loss.label_weight > 0
        kinds = LABEL_KINDS if loss.kind == "own" else "iu"
        # What the range test learned from is known already, and would make a step look short.
        first = RATE_BATCHES if self._rate is None else 0
        warnings: list[str] = []

        def drawn(skip: int = 0) -> Generator[finetune.Example, None, None]:
            return examples(task.train, task.batch, task.seed, lessons, labels, len(self.fine_tunes), kinds, skip)

        def refresh(arrays: Mapping[str, NDArray[Any]]) -> None:
            lessons.student = self._fed(self._learned(network, arrays))

        def trained(rate: float, left: float) -> tuple[finetune.Arrays, FineTune] | str:
            """Arrays and the record for the report; or, where something is not finite, what."""
            looks = Looks(task, lambda arrays: self._learned(network, arrays), hopeless)
            # A moving average is made of the arrays of every step: such a fine-tune begins anew.
            journal = UNKEPT if task.recipe.weight_average else self._journal
            kept = KeptTraining(journal, looks, looks.seen, refresh)
            source = drawn(first + kept.made)
            # Lessons of batches ahead of a step would be those of the student before it, or not, as it happens.
            ahead = source if loss.fed else prefetched(source)
            try:
                with self._trainer(copy, names, directions, kept.state) as trainer, contextlib.closing(ahead):
                    result = finetune.fine_tune(
                        cast(finetune.Trainer, kept.on(trainer)),
                        kept.examples(ahead),
                        seconds=left,
                        learning_rate=rate,
                        shape=task.recipe.schedule,
                        long_run=range_test.LONG_RUN if task.recipe.learning_rate is None else 0,
                        weight_average=task.recipe.weight_average,
                        report=lambda step, steps, loss: self._watch(looks.status(name, step, steps, loss)),
                        refresh=kept.refresh if loss.fed else None,
                        look=kept.look,
                    )
            except finetune.NotFiniteError as error:
                return str(error)
            return result.arrays, looks.record(name, result)

        try:
            copy = training_copy(graph, task.batch, task.types)
            check_training_copy(graph, copy, next(drawn()).inputs, task.threads)
            left = seconds - (clock.now() - start)
            if self._keep is not None:
                arrays, record = self._grouped(network, copy, names, left, name)
            else:
                directions = self._directions(copy, names)
                rate = self._found_rate(copy, names, directions, drawn(), RATE_SHARE * left)
                left = seconds - (clock.now() - start)
                made = self._journal.step("training at the found rate", lambda: trained(rate, left))
                if isinstance(made, str):
                    warnings.append(f"{name}: {made}; tried again at half the learning rate")
                    self._rate = rate / 2
                    left = seconds - (clock.now() - start)
                    made = self._journal.step("training at half the rate", lambda: trained(rate / 2, left))
                if isinstance(made, str):
                    raise TrainingError(made)
                arrays, record = made
        except TrainingError as error:
            dropped = f"{name}: {error}; the candidate is dropped"
            return Tuned(None, None, (*warnings, dropped), self._rate, task.batch)
        return self._ended(network, mended(self._learned(network, arrays)), record, warnings)

    def _elsewhere(self, external: External, network: Network, seconds: float, name: str) -> Tuned:
        """As `_tuned`, by the user's own training loop.

        Raises:
            TrainingError: it failed where it had not worked before.
        """
        graph = build(self.task, network, batched=True)
        names = trainable_names(self.task, network, graph)
        try:
            arrays = external.trained(graph, self.task.batched, names, seconds)
        except TrainingError as error:
            if not self.fine_tunes:
                raise
            return Tuned(None, None, (f"{name}: {error}; the candidate is dropped",), self._rate, self.task.batch)
        record = FineTune(name, 0, self.task.batch, math.nan, ())
        return self._ended(network, self._learned(network, arrays), record, ())

    def step_seconds(self, network: Network) -> float:
        """Wall time of one training step of a network, lessons included; infinite where it cannot be trained.

        A large network's blocks are trained apart, and others may be trained elsewhere, for which this says nothing: 0.
        """
        if self._keep is not None or self.task.external is not None:
            return 0.0
        try:
            return self._fitting(lambda: self._timed(network), self.warnings)
        except TrainingError:
            return math.inf

    def _timed(self, network: Network) -> float:
        """As `step_seconds`.

        Raises:
            TrainingError: it cannot be trained.
        """
        task = self.task
        graph = build(task, network, batched=True)
        lessons = Lessons(self._tutor, self._fed(network), self._memory)
        own = self.loss.kind == "own" and self.loss.label_weight > 0  # which cannot do without
        source = examples(task.train, task.batch, task.seed, lessons, labels=own, kinds=LABEL_KINDS)
        copy = training_copy(graph, task.batch, task.types)
        with self._trainer(copy, trainable_names(task, network, graph), {}) as trainer:
            return finetune.step_seconds(trainer, source)

    def _trainer(
        self,
        copy: ModelProto,
        names: Sequence[str],
        directions: Mapping[str, Directions],
        state: NDArray[np.uint8] | None = None,
    ) -> finetune.Trainer:
        task = self.task
        return finetune.Trainer(
            copy, names, self.loss, task.threads, task.recipe.optimizer, state=state, directions=directions
        )

    def _directions(self, copy: ModelProto, names: Sequence[str]) -> dict[str, Directions]:
        """What the layers of a network in training read, on a few training batches."""
        task = self.task
        drawn = examples(task.train, task.batch, task.seed, Lessons(lambda inputs: [], None), False)
        with needed_for(task.batch):
            seen = [own.inputs for own in itertools.islice(drawn, SEEN_BATCHES)]
            return input_directions(copy, names, seen, task.threads)

    def _found_rate(
        self,
        copy: ModelProto,
        names: Sequence[str],
        directions: Mapping[str, Directions],
        source: Iterator[finetune.Example],
        seconds: float,
    ) -> float:
        """The learning rate: the user's; else found on the first network, and used for all that follow from it."""
        if self._rate is None:

            def found() -> float:
                with self._trainer(copy, names, directions) as trainer:
                    return range_test.find_rate(trainer, source, seconds)

            self._rate = self._journal.step("learning rate", found)
        return self._rate

    @cached_property
    def loss(self) -> Loss:
        """What is learned; the labels count as much as the original errs on the images that training sees."""
        task = self.task
        assert task.training is not None
        loss = task.training.loss
        if not (task.labels and loss.label_weight and loss.kind == "classes" and loss.outputs):
            return loss
        drawn = examples(task.train, task.batch, task.seed, Lessons(self._tutor, None, self._memory), labels=True)
        error = teacher_error(drawn, TEACHER_BATCHES)
        if error is None:
            return loss
        return dataclasses.replace(loss, label_weight=float(np.clip(2 * error, *LABEL_WEIGHTS)))

    def _grouped(
        self, network: Network, copy: ModelProto, names: Sequence[str], seconds: float, name: str
    ) -> tuple[finetune.Arrays, FineTune]:
        """Fine-tune a large network, a few blocks at a time."""
        task = self.task
        assert task.training is not None
        plan, keep = task.training, self._keep or in_place

        def student(arrays: Mapping[str, NDArray[Any]]) -> ModelProto:
            return build(task, self._learned(network, arrays), batched=True)

        groups = grouped(copy, plan.blocks, plan.loss, names, GROUP_BYTES)
        training = GroupTraining(
            task.batched, copy, student, plan.loss, groups, names, task.types, task.threads, keep, task.recipe
        )
        nothing = Lessons(lambda inputs: [], None)
        drawn = examples(task.train, task.batch, task.seed, nothing, False, len(self.fine_tunes))
        batches = [next(drawn).inputs for _ in range(training.batches(task.batch))]
        result = training.train(
            batches,
            seconds,
            self._rate or range_test.DEFAULT_RATE,
            lambda what, share: self._tell(f"{name}: {what}", share),
        )
        return result.arrays, Looks(task, lambda arrays: network, math.inf).record(name, result)

    def _fed(self, network: Network) -> Runner | None:
        """Computes what the blocks of a network are given; None where it is trained as a whole."""
        fed = () if self.task.training is None else self.task.training.loss.fed
        return Runner(build(self.task, network, batched=True), fed, threads=self.task.threads) if fed else None

    def _learned(self, network: Network, arrays: Mapping[str, NDArray[Any]]) -> Network:
        """The network with trained arrays; what no gradient reached keeps its values."""
        factors = {}
        for name, own in network.factors.items():
            before = stage_arrays(self._layers[name], own)
            factors[name] = read_factors(self._layers[name], own, {**before, **arrays})
        held = {n for name, own in factors.items() for n in stage_names(self._layers[name], own)}
        others = {name: array for name, array in arrays.items() if name not in held}
        return Network(factors, {**network.arrays, **others})

    def _ended(self, before: Network, after: Network, record: FineTune, warnings: Sequence[str]) -> Tuned:
        """With the better network; a warning where training was in vain."""
        better = self._better(before, after)
        vain = [f"{record.name}: the metric fell; the weights before it were kept"] if better is before else []
        return Tuned(better, record, (*warnings, *vain), self._rate, self.task.batch)

    def _better(self, before: Network, after: Network) -> Network:
        """`before` where `after` scores worse beyond doubt, on held-out training images and on deciding ones.

        The original has memorised the first, and a network made from it loses that memory when it is trained: there
        alone a worse score says little. Without them the others decide alone. A plan that was chosen by few images
        looks better on these than it is: YOLOX-nano, untrained, lost 0.002 of map50 on 64 images and 0.033 on 128.
        """
        judges = [split for split in (self.task.stop, self.task.select) if split is not None]
        return before if all(self._loses(before, after, split) for split in judges) else after

    def _loses(self, before: Network, after: Network, split: Split) -> bool:
        split = split.subset(np.arange(min(len(split), STOP_IMAGES)))
        rows = [metric_rows(self.task, network, split) for network in (before, after)]
        lost = metrics.drop(self.task.metric, rows[0], rows[1], seed=self.task.seed)
        return lost.value > DOUBT * lost.standard_error
