"""Mean average precision of boxes, COCO's definition, by pycocotools; and its value on many resamples at once.

An image's row holds what `COCOeval.evaluate` says about it: for every class the scores of its detections, best first,
which of them match a target at each IoU, and the number of targets. Matching looks at one image alone, so rows can be
taken in any number and order, some of them several times. `value` is `COCOeval.accumulate` on them: precision at 101
recalls, the mean over classes that have targets and over the IoUs (0.5 for `map50`, 0.50:0.05:0.95 for `map`), of boxes
of any area, at most 100 detections of a class in an image.

A bootstrap needs it a thousand times. `resampled` counts every image w times instead: with the detections of a class in
order of score, w̃ᵢ the weight of the image that detection i is from and tᵢ whether it matches,

    TPᵢ = Σ_{j≤i} w̃ⱼ tⱼ,  precisionᵢ = TPᵢ / Σ_{j≤i} w̃ⱼ,  recallᵢ = TPᵢ / Σ w · targets

which is what repeated images give, except that equal scores of different detections may come in another order there.
(Lin et al., Microsoft COCO, ECCV 2014, and its detection evaluation, cocodataset.org/#detection-eval.)
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.data_checks import shape_text
from onnxneutrino.data_function import UserFunction
from onnxneutrino.errors import MetricError

RECALLS = np.linspace(0.0, 1.0, 101)
IOUS = {"map50": np.array([0.5]), "map": np.linspace(0.5, 0.95, 10)}
MOST_DETECTIONS = 100
TARGETS, DETECTIONS = "[class, x1, y1, x2, y2]", "[x1, y1, x2, y2, score, class]"
_LARGEST = 1e9  # a coordinate beyond it is none of an image; keeps areas finite


def matches(
    name: str, outputs: Sequence[NDArray[Any]], targets: NDArray[Any], decode: UserFunction | None
) -> NDArray[Any]:
    """Match the detections of a batch of n images with their targets.

    Args:
        name: `map` or `map50`.
        outputs: the model's, first axis n. Without `decode` the first is `(n, K, 6)`, rows
            `[x1, y1, x2, y2, score, class]`; class -1 fills up.
        targets: `(n, m, 5)`, rows `[class, x1, y1, x2, y2]`, class -1 fills up; or n arrays `(m, 5)` as objects.
        decode: from the outputs to n arrays `(k, 6)`.

    Returns:
        Rows `(n, 1)` of objects: for each class what `COCOeval.evaluateImg` returns.

    Raises:
        MetricError: pycocotools is absent, or boxes of another form.
    """
    found, expected = _detections(name, outputs, len(targets), decode), _targets(name, targets)
    evaluation = _matched(found, expected, IOUS[name])
    rows = np.empty((len(targets), 1), dtype=object)
    for image in range(len(targets)):
        of_image = zip(evaluation.params.catIds, evaluation.evalImgs[image :: len(targets)], strict=True)
        rows[image, 0] = {label: own for label, own in of_image if own is not None}
    return rows


def value(name: str, rows: NDArray[Any]) -> float:
    """The library's mean average precision of these rows, 0 to 1.

    Raises:
        MetricError: there is not one target.
    """
    evaluation = _evaluation(len(rows), sorted({label for row in rows[:, 0] for label in row}), IOUS[name])
    evaluation.evalImgs = [row.get(label) for label in evaluation.params.catIds for row in rows[:, 0]]
    evaluation._paramsEval = evaluation.params
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # IoUs × recalls × classes × 1 × 1; -1 for a class without targets
    if not (precision > -1).any():
        raise MetricError(f"{name}: the images have no target boxes, so there is nothing to find; give more images")
    return float(precision[precision > -1].mean())


def resampled(rows: NDArray[Any], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean average precision of resamples that hold image i `weights[b, i]` times.

    Args:
        rows: `(n, 1)` as of `matches`.
        weights: `(B, n)`.

    Returns:
        `(B,)`; NaN for a resample without a target.
    """
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for label in {label for row in rows[:, 0] for label in row}:
        images = [image for image, row in enumerate(rows[:, 0]) if label in row]
        own = [rows[image, 0][label] for image in images]
        targets = weights[:, images] @ np.array([len(each["gtIgnore"]) for each in own])
        scores = np.concatenate([each["dtScores"] for each in own])
        order = np.argsort(-scores, kind="stable")
        matched = np.concatenate([each["dtMatches"] for each in own], axis=1)[:, order] > 0
        detected = np.repeat(images, [len(each["dtScores"]) for each in own])[order]
        there = targets > 0
        total[there] += _precision(matched, weights[there][:, detected], targets[there])
        classes += there
    mean: NDArray[np.float64] = np.divide(total, classes, out=np.full(len(weights), np.nan), where=classes > 0)
    return mean


def _precision(
    matched: NDArray[np.bool_], weights: NDArray[np.int64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Average precision `(B,)` of a class, the mean over IoUs.

    Precision rises at matches only, so that the best one from a recall on stands at a match, and a recall is reached at
    one: nothing else need be looked at.

    Args:
        matched: `(IoUs, D)`, detections in order of score.
        weights: `(B, D)`, of each one's image.
        targets: `(B,)`, above 0.
    """
    seen = np.cumsum(weights, axis=1)
    total = np.zeros(len(weights))
    for right in matched:
        positives = np.cumsum(weights[:, right], axis=1)
        precision = positives / (seen[:, right] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, positives / targets[:, None], side="right")
        total += (np.diff(reached, axis=1, prepend=0) * best).sum(axis=1) / len(RECALLS)
    return total / len(matched)


def _matched(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], ious: NDArray[np.float64]) -> Any:
    """The library's evaluation of a batch after its matching, which prints to standard output."""
    classes = {int(label) for boxes in found for label in boxes[:, 5]} | {
        int(label) for boxes in expected for label in boxes[:, 0]
    }
    evaluation = _evaluation(len(found), sorted(classes), ious)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.cocoGt = _annotations([boxes[:, [1, 2, 3, 4, 0]] for boxes in expected], None)
        evaluation.cocoDt = _annotations([boxes[:, [0, 1, 2, 3, 5]] for boxes in found], [own[:, 4] for own in found])
        evaluation.evaluate()
    return evaluation


def _evaluation(images: int, classes: Sequence[int], ious: NDArray[np.float64]) -> Any:
    """The library's evaluation of this many images, without data.

    Raises:
        MetricError: pycocotools is absent.
    """
    try:
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MetricError(
            "map and map50 need pycocotools, which is not installed; pip install 'onnxneutrino[detection]'"
        ) from error
    evaluation = COCOeval(iouType="bbox")
    parameters = evaluation.params
    parameters.imgIds, parameters.catIds = list(range(images)), list(classes)
    parameters.iouThrs, parameters.recThrs, parameters.maxDets = ious, RECALLS, [MOST_DETECTIONS]
    parameters.areaRng, parameters.areaRngLbl = [[0.0, np.inf]], ["all"]
    return evaluation


def _annotations(images: Sequence[NDArray[Any]], scores: Sequence[NDArray[Any]] | None) -> Any:
    """The library's data set of boxes `[x1, y1, x2, y2, class]` for each image; numbered from 1, 0 means no match."""
    from pycocotools.coco import COCO

    found: list[dict[str, Any]] = []
    for image, boxes in enumerate(images):
        for row, (left, top, right, bottom, label) in enumerate(boxes.tolist()):
            width, height = max(right - left, 0.0), max(bottom - top, 0.0)
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
            if scores is not None:
                found[-1]["score"] = float(scores[image][row])
    known = COCO()
    labels = {own["category_id"] for own in found}
    known.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": label} for label in sorted(labels)],
        "annotations": found,
    }
    known.createIndex()
    return known


def _targets(name: str, targets: NDArray[Any]) -> list[NDArray[np.float64]]:
    """Boxes `(m, 5)` of each image, without those that fill up."""
    found = []
    for own in targets:
        try:
            boxes = np.asarray(own, dtype=np.float64)
        except (TypeError, ValueError):
            boxes = np.empty(0)
        if boxes.size == 0:
            boxes = np.empty((0, 5))
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            shape = shape_text(np.shape(own))
            raise MetricError(f"{name}: targets of an image have shape {shape}; give rows {TARGETS}, class -1 fills up")
        boxes = boxes[boxes[:, 0] != -1]
        wrong = _wrong(boxes[:, 0], boxes[:, 1:])
        if not wrong and (boxes[:, 3:] < boxes[:, 1:3]).any():
            wrong = "a corner x2, y2 before x1, y1"
        if wrong:
            raise MetricError(f"{name}: target boxes of an image hold {wrong}; give rows {TARGETS}, class -1 fills up")
        found.append(boxes)
    return found


def _detections(
    name: str, outputs: Sequence[NDArray[Any]], images: int, decode: UserFunction | None
) -> list[NDArray[np.float64]]:
    """Boxes `(k, 6)` of each image, from the user's function or as the model gives them."""
    if decode is None:
        first = np.asarray(outputs[0])
        if first.ndim != 3 or first.shape[2] != 6 or len(first) != images:
            raise MetricError(
                f"{name}: the first output has shape {shape_text(first.shape)}, not images x boxes x 6; let the loader "
                f"return a function detections(outputs) that gives an array of rows {DETECTIONS} for each image"
            )
        found = [own[own[:, 5] != -1].astype(np.float64) for own in first]
        wrong = next(filter(None, (_wrong(own[:, 5], own[:, :5], infinite=True) for own in found)), "")
        if wrong:
            raise MetricError(
                f"{name}: the first output's rows hold {wrong}, so they are not {DETECTIONS}; let the loader return a "
                "function detections(outputs) that decodes them"
            )
    else:
        found = _decoded(outputs, images, decode)
    for own in found:
        np.clip(own[:, :4], -_LARGEST, _LARGEST, out=own[:, :4])
    return found


def _decoded(outputs: Sequence[NDArray[Any]], images: int, decode: UserFunction) -> list[NDArray[np.float64]]:
    expected = f"return a list of {images} arrays of rows {DETECTIONS}, one for each image"
    result = decode(list(outputs))
    if isinstance(result, np.ndarray):
        result = list(result)
    if not isinstance(result, (list, tuple)):
        raise decode.returned(type(result).__name__, expected)
    if len(result) != images:
        raise decode.returned(f"{len(result)} arrays", expected)
    found = []
    for own in result:
        if not isinstance(own, (np.ndarray, list)):
            raise decode.returned(f"a list with {type(own).__name__}", expected)
        try:
            boxes = np.array(own, dtype=np.float64)
        except (TypeError, ValueError):
            raise decode.returned("an array that is not of numbers", expected) from None
        if boxes.size == 0:
            boxes = np.empty((0, 6))
        if boxes.ndim != 2 or boxes.shape[1] != 6:
            raise decode.returned(f"an array of shape {shape_text(boxes.shape)}", expected)
        wrong = _wrong(boxes[:, 5], boxes[:, :5], infinite=True)
        if wrong:
            raise decode.returned(wrong, expected)
        found.append(boxes)
    return found


def _wrong(classes: NDArray[np.float64], numbers: NDArray[np.float64], infinite: bool = False) -> str:
    """What is wrong with boxes, or nothing: classes are whole numbers from 0, nothing is NaN.

    A network that is cut down may put out anything: `infinite` coordinates are its fault and no mistake in the form.
    """
    if np.isnan(classes).any() or np.isnan(numbers).any():
        return "NaN"
    if not infinite and np.isinf(numbers).any():
        return "infinity"
    odd = (classes < 0) | (classes != np.floor(classes)) | np.isinf(classes)
    return f"class {classes[odd][0]:g}" if odd.any() else ""
