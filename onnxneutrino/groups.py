"""Training a large network a few blocks at a time, each such group with artifacts of its own.

The training runtime makes about eight copies of what it is given. So consecutive blocks whose trained arrays stay
below a limit are cut out of the training copy and learn the original's tensors by themselves; the groups behind
them see what they have learned (block reconstruction, Li et al. 2021, "BRECQ"). A fixed set of batches moves
through both networks group by group, so that no prefix is computed twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxneutrino import clock, finetune, weights
from onnxneutrino.blocks import Block, bottlenecks
from onnxneutrino.config import TrainConfig
from onnxneutrino.errors import TrainingError
from onnxneutrino.finetune import Arrays, Example, Trained
from onnxneutrino.graph import TensorType, copied, expose, replace_uses
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.segments import between
from onnxneutrino.walk import reads, tensor_bytes

GIVEN = "/onnxneutrino/given"
BATCH_BYTES = 2**26  # of what a group reads and learns, over all batches
MOST_BATCHES = 16

Inputs = Mapping[str, NDArray[Any]]
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Group:
    """Consecutive blocks: the tensors they learn, and those that they are given for it."""

    learns: tuple[str, ...]
    fed: tuple[str, ...]


def grouped(copy: ModelProto, blocks: Sequence[Block], loss: Loss, names: Collection[str], limit: int) -> list[Group]:
    """Consecutive blocks together, as long as what they train stays below `limit` bytes.

    Args:
        copy: training copy.
        blocks: in the order of the graph.
        loss: with all cuts.
        names: initializers that are trained.
        limit: bytes of such initializers in a group; a single block may have more.
    """
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in copy.graph.initializer if tensor.name in set(names)}
    found: list[tuple[list[str], int]] = []
    for block in blocks:
        _, stored = _upstream(copy, block.learns, loss.fed)
        size = sum(sizes.get(name, 0) for name in stored)
        if found and found[-1][1] + size <= limit:
            found[-1] = ([*found[-1][0], *block.learns], found[-1][1] + size)
        else:
            found.append(([*block.learns], size))
    seen: set[str] = set()
    result = []
    for learns, _ in found:
        own = tuple(name for name in dict.fromkeys(learns) if name not in seen)
        seen.update(own)
        if own:
            given, _ = _upstream(copy, own, loss.fed)
            result.append(Group(own, tuple(name for name in loss.fed if name in given)))
    return result


def _upstream(model: ModelProto, learns: Sequence[str], fed: Collection[str]) -> tuple[set[str], set[str]]:
    """Those of `fed` that are read on the way to `learns`, and all other tensors there."""
    given: set[str] = set()
    wanted, fed = set(learns), set(fed)
    for node in reversed(model.graph.node):
        if not wanted.isdisjoint(node.output):
            for name in reads(node):
                (given if name in fed else wanted).add(name)
    return given, wanted


def cut_out(copy: ModelProto, group: Group, given: Mapping[str, NDArray[Any]]) -> ModelProto:
    """The part of a training copy that a group trains, with all its data in memory.

    Args:
        copy: training copy.
        group: which part.
        given: values of one batch of the tensors that it is fed; they become inputs, see `as_inputs`.
    """
    part = copied(copy)
    for name in group.fed:
        replace_uses(part.graph, name, name + GIVEN)
        kind = helper.np_dtype_to_tensor_dtype(given[name].dtype)
        part.graph.input.append(helper.make_tensor_value_info(name + GIVEN, kind, given[name].shape))
    return weights.in_memory(expose(part, group.learns))


def as_inputs(group: Group, values: Inputs) -> Arrays:
    """What is given to a part that was cut out: its own inputs, and those that it is fed."""
    return {**values, **{name + GIVEN: values[name] for name in group.fed}}


def loss_of(group: Group, loss: Loss) -> Loss:
    """The share of the loss that a group learns; what it is fed comes through its inputs."""
    scales = dict(zip(loss.squared, loss.scales or (1.0,) * len(loss.squared), strict=True))
    own = dataclasses.replace(
        loss,
        outputs=tuple(name for name in loss.outputs if name in group.learns),
        reconstructed=tuple(name for name in loss.reconstructed if name in group.learns),
        fed=(),
        scales=(),
    )
    return dataclasses.replace(own, scales=tuple(scales[name] for name in own.squared))


class GroupTraining:
    """One fine-tune of a network, group by group."""

    def __init__(
        self,
        original: ModelProto,
        copy: ModelProto,
        student: Callable[[Mapping[str, NDArray[Any]]], ModelProto],
        loss: Loss,
        groups: Sequence[Group],
        names: Sequence[str],
        types: Mapping[str, TensorType],
        threads: int,
        keep: Callable[[NDArray[Any]], NDArray[Any]],
        recipe: TrainConfig,
    ) -> None:
        """Prepare.

        Args:
            original: the graph whose tensors are learned, with a free batch.
            copy: training copy of the network.
            student: the network's graph with these arrays in it.
            loss: with all cuts.
            groups: in the order of the graph.
            names: initializers that are trained.
            types: of the original's tensors at batch 1.
            threads: for the runtime.
            keep: puts an array where it may stay.
            recipe: optimizer, schedule and averaging.
        """
        self._original, self._copy, self._student = original, copy, student
        self._loss, self._groups, self._names = loss, groups, names
        self._types, self._threads, self._keep, self._recipe = types, threads, keep, recipe
        self._narrow = bottlenecks(original, [value.name for value in original.graph.output])

    def batches(self, size: int) -> int:
        """Batches of `size` examples to learn from."""
        each = max(
            (sum(self._bytes(name) for name in (*own.learns, *own.fed)) * size for own in self._groups), default=1
        )
        return int(min(max(BATCH_BYTES // max(each, 1), 1), MOST_BATCHES))

    def _bytes(self, name: str) -> int:
        own = self._types.get(name)
        return 0 if own is None else math.prod(own.shape) * own.dtype.itemsize

    def train(self, batches: Sequence[Inputs], seconds: float, learning_rate: float, report: Report) -> Trained:
        """Train every group for its part of `seconds`, with one step at least.

        Args:
            batches: inputs, each of the training copy's batch.
            seconds: wall time to spend.
            learning_rate: its peak.
            report: called with what is being done and the share of it that is finished.

        Raises:
            TrainingError: see `finetune.fine_tune`; or there is nothing to train.
        """
        end = clock.now() + seconds
        begin = clock.now()
        start: str | None = None
        own: list[Inputs] = list(batches)
        taught: list[Inputs] = list(batches)
        learned: Arrays = {}
        results: list[Trained] = []
        for index, group in enumerate(self._groups):
            report(f"blocks {index + 1} of {len(self._groups)}", index / len(self._groups))
            began = clock.now()
            following = self._groups[index + 1].fed[:1] if index + 1 < len(self._groups) else ()
            rest = following if following and following[0] in self._narrow else ()
            student = self._student(learned)
            fed = self._run(student, start, group.fed, own)
            wanted = self._run(self._original, start, (*group.learns, *rest), taught)
            part = loss_of(group, self._loss)
            drawn = [
                Example(as_inputs(group, values), [goal[name] for name in part.tensors], None)
                for values, goal in zip(fed, wanted, strict=True)
            ]
            weights.let_go()
            share = (end - began) / (len(self._groups) - index)
            result = self._step(cut_out(self._copy, group, fed[0]), part, drawn, share, began, learning_rate)
            if result is not None:
                learned |= {name: self._keep(array) for name, array in result.arrays.items()}
                results.append(dataclasses.replace(result, arrays={}))  # else all would be in memory in the end
                del result
            if rest:
                behind = self._run(self._student(learned), start, rest, own)
                own = [{**plain, rest[0]: values[rest[0]]} for plain, values in zip(batches, behind, strict=True)]
                taught = [{**plain, rest[0]: values[rest[0]]} for plain, values in zip(batches, wanted, strict=True)]
                start = rest[0]
        if not results:
            raise TrainingError("no group of blocks has anything to train; use --trainer none")
        # Of losses of different tensors only means over the groups are told.
        first, last = (float(np.mean([own.losses[place] for own in results])) for place in (0, -1))
        schedule = dataclasses.replace(results[0].schedule, steps=sum(own.schedule.steps for own in results))
        return Trained(learned, (first, last), schedule, clock.now() - begin)

    def _run(
        self, model: ModelProto, start: str | None, names: Sequence[str], batches: Sequence[Inputs]
    ) -> list[Inputs]:
        """Each batch with these tensors; `start` is among its values already."""
        asked = [name for name in dict.fromkeys(names) if name != start]
        if not asked:
            return list(batches)
        run = Runner(between(model, start, asked, self._types), threads=self._threads)
        return [{**batch, **dict(zip(asked, run(batch), strict=True))} for batch in batches]

    def _step(
        self, model: ModelProto, loss: Loss, drawn: Sequence[Example], share: float, began: float, learning_rate: float
    ) -> Trained | None:
        """Train one part; None where nothing in it is trained."""
        held = {tensor.name for tensor in model.graph.initializer}
        names = [name for name in self._names if name in held]
        if not names:
            return None
        with finetune.Trainer(model, names, loss, self._threads, self._recipe.optimizer, directions={}) as trainer:
            return finetune.fine_tune(
                trainer,
                itertools.cycle(drawn),
                seconds=share - (clock.now() - began),
                learning_rate=learning_rate,
                shape=self._recipe.schedule,
                weight_average=self._recipe.weight_average,
            )
