"""Filter pruning with Torch-Pruning, fine-tuned in PyTorch, under the project's own search.

Global group pruning by magnitude: groups of coupled channels are ranked by their mean squared weight over the whole
network and the least are removed, at the ratio that just meets the cost (bisection). Loss, labels, augmented data,
teacher, schedule, gradient clipping, deciding images and acceptance are those of the project; BatchNormalization trains
on batch statistics, as PyTorch does, and is folded when the network is written. What the search measures is the ONNX
file in ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import baseline_bench
import numpy as np
import torch
import torch_pruning  # type: ignore[import-not-found, unused-ignore]
from baseline_bench import Baseline, PlainTuner, Tell
from baseline_torch import Net, converted, exported
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import choice, conductor, cost, finetune, prepare, range_test, summary, task, tuning
from onnxneutrino.bench import Candidate
from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.finetune import Example
from onnxneutrino.graph import load
from onnxneutrino.looks import Looks
from onnxneutrino.losses import PREFIX, Loss, loss_inputs
from onnxneutrino.normalize import relative_error, restored
from onnxneutrino.passes import fold_constants, free_batch, slim
from onnxneutrino.prefetch import prefetched
from onnxneutrino.runtime import Runner
from onnxneutrino.task import Network, Task
from onnxneutrino.teaching import Lessons, examples
from onnxneutrino.training_plan import TrainingPlan

BISECTIONS = 10
LEAST_KEPT = 0.03
AGREEMENT = 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-6  # of ONNX Runtime's AdamW; its weight decay is 0


@dataclass(frozen=True, eq=False)
class Pruned(Network):
    """A network of its own: the module, and the deployable ONNX graph and its copy with a free batch."""

    net: Net | None = None
    model: ModelProto | None = None
    batched: ModelProto | None = None


def built(own: Task, network: Network, batched: bool = False) -> ModelProto:
    """`task.build`, which a pruned network needs not."""
    made = (network.batched if batched else network.model) if isinstance(network, Pruned) else None
    return task.build(own, network, batched) if made is None else made


@contextlib.contextmanager
def in_place(path: Path) -> Iterator[None]:
    """Pruning in the place of the workbench while a file is compressed."""

    def made(own: Task, seconds: float, tell: Tell, watch: object) -> Pruning:
        return Pruning(own, tell, load(path).model)

    def untested(own: Task, config: Any, notes: list[str]) -> Task:
        """The gradients are PyTorch's: nothing of the training runtime is checked."""
        return dataclasses.replace(own, training=TrainingPlan(own.loss, ()))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(conductor, "Workbench", made))
        stack.enter_context(mock.patch.object(conductor, "with_training", untested))
        for module in (choice, conductor, summary, tuning, baseline_bench):
            stack.enter_context(mock.patch.object(module, "build", built))
        yield


class Pruning(Baseline):
    """The search's `Bench` in PyTorch."""

    def __init__(self, own: Task, tell: Tell, given: ModelProto) -> None:
        """Convert the network and see that its outputs stay.

        Args:
            own: the run.
            tell: progress.
            given: the network with its BatchNormalization.
        """
        if own.loss.kind != "classes":
            raise ModelError("pruning is written for classifiers")
        super().__init__(own, tell, lambda task: ())
        torch.set_num_threads(own.threads)
        torch.manual_seed(own.seed)
        with contextlib.redirect_stdout(None):
            folded = fold_constants.run(given)[0]
            self._like = restored(given, slim.run(folded)[0])
        shapes = {name: (1, *array.shape[1:]) for name, array in self._batch().items()}
        types = prepare.types_of(self._like, shapes)
        logits = own.loss.outputs[0]
        self._net = converted(self._like, types, logits)
        self._tail = []
        behind = {logits}
        for node in self._like.graph.node:
            if behind & set(node.input):
                behind.update(node.output)
                self._tail.append(node)
        self._input, self._example = next(iter(shapes)), shapes
        self.tuner = TorchTuner(own, self._teacher, tell, self._input, self._pruned)
        whole = self._pruned(self._net)
        inputs = self._batch()
        wanted = Runner(own.batched, own.loss.outputs)(inputs)[0]
        with torch.no_grad():
            inside = self._net(torch.from_numpy(inputs[self._input])).numpy()
        for found in (inside, Runner(built(own, whole, True), own.loss.outputs)(inputs)[0]):
            error = relative_error(wanted.reshape(inside.shape), found.reshape(inside.shape))
            if not error <= AGREEMENT:
                raise ModelError(f"the outputs of the converted network differ by {error:.1e} of the largest")
        self._least: Pruned | None = None

    def _batch(self) -> dict[str, Any]:
        return next(iter(self.task.train.batches(self.task.batch))).inputs

    @property
    def full_cost(self) -> float:
        """Cost of the original network, normalized."""
        return self._counted(self.task.model)

    @property
    def least_cost(self) -> float:
        """Cost at the largest ratio."""
        if self._least is None:
            self._least = self._at(self._net, 1.0)
        return self._counted(built(self.task, self._least))

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        """The network at the smallest ratio that costs at most `cost`; at the largest where none does."""
        start = time.perf_counter()
        net = self._net if source is None else source.network.net
        low, high, best = 0.0, 1.0, None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            tried = self._at(net, middle)
            if self._counted(built(self.task, tried)) <= cost:
                high, best = middle, tried
            else:
                low = middle
        network = best or self._at(net, 1.0)
        return Candidate(
            name=name,
            network=network,
            choices={},
            cost=self._counted(built(self.task, network)),
            divergence=self._divergence(network),
            trained=0.0 if source is None else source.trained,
            seconds=time.perf_counter() - start,
        )

    def _counted(self, model: ModelProto) -> float:
        if self.task.objective == "macs":
            return float(cost.macs(model, prepare.types_of(model, self._example)))
        return float(cost.params(model))

    def _at(self, net: Net, ratio: float) -> Pruned:
        """A copy with this share of its channels removed."""
        own = copy.deepcopy(net).eval()
        remove_channels(own, torch.zeros(self._example[self._input]), ratio)
        return self._pruned(own)

    def _pruned(self, net: Net) -> Pruned:
        model = exported(net, self._like, self._tail)
        return Pruned(net=net, model=model, batched=free_batch.run(model)[0])


class TorchTuner(PlainTuner):
    """The project's tuner with the steps themselves in PyTorch."""

    def __init__(self, own: Task, teacher: Runner, tell: Tell, fed: str, written: Callable[[Net], Pruned]) -> None:
        """Take what `Tuner` takes, the name of the network's input, and what writes a module as ONNX."""
        super().__init__(own, teacher, None, tell)
        self._fed_input = fed
        self._written = written

    def tuned(
        self,
        given: Network,
        seconds: float,
        name: str,
        hopeless: float = math.inf,
        mended: Callable[[Network], Network] = lambda network: network,
    ) -> Network | None:
        """Fine-tune all parameters; see `Tuner.tuned`."""
        assert isinstance(given, Pruned)
        assert given.net is not None
        start = time.perf_counter()
        own, loss = self.task, self.loss
        labels = own.labels and loss.label_weight > 0
        source = examples(own.train, own.batch, own.seed + len(self.fine_tunes), Lessons(self._tutor, None), labels)
        trainer = TorchTrainer(given.net, loss, self._fed_input, own.batch)

        looks = Looks(own, lambda arrays: self._written(trainer.net), hopeless)
        try:
            with contextlib.closing(prefetched(source)) as ahead:
                left = seconds - (time.perf_counter() - start)
                same = cast(finetune.Trainer, trainer)
                result = finetune.fine_tune(
                    same, ahead, seconds=left, learning_rate=range_test.DEFAULT_RATE, look=looks
                )
        except TrainingError as error:
            self.warnings.append(f"{name}: {error}; the candidate is dropped")
            return None
        self.fine_tunes.append(looks.record(name, result))
        better = self._better(given, self._written(trainer.net))
        if better is given:
            self.warnings.append(f"{name}: the metric fell; the weights before it were kept")
        return better


class TorchTrainer:
    """What `finetune.fine_tune` steps with, on a copy of a module."""

    def __init__(self, net: Net, loss: Loss, fed: str, batch: int) -> None:
        """Take the module, what to learn, the name of its input and the examples of a step."""
        self._net = copy.deepcopy(net)
        self._net.train()
        self._loss = loss
        self._fed = fed
        self.batch = batch
        self._optimizer = torch.optim.AdamW(self._net.parameters(), betas=BETAS, eps=EPSILON, weight_decay=0.0)

    @property
    def net(self) -> Net:
        """A copy of the module as it is now, for inference."""
        own = copy.deepcopy(self._net)
        own.eval()
        return own

    def step(self, example: Example, rate: float) -> float:
        """One AdamW step on the clipped gradients; the loss before it, less that of the teacher itself.

        Raises:
            TrainingError: the loss is not finite.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        given = loss_inputs(self._loss, example.teacher, example.labels)
        outputs = self._net(torch.from_numpy(np.ascontiguousarray(example.inputs[self._fed])))
        total = distillation(outputs, given, self._loss.temperature)
        value = float(total.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the training loss became {value}")
        self._optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), finetune.MAX_GRADIENT_NORM)
        self._optimizer.step()
        teacher = torch.from_numpy(np.asarray(example.teacher[0], np.float32))
        return value - float(distillation(teacher, given, self._loss.temperature))

    def arrays(self) -> dict[str, Any]:
        """Parameters and running statistics by name."""
        return {name: value.numpy() for name, value in self._net.state_dict().items()}


def distillation(outputs: torch.Tensor, given: Mapping[str, NDArray[Any]], temperature: float) -> torch.Tensor:
    """The loss of `losses.with_loss` on logits `(N, C)`, from the weights of the classes in `loss_inputs`."""
    logits = outputs.flatten(1)
    terms = [
        torch.from_numpy(given[f"{PREFIX}{kind}"]) * torch.log_softmax(logits / cooled, -1)
        for kind, cooled in (("hard", 1.0), ("soft", temperature))
    ]
    return -(terms[0] + terms[1]).sum() / len(logits)


def remove_channels(net: Net, example: torch.Tensor, ratio: float) -> None:
    """Remove the share `ratio` of least magnitude of all channels, those before the output left out; `net` is changed.

    Groups of coupled channels and their importance are Torch-Pruning's. Its own pruner leaves a group as it is where
    all its channels lie below the global threshold; here such a group keeps its best channels, so that the cost falls
    with the ratio.
    """
    last = [layer for layer in net.layers.values() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    roots = (torch.nn.Conv2d, torch.nn.Linear)
    groups = [
        (group[0].dep.target.module, group[0].dep.handler, importance(group).detach().numpy())
        for group in graph.get_all_groups(ignored_layers=[last], root_module_types=roots)
    ]
    ranked = np.sort(np.concatenate([scores for _, _, scores in groups]))
    threshold = ranked[min(int(ratio * len(ranked)), len(ranked) - 1)]
    for module, prune, scores in groups:
        kept = max(int(np.sum(scores >= threshold)), math.ceil(LEAST_KEPT * len(scores)))
        removed = np.argsort(scores)[: len(scores) - kept]
        if len(removed):
            graph.get_pruning_group(module, prune, removed.tolist()).prune()
