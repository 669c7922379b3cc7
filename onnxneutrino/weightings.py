"""How the outputs of a task's layers are weighted in their fits, where that can be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnxneutrino import clock, cost
from onnxneutrino.calibrate import Run
from onnxneutrino.curvature import output_curvature
from onnxneutrino.data import Inputs
from onnxneutrino.errors import NeutrinoError
from onnxneutrino.large import is_large
from onnxneutrino.memory import fitting
from onnxneutrino.plan import Array
from onnxneutrino.task import Task

BATCHES, MACS = 32, 10**11


def output_weightings(task: Task, teacher: Run, seconds: float) -> Mapping[str, Array]:
    """`G` of every layer of a classifier, `(O, O)`; none where the network cannot be differentiated.

    None either for a large model: its gradients need artifacts of the whole network. 32 batches, fewer where these
    would take more than 1e11 multiply-accumulates forward, or have taken `seconds`.
    """
    if task.loss.kind != "classes" or (task.training is not None and task.training.faulty) or is_large(task.layers):
        return {}

    def made(batch: int) -> Mapping[str, Array]:
        drawn = task.train.batches(batch, seed=task.seed, augment=True)
        affordable = MACS // (max(cost.macs(task.model, task.types), 1) * batch)
        inputs = [own.inputs for own, _ in zip(drawn, range(min(max(affordable, 1), BATCHES)), strict=False)]
        full = [own for own in inputs if len(next(iter(own.values()))) == batch]
        within = _within(full, seconds)
        return output_curvature(
            task.batched, batch, task.layers, task.loss, within, teacher, task.threads, task.seed, task.types
        )

    try:
        return fitting(made, task.batch)[0]
    except NeutrinoError:
        return {}


def _within(batches: Sequence[Inputs], seconds: float) -> Iterator[Inputs]:
    """The first batch, and others until `seconds` are over since it was asked for."""
    end = clock.now() + seconds
    for index, batch in enumerate(batches):
        if index and clock.now() > end:
            return
        yield batch
