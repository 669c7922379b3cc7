"""Task metrics, and how much worse a candidate is, with its interval.

Each batch becomes one row of sufficient statistics for each example; rows of batches are concatenated, and
a value is computed from any set of rows. So the drop between two models is paired over the examples.
The model's first output is judged, whatever else it has.

| name | row of one example | value |
|---|---|---|
| top1, top5 | share of right predictions | 100 · mean |
| f1 | prediction and label | 100 · mean over classes that occur of 2TP / (2TP + FP + FN) |
| miou | intersection and union by class | 100 · mean over classes that occur of ΣI / ΣU |
| mse | mean squared error | mean |
| psnr | mean squared error, least and greatest target | mean of 10 log10(peak² / MSE), in dB |
| agreement | argmax equal to the original's | 100 · mean |
| agreement, no classifier | squared error, squared norm | 100 · (1 - relative error) |
| map50, map | matches of the image's detections, see `detection` | mean average precision, 0 to 1 |
| file.py:function | outputs and target | function(outputs, targets) over the whole split |

`psnr` takes as peak the range of the targets, greatest minus least over the whole split (1 for images in
[0, 1], 255 for bytes); an example without error counts as 100 dB. The relative error of `agreement` is
‖y - y₀‖ / ‖y₀‖ over the split, y₀ the original's output; it counts as at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxneutrino import detection, own_metric
from onnxneutrino.data_checks import IGNORED_LABEL, shape_text
from onnxneutrino.data_function import UserFunction, is_function, load_function
from onnxneutrino.errors import MetricError, UsageError

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES = 500
PSNR_EXACT_DB = 100.0
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Metric:
    """A metric and what it needs.

    Attributes:
        name: as the user wrote it.
        higher_is_better: False for errors.
        percent: runs from 0 to 100.
        needs_targets: cannot be computed without targets.
        needs_reference: compares with the original's outputs; `mse` only where there are no targets.
        function: the user's own, else None.
        detections: the loader's, from the outputs to boxes, for map and map50; None where the first output has them.
    """

    name: str
    higher_is_better: bool = True
    percent: bool = True
    needs_targets: bool = True
    needs_reference: bool = False
    function: UserFunction | None = None
    detections: UserFunction | None = None


_BUILT_IN = (
    Metric("top1"),
    Metric("top5"),
    Metric("f1"),
    Metric("miou"),
    Metric("map50", percent=False),
    Metric("map", percent=False),
    Metric("psnr", percent=False),
    Metric("mse", higher_is_better=False, percent=False, needs_targets=False, needs_reference=True),
    Metric("agreement", needs_targets=False, needs_reference=True),
)


@dataclass(frozen=True)
class Drop:
    """How much worse a candidate is, in the metric's units; positive is worse.

    Attributes:
        value: the drop over all examples.
        standard_error: of `value`, paired over the examples.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    standard_error: float
    low: float
    high: float


def resolve(name: str, base: Path) -> Metric:
    """Find the metric of this name; a relative `file.py:function` starts from `base`.

    A function is called as `function(outputs, targets)` with the model's outputs over the whole split as a
    list of arrays; set its attribute `higher_is_better = False` where less is better.

    Raises:
        UsageError: a name that is not known.
        MetricError: a file or function that cannot be loaded; a `higher_is_better` that is not True or False.
    """
    for metric in _BUILT_IN:
        if metric.name == name:
            return metric
    if is_function(name):
        function = load_function(name, base, MetricError)
        higher = own_metric.higher_is_better(function)
        return Metric(name, higher, percent=False, needs_targets=False, function=function)
    known = ", ".join(metric.name for metric in _BUILT_IN)
    raise UsageError(f"metric '{name}' is not known; known are {known} and file.py:function")


def statistics(
    metric: Metric,
    outputs: Sequence[NDArray[Any]],
    targets: NDArray[Any] | None,
    reference: Sequence[NDArray[Any]] | None,
) -> NDArray[Any]:
    """Compute the rows `(n, k)` of a batch of n examples; rows of batches can be concatenated.

    Args:
        metric: decides k and the meaning of a row, see the table above.
        outputs: the model's outputs, first axis n.
        targets: labels `(n,)`, maps `(n, ...)` or values like the first output; None where there are none.
        reference: the original's outputs for the same examples; None where they are not needed.

    Raises:
        MetricError: no targets, shapes that do not belong together, NaN in an output.
    """
    if not outputs:
        raise MetricError(f"{metric.name}: the model has no outputs")
    for number, array in enumerate(outputs):
        if array.dtype.kind == "f" and bool(np.isnan(array).any()):
            raise MetricError(f"{metric.name}: output {number} of the model holds NaN; the model is broken")
    if metric.needs_targets and targets is None:
        raise MetricError(f"{metric.name} needs targets and the data has none; use agreement")
    output = np.asarray(outputs[0])
    if metric.function is not None:
        return own_metric.packed(metric.name, outputs, targets)
    if metric.name == "agreement" or (metric.name == "mse" and targets is None):
        if reference is None:
            raise MetricError(f"{metric.name} needs the outputs of the original model or targets")
        compare = _agreement if metric.name == "agreement" else _error
        return compare(output, np.asarray(reference[0]))
    assert targets is not None
    if len(output.shape) == 0 or len(output) != len(targets):
        raise _mismatch(metric.name, output, targets)
    if metric.name in detection.IOUS:
        return detection.matches(metric.name, outputs, targets, metric.detections)
    if metric.name == "mse":
        return _error(output, targets)
    if metric.name == "psnr":
        flat = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
        error = _error(output, targets, "psnr")
        return np.hstack([error, flat.min(1, keepdims=True), flat.max(1, keepdims=True)])
    output, targets = _class_scores(metric.name, output, targets)
    if metric.name == "miou":
        return _intersections(output, targets)
    if metric.name == "f1":
        if targets.ndim > 1:
            raise MetricError("f1 needs one label for each example, not maps; use miou")
        return np.stack([output.argmax(1), targets], axis=1).astype(np.float64)
    right = output.argmax(1) == targets if metric.name == "top1" else _among_five(output, targets)
    return _share(right, targets if targets.ndim > 1 else None)


def value(metric: Metric, rows: NDArray[Any]) -> float:
    """Compute the metric over the examples of these rows; see the table above.

    Raises:
        MetricError: no rows, or a user's function that fails or returns no number.
    """
    if not len(rows):
        raise MetricError(f"{metric.name}: there are no examples")
    if metric.function is not None:
        return own_metric.value(metric.function, rows)
    if metric.name in detection.IOUS:
        return detection.value(metric.name, rows)
    if metric.name == "f1":
        return _macro_f1(rows)
    if metric.name == "miou":
        intersection, union = np.split(rows.sum(axis=0), 2)
        return float(100 * np.mean(intersection[union > 0] / union[union > 0])) if union.any() else 0.0
    if metric.name == "psnr":
        peak = rows[:, 2].max() - rows[:, 1].min()
        if peak <= 0:
            raise MetricError("psnr: all targets are equal, so there is no peak; use mse")
        with np.errstate(divide="ignore"):
            ratio = 10 * np.log10(peak**2 / rows[:, 0])
        return float(np.minimum(ratio, PSNR_EXACT_DB).mean())
    if metric.name == "agreement" and rows.shape[1] == 2:
        error, norm = rows.sum(axis=0)
        relative = math.sqrt(error / norm) if norm > 0 else float(error > 0)
        return 100 * (1 - min(1.0, relative))
    return float(rows.mean()) * (100 if metric.percent else 1)


def drop(metric: Metric, original_rows: NDArray[Any], candidate_rows: NDArray[Any], *, seed: int = 0) -> Drop:
    """Compute how much worse the candidate is on the same examples, with its 95 % interval.

    For a mean over examples the standard error is that of the paired differences, s / √n; for others that of
    a paired bootstrap (Efron and Tibshirani 1993, chapter 6): 500 resamples of the examples, the same
    for both models. The interval is normal, value ± 1.96 standard errors.

    Raises:
        MetricError: rows of different examples, or of fewer than two.
    """
    if len(original_rows) != len(candidate_rows):
        counts = f"{len(original_rows)} examples against {len(candidate_rows)}"
        raise MetricError(f"{metric.name}: rows of {counts}; compare the same ones")
    count = len(original_rows)
    if count < 2:
        raise MetricError(f"{metric.name}: a drop needs at least 2 examples, there are {count}")
    sign = 1.0 if metric.higher_is_better else -1.0
    total = sign * (value(metric, original_rows) - value(metric, candidate_rows)) + 0.0  # never -0.0
    if _is_mean(metric, original_rows):
        scale = 100 if metric.percent else 1
        spread = np.std(scale * (original_rows[:, 0] - candidate_rows[:, 0]), ddof=1)
        error = float(spread) / math.sqrt(count)
    else:
        generator = np.random.default_rng(seed)
        chosen = [generator.integers(0, count, count) for _ in range(RESAMPLES)]
        drops = _resampled(metric, original_rows, chosen) - _resampled(metric, candidate_rows, chosen)
        error = float(np.std(drops[np.isfinite(drops)], ddof=1))
    return Drop(total, error, total - _NORMAL_95 * error, total + _NORMAL_95 * error)


def chance(metric: Metric, targets_or_classes: NDArray[Any] | int) -> float | None:
    """Return the value that guessing gives: 100 / classes for top1, None for a metric without such a level.

    Args:
        metric: the metric.
        targets_or_classes: the number of classes, or labels, whose distinct values are counted.
    """
    if metric.name != "top1":
        return None
    classes = targets_or_classes
    if not isinstance(classes, int):
        classes = len(np.unique(classes))
    return 100.0 / classes if classes else None


def _resampled(metric: Metric, rows: NDArray[Any], chosen: Sequence[NDArray[np.int64]]) -> Floats:
    """The metric on each of these choices of rows."""
    if metric.name in detection.IOUS:
        return detection.resampled(rows, np.stack([np.bincount(own, minlength=len(rows)) for own in chosen]))
    return np.array([value(metric, rows[own]) for own in chosen])


def _is_mean(metric: Metric, rows: NDArray[Any]) -> bool:
    return metric.name in ("top1", "top5", "mse") or (metric.name == "agreement" and rows.shape[1] == 1)


def _mismatch(name: str, output: NDArray[Any], targets: NDArray[Any]) -> MetricError:
    return MetricError(
        f"{name}: output of shape {shape_text(output.shape)} and targets of shape "
        f"{shape_text(targets.shape)} do not belong together; choose another metric or file.py:function"
    )


def _without_ones(array: NDArray[Any]) -> NDArray[Any]:
    """Drop the axes of size 1, but never the first: `(n, C, 1, 1)` becomes `(n, C)`."""
    return array.reshape(len(array), *[size for size in array.shape[1:] if size != 1])


def _class_scores(name: str, output: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Bring scores to `(n, C, ...)` and labels to int64 `(n, ...)`; the class axis is 1, else the last."""
    if targets.dtype.kind not in "iub":
        raise MetricError(f"{name}: targets have dtype {targets.dtype}; labels must be integers")
    if output.dtype.kind != "f":
        raise MetricError(f"{name}: the first output has dtype {output.dtype}; scores of classes are needed")
    if _without_ones(targets).ndim == 1:
        output, targets = _without_ones(output), _without_ones(targets)
    if output.ndim != targets.ndim + 1:
        raise _mismatch(name, output, targets)
    if output.shape[2:] != targets.shape[1:]:
        output = np.moveaxis(output, -1, 1)
    if output.shape[2:] != targets.shape[1:] or output.shape[1] < 2:
        raise _mismatch(name, output, targets)
    targets = targets.astype(np.int64)
    judged = targets[targets != IGNORED_LABEL] if targets.ndim > 1 else targets
    if judged.size and not 0 <= judged.min() <= judged.max() < output.shape[1]:
        raise MetricError(
            f"{name}: labels are {judged.min()} to {judged.max()}, the model has {output.shape[1]} classes"
        )
    return output, targets


def _share(right: NDArray[Any], maps: NDArray[Any] | None) -> Floats:
    """Share of right predictions of each example `(n, 1)`; of maps, over the positions not ignored."""
    if maps is None:
        return right.astype(np.float64)[:, None]
    judged = (maps != IGNORED_LABEL).reshape(len(maps), -1)
    right = right.reshape(len(maps), -1) & judged
    return np.asarray(right.sum(1) / np.maximum(judged.sum(1), 1), dtype=np.float64)[:, None]


def _among_five(output: NDArray[Any], targets: NDArray[Any]) -> NDArray[Any]:
    """Whether the label is among the five best classes; of equal scores the lower class comes first."""
    classes = output.shape[1]
    if classes <= 5:
        raise MetricError(f"top5 is 100 for every model of {classes} classes; use top1")
    labels = np.minimum(targets, classes - 1)[:, None]
    own = np.take_along_axis(output, labels, axis=1)
    order = np.arange(classes).reshape(1, -1, *[1] * (output.ndim - 2))
    before = (output > own) | ((output == own) & (order < labels))
    return np.asarray(before.sum(axis=1) < 5)


def _intersections(output: NDArray[Any], targets: NDArray[Any]) -> Floats:
    """Rows `(n, 2C)`: positions where prediction and label are the class, and where either is."""
    count, classes = output.shape[:2]
    predicted = output.argmax(1).reshape(count, -1)
    labels = targets.reshape(count, -1)
    judged = labels != IGNORED_LABEL if targets.ndim > 1 else np.ones(labels.shape, bool)
    rows = np.zeros((count, 2 * classes))
    for row, guess, label, keep in zip(rows, predicted, labels, judged, strict=True):
        guess, label = guess[keep], label[keep]
        both = np.bincount(label[guess == label], minlength=classes)
        row[:classes] = both
        row[classes:] = np.bincount(guess, minlength=classes) + np.bincount(label, minlength=classes) - both
    return rows


def _macro_f1(rows: Floats) -> float:
    predicted, labels = rows.astype(np.int64).T
    classes = int(rows.max()) + 1
    right = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float(100 * np.mean(2 * right[either > 0] / either[either > 0]))


def _pair(name: str, output: NDArray[Any], other: NDArray[Any]) -> tuple[Floats, Floats]:
    """Two arrays of one shape, axes of size 1 aside, as `(n, elements)` float64."""
    if output.ndim == 0 or other.ndim == 0 or len(output) != len(other):
        raise _mismatch(name, output, other)
    if _without_ones(output).shape != _without_ones(other).shape:
        raise _mismatch(name, output, other)
    ours = np.asarray(output, dtype=np.float64).reshape(len(output), -1)
    theirs = np.asarray(other, dtype=np.float64).reshape(len(other), -1)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise MetricError(f"{name}: an output or target is not finite; the error has no value")
    return ours, theirs


def _error(output: NDArray[Any], other: NDArray[Any], name: str = "mse") -> Floats:
    ours, theirs = _pair(name, output, other)
    return np.asarray(np.square(ours - theirs).mean(axis=1, keepdims=True), dtype=np.float64)


def _agreement(output: NDArray[Any], reference: NDArray[Any]) -> Floats:
    if output.shape != reference.shape or output.ndim == 0:
        raise _mismatch("agreement", output, reference)
    flat = _without_ones(output)
    if output.dtype.kind == "f" and flat.ndim == 2:
        if np.isnan(reference).any():
            raise MetricError("agreement: the original's output holds NaN; the original is broken")
        same = flat.argmax(1) == _without_ones(reference).argmax(1)
        return np.asarray(same, dtype=np.float64)[:, None]
    ours, theirs = _pair("agreement", output, reference)
    return np.stack([np.square(ours - theirs).sum(1), np.square(theirs).sum(1)], axis=1)
