"""Training from scratch: cross entropy with the labels, AdamW, BatchNormalization with the statistics of each batch.

The training runtime averages the statistics as its operator says, `mean ← 0.9 mean + 0.1 mean of the batch`, and the
same for the variance, divided by the number of values, not by one less; with them the network runs afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, helper

from onnxneutrino import finetune, metrics, prepare
from onnxneutrino.config import Config, load_config
from onnxneutrino.data import Split
from onnxneutrino.errors import DataError, ModelError
from onnxneutrino.events import Event, TrainingStatus
from onnxneutrino.finetune import Example
from onnxneutrino.graph import check_writable, copied, load, opset, save, with_arrays
from onnxneutrino.prefetch import prefetched
from onnxneutrino.training_copy import training_copy
from onnxneutrino.zoo.fetch import MODEL

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
# Inputs of an operator that are learned where they are initializers.
LEARNED = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1), "BatchNormalization": (1, 2)}
CERTAIN = 100.0
TRAINING_FORM = 14  # opset from which BatchNormalization has the attribute training_mode


@dataclass(frozen=True)
class Baseline:
    """The metric on the test split before and after; `written` is False where it fell and the old model stayed."""

    metric: str
    before: float
    after: float
    examples: int
    steps: int
    epochs: float
    seconds: float
    written: bool


def train(
    folder: Path,
    *,
    seconds: float,
    epochs: int | None = None,
    threads: int = 0,
    seed: int = 0,
    tell: Callable[[Event], None] = lambda event: None,
) -> Baseline:
    """Train `model.onnx` of a folder on the data that `model.toml` describes; it is replaced in one piece.

    Args:
        folder: as `fetch` leaves it.
        seconds: wall time for everything, without effect where `epochs` is given.
        epochs: times that every training image is seen.
        threads: that compute; 0 for the cores there are.
        seed: of order and augmentation.
        tell: hears of progress.

    Raises:
        NeutrinoError: nothing is written then.
    """
    start = time.perf_counter()
    path = folder / MODEL
    if not path.exists():
        raise ModelError(f"{path}: no such file; `onnxneutrino zoo fetch RECIPE {folder}` writes it")
    check_writable(path)
    source = load(path)
    config = load_config(path, {"validation": 0.0, "threads": threads or None, "seed": seed})
    opened = prepare.open_model(source.model, str(path), config)
    config, metric, dataset = prepare.settled(opened, config)
    _check_labels(opened, metric, dataset.train, config)
    tell(Event("training", "the test split before"))
    size = prepare.evaluation_batch(opened)
    before = metrics.value(metric, prepare.evaluate(source.model, dataset.test, metric, size, config.threads, None))
    spent = time.perf_counter() - start
    batch = min(prepare.training_batch(opened.model, opened.types), len(dataset.train))
    in_epoch = len(dataset.train) // batch

    def report(step: int, steps: int, loss: float) -> None:
        status = TrainingStatus(folder.name, step, steps, step / in_epoch, loss, metric.name)
        elapsed = time.perf_counter() - start
        left = (elapsed - spent) / step * (steps - step) + spent
        tell(Event("training", f"{folder.name}, loss {loss:.3f}", elapsed, left, training=status))

    form, statistics = with_batch_statistics(source.model)
    loss = dataclasses.replace(prepare.choose_loss(form, opened.types, config), label_weight=1.0, temperature=1.0)
    classes = prepare.class_count(opened, metric) or 0
    with (
        finetune.Trainer(
            training_copy(form, batch),
            learned(form),
            loss,
            config.threads,
            weight_decay=WEIGHT_DECAY,
            statistics=statistics,
        ) as trainer,
        contextlib.closing(prefetched(lessons(dataset.train, batch, classes, seed))) as ahead,
    ):
        trained = finetune.fine_tune(
            trainer,
            ahead,
            seconds=seconds - (time.perf_counter() - start) - spent,  # the test split is looked at once more
            learning_rate=LEARNING_RATE,
            steps=None if epochs is None else epochs * in_epoch,
            report=report,
        )
    model = with_arrays(source.model, trained.arrays)
    after = metrics.value(metric, prepare.evaluate(model, dataset.test, metric, size, config.threads, None))
    better = after >= before
    if better:
        save(model, path, source.external)
    steps = len(trained.losses)
    took = time.perf_counter() - start
    return Baseline(metric.name, before, after, len(dataset.test), steps, steps / in_epoch, took, better)


def _check_labels(opened: prepare.Opened, metric: metrics.Metric, train: Split, config: Config) -> None:
    if not metric.higher_is_better or prepare.class_count(opened, metric) is None or metric.needs_reference:
        raise ModelError(f"{opened.name}: only classifiers are trained here, with top1, top5 or f1, not {metric.name}")
    if not train.labelled:
        raise DataError(f"{config.data.path}: the training split has no labels; add y_train")


def with_batch_statistics(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """A copy with BatchNormalization in training form, and the names of the statistics that it averages.

    Raises:
        ModelError: the opset has no such form.
    """
    copy = copied(model)
    statistics: list[str] = []
    for node in copy.graph.node:
        if node.op_type == "BatchNormalization":
            if (opset(model) or 0) < TRAINING_FORM:
                raise ModelError(f"node '{node.name}': BatchNormalization is trained from opset {TRAINING_FORM} on")
            node.attribute.append(helper.make_attribute("training_mode", 1))
            node.output.extend(f"{name}/averaged" for name in node.input[3:5])
            statistics += node.input[3:5]
    return copy, statistics


def learned(model: ModelProto) -> list[str]:
    """Names of the weights, biases, scales and offsets."""
    stored = {tensor.name for tensor in model.graph.initializer}
    named = [
        node.input[index]
        for node in model.graph.node
        for index in LEARNED.get(node.op_type, ())
        if index < len(node.input) and node.input[index] in stored
    ]
    return list(dict.fromkeys(named))


def lessons(train: Split, batch: int, classes: int, seed: int) -> Iterator[Example]:
    """Endless batches of exactly `batch` examples, every epoch in an order and with an augmentation of its own.

    The teacher's part is played by answers that are right and certain: the loss, which is counted from the teacher's
    own, is then the cross entropy itself.
    """
    for epoch in itertools.count():
        for drawn in train.batches(batch, seed=seed * 1009 + epoch, augment=True):
            if len(drawn) == batch:
                labels = np.asarray(drawn.targets)
                yield Example(drawn.inputs, [CERTAIN * np.eye(classes, dtype=np.float32)[labels]], labels)
