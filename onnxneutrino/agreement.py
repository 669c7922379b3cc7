"""Original and compressed network side by side on the same examples: how often they say the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.data import Split
from onnxneutrino.metrics import Metric
from onnxneutrino.report import Agreement, Confusion
from onnxneutrino.runtime import Runner

EXAMPLES = 2000
CLASS_METRICS = ("top1", "top5", "f1", "agreement")
MATRIX_CLASSES, FREQUENT = 32, 50


def compared(
    original: ModelProto, other: ModelProto, split: Split, metric: Metric, batch: int, threads: int
) -> Agreement | None:
    """Run both networks on the first examples of a split.

    A network whose first output is a vector of scores, judged by a metric of classes, is a classifier; others agree
    by `100 · (1 - ‖y - y₀‖ / ‖y₀‖)`, with the original's first output y₀.

    Args:
        original: with the batch that `batch` needs.
        other: of the same inputs and outputs.
        split: the first 2000 examples are used.
        metric: the user's.
        batch: examples of a run.
        threads: for the runtime.

    Returns:
        None where the outputs are no numbers that can be compared.
    """
    runs = Runner(original, threads=threads), Runner(other, threads=threads)
    outputs: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
    labels: list[NDArray[Any] | None] = []
    classes = 0
    for drawn in split.subset(np.arange(min(len(split), EXAMPLES))).batches(batch):
        first, second = (np.asarray(run(drawn.inputs)[0]) for run in runs)
        if first.dtype.kind != "f" or first.shape != second.shape or first.ndim == 0:
            return None
        flat = [array.reshape(len(array), -1) for array in (first, second)]
        scored = metric.name in CLASS_METRICS and 1 < flat[0].shape[1] == max(first.shape[1:])
        classes = flat[0].shape[1] if scored else 0
        for own, array in zip(outputs, flat, strict=True):
            own.append(array.argmax(axis=1) if scored else array)
        labels.append(drawn.targets)
    before, after = (np.concatenate(own) for own in outputs)
    if not classes:
        norm = float(np.linalg.norm(before))
        error = float(np.linalg.norm(after.astype(np.float64) - before)) / norm if norm else 0.0
        return Agreement(len(before), 100 * (1 - min(error, 1.0)))
    found = Agreement(
        len(before),
        100 * float(np.mean(before == after)),
        classes=classes,
        confusions=_pairs(before, after, classes),
    )
    right = _labels(labels, len(before))
    if right is None:
        return found
    a, b = before == right, after == right
    return dataclasses.replace(
        found,
        both_right=int(np.sum(a & b)),
        only_original=int(np.sum(a & ~b)),
        only_compressed=int(np.sum(~a & b)),
        both_wrong=int(np.sum(~a & ~b)),
    )


def _labels(drawn: Iterable[NDArray[Any] | None], examples: int) -> NDArray[Any] | None:
    """One integer label for each example; None where the data has none."""
    known = [np.asarray(own) for own in drawn if own is not None]
    if not known or any(own.dtype.kind not in "iu" or own.size != len(own) for own in known):
        return None
    joined = np.concatenate([own.reshape(-1) for own in known])
    return joined if len(joined) == examples else None


def _pairs(said: NDArray[Any], says: NDArray[Any], classes: int) -> tuple[Confusion, ...]:
    """Pairs of classes, the most frequent first: all of few classes, of many the most frequent disagreements."""
    counted = Counter(zip(said.tolist(), says.tolist(), strict=True))
    found = sorted((Confusion(a, b, n) for (a, b), n in counted.items()), key=lambda own: (-own.count, own.original))
    if classes <= MATRIX_CLASSES:
        return tuple(found)
    return tuple(own for own in found if own.original != own.compressed)[:FREQUENT]
