"""What is seen of the metric while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino import finetune, metrics
from onnxneutrino.data import Split
from onnxneutrino.events import TrainingStatus
from onnxneutrino.prepare import evaluate
from onnxneutrino.task import FineTune, Network, Task, build

STOP_IMAGES = 1000
HALF = 0.5


class Looks:
    """What is seen of a network while it is trained: its metric on the first deciding images.

    Called with arrays, step and share of the steps, as `finetune.fine_tune` does; True after half of the steps where
    the drop is above `hopeless` by more than its standard error.
    """

    def __init__(self, task: Task, learned: Callable[[Mapping[str, NDArray[Any]]], Network], hopeless: float) -> None:
        """Take the task, what makes a network of trained arrays, and the drop above which there is no hope."""
        self._task, self._learned, self._hopeless = task, learned, hopeless
        few = np.arange(min(len(task.select), STOP_IMAGES))
        self._images, self._rows = task.select.subset(few), task.original_rows[few]
        original = metrics.value(task.metric, self._rows)
        lowest = original - task.delta if task.metric.higher_is_better else original + task.delta
        self._floor = lowest if math.isfinite(lowest) else None
        self.seen: dict[int, float] = {}

    def __call__(self, arrays: Mapping[str, NDArray[Any]], step: int, share: float) -> bool:
        """Whether training should end here."""
        task = self._task
        rows = metric_rows(task, self._learned(arrays), self._images)
        self.seen[step] = metrics.value(task.metric, rows)
        if share != HALF:
            return False
        drop = metrics.drop(task.metric, self._rows, rows, seed=task.seed)
        return drop.value - drop.standard_error > self._hopeless

    def status(self, name: str, step: int, steps: int, loss: float) -> TrainingStatus:
        """How far the fine-tune of the candidate `name` is."""
        epoch = step * self._task.batch / max(len(self._task.train), 1)
        seen = next(reversed(self.seen.values()), None)
        return TrainingStatus(name, step, steps, epoch, loss, self._task.metric.name, seen, self._floor)

    def record(self, name: str, result: finetune.Trained) -> FineTune:
        """The fine-tune for the report."""
        rate, batch = result.schedule.learning_rate, result.schedule.batch
        return FineTune(name, len(result.losses), batch, rate, result.losses, self.seen, self._floor)


def metric_rows(task: Task, network: Network, split: Split) -> NDArray[Any]:
    """Metric statistics of a network on a split."""
    model = build(task, network, batched=True)
    return evaluate(model, split, task.metric, task.evaluation_batch, task.threads, task.batched)
