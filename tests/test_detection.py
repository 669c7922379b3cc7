"""Mean average precision: equal to the library's own evaluation, alone and resampled."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from onnxneutrino import detection, prepare
from onnxneutrino.config import Config
from onnxneutrino.data_function import UserFunction
from onnxneutrino.errors import MetricError
from onnxneutrino.graph import TensorType
from onnxneutrino.losses import Loss
from onnxneutrino.metrics import drop, resolve, statistics, value

HERE = Path(".")
Boxes = NDArray[np.float64]


def drawn(
    images: int, classes: int, seed: int, most: int = 6, tied: bool = False, missed: float = 0.2
) -> tuple[list[Boxes], list[Boxes]]:
    """Detections `(k, 6)` and targets `(m, 5)`; some images have none of one or the other."""
    generator = np.random.default_rng(seed)
    found, expected = [], []
    for _ in range(images):
        count = int(generator.integers(0, most + 1))
        corner, size = generator.uniform(0, 300, (count, 2)), generator.uniform(40, 120, (count, 2))
        label = generator.integers(0, classes, (count, 1)).astype(float)
        expected.append(np.hstack([label, corner, corner + size]))
        kept = generator.random(count) > missed
        moved = np.hstack([corner, corner + size]) + generator.normal(0, 6, (count, 4))
        wrong = np.where(generator.random((count, 1)) < 0.15, generator.integers(0, classes, (count, 1)), label)
        own = np.hstack([moved, np.zeros((count, 1)), wrong])[kept]
        more = int(generator.integers(0, most)) if generator.random() < 0.8 else 0
        corner = generator.uniform(0, 300, (more, 2))
        stray = np.hstack([corner, corner + 50, np.zeros((more, 1)), generator.integers(0, classes, (more, 1))])
        own = np.vstack([own, stray]) if generator.random() < 0.9 else own[:0]
        own[:, 4] = generator.random(len(own))
        if tied:
            own[:, 4] = np.round(own[:, 4], 1)
        found.append(own)
    return found, expected


def library(found: list[Boxes], expected: list[Boxes], name: str) -> float:
    """The value from files as the library takes them, by its own summary."""
    truth: list[dict[str, Any]] = []
    for image, boxes in enumerate(expected):
        for label, left, top, right, bottom in boxes:
            width, height = right - left, bottom - top
            own = {"id": len(truth) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0}
            truth.append({**own, "bbox": [left, top, width, height], "area": width * height})
    results = [
        {"image_id": image, "category_id": int(own[5]), "bbox": [*own[:2], *(own[2:4] - own[:2])], "score": own[4]}
        for image, boxes in enumerate(found)
        for own in boxes
    ]
    classes = {int(label) for boxes in expected for label in boxes[:, 0]} | {int(own["category_id"]) for own in results}
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image} for image in range(len(expected))],
            "categories": [{"id": label} for label in sorted(classes)],
            "annotations": truth,
            "info": {},
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1 if name == "map50" else 0])


def padded(boxes: list[Boxes], width: int) -> Boxes:
    """`(n, m, width)`, filled up with class -1: the first column of targets, the last of detections."""
    most = max(len(own) for own in boxes)
    return np.stack([np.vstack([own, np.full((most - len(own), width), -1.0)]) for own in boxes])


def rows_of(found: list[Boxes], expected: list[Boxes], name: str) -> NDArray[Any]:
    return statistics(resolve(name, HERE), [padded(found, 6)], padded(expected, 5), None)


@pytest.mark.parametrize("name", ["map50", "map"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_librarys_value(name: str, tied: bool) -> None:
    found, expected = drawn(40, 5, 1, tied=tied)
    assert any(not len(own) for own in found)
    assert any(not len(own) for own in expected)
    rows = rows_of(found, expected, name)
    assert rows.shape == (40, 1)
    wanted = library(found, expected, name)
    assert 0.1 < wanted < 0.9
    assert value(resolve(name, HERE), rows) == pytest.approx(wanted, abs=1e-12)
    once = detection.resampled(rows, np.ones((1, 40), np.int64))
    assert once[0] == pytest.approx(wanted, abs=1e-9)
    parts = [rows_of(found[s], expected[s], name) for s in (slice(0, 13), slice(13, 40))]
    assert value(resolve(name, HERE), np.concatenate(parts)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", ["map50", "map"])
def test_a_resample_is_the_value_of_the_repeated_images(name: str) -> None:
    found, expected = drawn(25, 4, 2)  # no two scores alike: their order is not settled
    rows = rows_of(found, expected, name)
    generator = np.random.default_rng(3)
    chosen = [np.sort(generator.integers(0, 25, 25)) for _ in range(8)]
    weights = np.stack([np.bincount(own, minlength=25) for own in chosen])
    for own, resampled in zip(chosen, detection.resampled(rows, weights), strict=True):
        wanted = library([found[index] for index in own], [expected[index] for index in own], name)
        assert resampled == pytest.approx(wanted, abs=1e-9)
        assert value(resolve(name, HERE), rows[own]) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_is_never_found_and_one_that_is_nowhere() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    expected = [np.array([[0, *box]]), np.array([[7, *box]])]
    found = [np.array([[*box, 0.9, 0]]), np.array([[*box, 0.8, 3]])]
    rows = rows_of(found, expected, "map")
    assert value(resolve("map", HERE), rows) == pytest.approx(
        0.5
    )  # class 0 is found, class 7 is not, class 3 does not occur
    np.testing.assert_allclose(detection.resampled(rows, np.array([[2, 0], [0, 2], [1, 1]])), [1.0, 0.0, 0.5])
    none = rows_of([found[1]] * 2, [np.empty((0, 5))] * 2, "map50")
    assert np.isnan(detection.resampled(none, np.ones((1, 2), np.int64))).all()
    with pytest.raises(MetricError, match="no target boxes"):
        value(resolve("map50", HERE), none)


def test_a_drop_is_paired_and_quick() -> None:
    """64 images of 80 classes as a detector gives them: many boxes of low score."""
    found, expected = drawn(64, 80, 5, most=14)
    generator = np.random.default_rng(6)
    for number, own in enumerate(found):
        stray = np.hstack([generator.uniform(0, 300, (90, 2)), generator.uniform(300, 400, (90, 2))])
        tail = np.hstack([stray, generator.uniform(0, 0.2, (90, 1)), generator.integers(0, 80, (90, 1))])
        found[number] = np.vstack([own, tail])
    worse = [own[generator.random(len(own)) > 0.05] for own in found]
    metric = resolve("map", HERE)
    rows = [rows_of(own, expected, "map") for own in (found, worse)]
    start = time.perf_counter()
    result = drop(metric, *rows)
    assert time.perf_counter() - start < 10
    assert result.value == pytest.approx(value(metric, rows[0]) - value(metric, rows[1]))
    assert 0 < result.value < 0.1
    assert 0 < result.standard_error < 0.05
    assert drop(metric, rows[0], rows[0]).standard_error == 0.0


def decoder(folder: Path, body: str) -> UserFunction:
    path = folder / "own.py"
    path.write_text(f"import numpy as np\n\ndef detections(outputs):\n    {body}\n", encoding="utf-8")
    space: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), space)
    return UserFunction(path, "detections", space["detections"], MetricError)


def test_the_loaders_function_gives_the_boxes(tmp_path: Path) -> None:
    found, expected = drawn(10, 3, 7)
    ragged = np.empty(10, dtype=object)
    ragged[:] = expected
    outputs = [padded(found, 6)[:, :, ::-1]]
    decode = decoder(tmp_path, "return [own[own[:, 0] >= 0][:, ::-1] for own in outputs[0]]")
    rows = detection.matches("map50", outputs, ragged, decode)
    assert detection.value("map50", rows) == pytest.approx(library(found, expected, "map50"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "own.py, line 4: detections failed with ZeroDivisionError"),
        ("return 5", "own.py, line 3: detections returned int; return a list of 2 arrays of rows [x1, y1, x2, y2, "),
        ("return [np.ones((1, 6))]", "own.py, line 3: detections returned 1 arrays; return a list of 2 arrays"),
        ("return [np.ones((1, 5))] * 2", "own.py, line 3: detections returned an array of shape 1x5; return"),
        ("return [None] * 2", "own.py, line 3: detections returned a list with NoneType; return"),
        ("return [[['a'] * 6]] * 2", "own.py, line 3: detections returned an array that is not of numbers"),
        ("return [np.full((1, 6), np.nan)] * 2", "own.py, line 3: detections returned NaN; return"),
        ("return [np.full((1, 6), 0.5)] * 2", "own.py, line 3: detections returned class 0.5; return"),
    ],
)
def test_what_the_loaders_function_does_wrong_is_named(tmp_path: Path, body: str, words: str) -> None:
    decode = decoder(tmp_path, body)
    with pytest.raises(MetricError) as caught:
        detection.matches("map50", [np.zeros((2, 3))], np.full((2, 1, 5), -1.0), decode)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


BOX = [[0.0, 0, 0, 9, 9]]


@pytest.mark.parametrize(
    ("output", "targets", "words"),
    [
        (np.zeros((1, 4, 85)), [BOX], "first output has shape 1x4x85, not images x boxes x 6; let the loader return"),
        (np.full((1, 2, 6), 0.5), [BOX], "hold class 0.5, so they are not [x1, y1, x2, y2, score, class]; let"),
        (np.zeros((1, 2, 6)), [[0.0, 1.0]], "targets of an image have shape 2; give rows [class, x1, y1, x2, y2]"),
        (np.zeros((1, 2, 6)), [[[0.0, 9, 0, 3, 9]]], "hold a corner x2, y2 before x1, y1; give rows"),
        (np.zeros((1, 2, 6)), [[[0.3, 0, 0, 9, 9]]], "hold class 0.3; give rows"),
        (np.zeros((1, 2, 6)), [[[0, 0, 0, np.nan, 9]]], "target boxes of an image hold NaN"),
    ],
)
def test_boxes_of_another_form_are_refused(output: Any, targets: Any, words: str) -> None:
    with pytest.raises(MetricError) as caught:
        statistics(resolve("map50", HERE), [output], np.asarray(targets), None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_was_ruined_puts_out_infinite_and_turned_boxes() -> None:
    """They match nothing, and the run goes on."""
    wild = np.array([[[-np.inf, 0, np.inf, 9, 0.9, 0], [9, 9, 0, 0, 0.8, 0], [0, 0, 9, 9, 0.7, 0]]])
    rows = statistics(resolve("map50", HERE), [wild], np.array([BOX]), None)
    assert value(resolve("map50", HERE), rows) == pytest.approx(1 / 3)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(MetricError, match=r"not installed; pip install 'onnxneutrino\[detection\]'"):
        statistics(resolve("map50", HERE), [np.zeros((1, 1, 6))], np.array([BOX]), None)


HEADS = """
<ir_version: 8, opset_import: ["": 17]>
detector (float[batch, 3, 8, 8] images) => (float[batch, cells, 6] rows, float[batch, 2, 8, 8] plain) {
    boxes = Conv(images, w4)
    raw = Conv(images, w2)
    scores = Sigmoid(raw)
    both = Concat<axis = 1>(boxes, scores)
    flat = Flatten<axis = 2>(both)
    rows = Transpose<perm = [0, 2, 1]>(flat)
    plain = Relu(raw)
}"""


def test_boxes_and_scores_are_learned_apart() -> None:
    """Of one squared error over both the boxes would have nearly all, for their unit is another."""
    model = onnx.parser.parse_model(HEADS)
    shapes = {"boxes": (1, 4, 8, 8), "scores": (1, 2, 8, 8), "rows": (1, 64, 6), "plain": (1, 2, 8, 8)}
    types = {name: TensorType(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    config = Config(metric="map50")
    assert prepare.choose_loss(model, types, config) == Loss("values", ("boxes", "scores", "plain"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 4, 8, 8), np.float32), "boxes"))
    del model.graph.node[0]  # a constant cannot be learned
    assert prepare.choose_loss(model, types, config) == Loss("values", ("rows", "plain"))
