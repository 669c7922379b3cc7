from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxneutrino.errors import MetricError, UsageError
from onnxneutrino.metrics import Metric, chance, drop, resolve, statistics, value

HERE = Path(".")


def scored(name: str, output: Any, targets: Any = None, reference: Any = None) -> float:
    metric = resolve(name, HERE)
    rows = statistics(
        metric,
        [np.asarray(output)],
        None if targets is None else np.asarray(targets),
        None if reference is None else [np.asarray(reference)],
    )
    assert rows.ndim == 2
    return value(metric, rows)


def one_hot(classes: Any, count: int, axis: int = -1) -> NDArray[np.float32]:
    return np.moveaxis(np.eye(count, dtype=np.float32)[np.asarray(classes)], -1, axis)


def test_top1_counts_right_predictions() -> None:
    output = one_hot([0, 1, 2, 2], 3)
    assert scored("top1", output, [0, 1, 2, 0]) == 75.0
    assert scored("top1", output, np.array([[0], [1], [2], [0]])) == 75.0
    assert scored("top1", output[:, :, None, None], [0, 1, 2, 0]) == 75.0


def test_top5_agrees_with_sorting() -> None:
    generator = np.random.default_rng(0)
    output = generator.standard_normal((200, 12)).astype(np.float32)
    targets = generator.integers(0, 12, 200)
    best = np.argsort(-output, axis=1)[:, :5]
    expected = 100 * np.mean([target in row for target, row in zip(targets, best, strict=True)])
    assert scored("top5", output, targets) == pytest.approx(expected)
    assert 20 < expected < 60


def test_a_constant_output_earns_five_classes_of_top5() -> None:
    assert scored("top5", np.zeros((10, 10), np.float32), np.arange(10)) == 50.0


@pytest.mark.parametrize("axis", [1, -1])
def test_top1_of_maps_is_the_mean_over_judged_pixels(axis: int) -> None:
    predicted = np.array([[[0, 1], [2, 2]], [[1, 1], [1, 1]]])
    targets = np.array([[[0, 1], [2, 0]], [[1, 255], [255, 0]]])
    assert scored("top1", one_hot(predicted, 3, axis), targets) == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)


def test_f1_is_the_macro_mean() -> None:
    predicted, targets = [0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 0, 0]
    # class 0: TP 2, FP 1, FN 1; class 1: TP 2, FP 0, FN 1; class 2: TP 0, FP 1; class 3 does not occur.
    expected = 100 * np.mean([4 / 6, 4 / 5, 0.0])
    assert scored("f1", one_hot(predicted, 4), targets) == pytest.approx(expected)


def test_miou_sums_over_the_split_before_it_divides() -> None:
    predicted = np.array([[[0, 0], [1, 1]], [[1, 1], [1, 1]]])
    targets = np.array([[[0, 1], [1, 255]], [[1, 1], [0, 0]]])
    # Class 0: intersections 1 + 0, unions 2 + 2; class 1: 1 + 2 and 2 + 4; class 2 does not occur.
    expected = 100 * np.mean([1 / 4, 3 / 6])
    assert scored("miou", one_hot(predicted, 3, 1), targets) == pytest.approx(expected)
    metric = resolve("miou", HERE)
    output = one_hot(predicted, 3, 1)
    parts = [statistics(metric, [output[i : i + 1]], targets[i : i + 1], None) for i in range(2)]
    assert value(metric, np.concatenate(parts)) == pytest.approx(expected)


def test_mse_takes_targets_or_the_reference() -> None:
    output = np.array([[1.0], [2.0]], np.float32)
    assert scored("mse", output, np.array([0.0, 4.0])) == pytest.approx((1 + 4) / 2)
    assert scored("mse", output, None, output + 2) == pytest.approx(4)
    assert not resolve("mse", HERE).higher_is_better


def test_psnr_takes_the_range_of_the_targets_as_peak() -> None:
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 256, (3, 1, 8, 8)).astype(np.float32)
    targets[0, 0, 0, :2] = 0, 255
    output = targets + generator.standard_normal(targets.shape).astype(np.float32)
    errors = [np.mean((output[i].astype(float) - targets[i]) ** 2) for i in range(3)]
    expected = np.mean([20 * math.log10(255) - 10 * math.log10(error) for error in errors])
    assert scored("psnr", output, targets) == pytest.approx(expected)
    assert scored("psnr", targets, targets) == 100.0


def test_agreement_of_classifiers_and_of_others() -> None:
    reference = one_hot([0, 1, 2, 2], 3)
    assert scored("agreement", one_hot([0, 1, 2, 1], 3), None, reference) == 75.0
    assert scored("agreement", reference, None, reference) == 100.0
    maps = np.random.default_rng(2).standard_normal((4, 2, 5, 5)).astype(np.float32)
    assert scored("agreement", maps * 1.1, None, maps) == pytest.approx(90, abs=1e-3)
    assert scored("agreement", maps * -3, None, maps) == 0.0
    single = np.array([[3.0], [4.0]], np.float32)
    assert scored("agreement", single + np.array([[0], [1]]), None, single) == pytest.approx(100 * (1 - 1 / 5))


def test_the_paired_standard_error_agrees_with_a_bootstrap() -> None:
    generator = np.random.default_rng(3)
    metric = resolve("top1", HERE)
    original = (generator.random((400, 1)) < 0.9).astype(np.float64)
    flipped = generator.random((400, 1)) < 0.08
    candidate = np.where(flipped, 1 - original, original)
    result = drop(metric, original, candidate)
    samples = []
    for _ in range(4000):
        rows = generator.integers(0, 400, 400)
        samples.append(100 * (original[rows].mean() - candidate[rows].mean()))
    assert result.value == pytest.approx(value(metric, original) - value(metric, candidate))
    assert result.standard_error == pytest.approx(np.std(samples), rel=0.05)
    assert result.low == pytest.approx(result.value - 1.96 * result.standard_error, rel=1e-3)
    assert result.high == pytest.approx(result.value + 1.96 * result.standard_error, rel=1e-3)
    # Unpaired, the same two models would be several times less certain.
    unpaired = math.hypot(original.std(), candidate.std()) / math.sqrt(400) * 100
    assert result.standard_error < unpaired * 0.8


def test_a_drop_is_positive_when_worse() -> None:
    better, worse = np.array([[1.0], [1.0], [0.0]]), np.array([[1.0], [0.0], [0.0]])
    assert drop(resolve("top1", HERE), better, worse).value == pytest.approx(100 / 3)
    assert drop(resolve("top1", HERE), worse, better).value == pytest.approx(-100 / 3)
    assert drop(resolve("mse", HERE), worse, better).value == pytest.approx(1 / 3)
    assert drop(resolve("top1", HERE), better, better) == drop(resolve("top1", HERE), worse, worse)
    assert drop(resolve("top1", HERE), better, better).standard_error == 0.0


def test_the_bootstrap_is_paired_and_follows_the_seed() -> None:
    generator = np.random.default_rng(4)
    metric = resolve("f1", HERE)
    targets = generator.integers(0, 4, 300)
    original = np.where(generator.random(300) < 0.85, targets, generator.integers(0, 4, 300))
    candidate = np.where(generator.random(300) < 0.9, original, generator.integers(0, 4, 300))
    rows = [statistics(metric, [one_hot(guess, 4)], targets, None) for guess in (original, candidate)]
    result = drop(metric, rows[0], rows[1], seed=5)
    assert result == drop(metric, rows[0], rows[1], seed=5)
    assert result.standard_error != drop(metric, rows[0], rows[1], seed=6).standard_error
    assert drop(metric, rows[0], rows[0]).standard_error == 0.0
    # With even classes macro F1 is near accuracy, whose paired error is known.
    right = [(guess == targets) * 100.0 for guess in (original, candidate)]
    assert result.standard_error == pytest.approx(np.std(right[0] - right[1]) / math.sqrt(300), rel=0.15)


def test_other_rows_bootstrap_too() -> None:
    generator = np.random.default_rng(6)
    maps = generator.standard_normal((30, 1, 4, 4)).astype(np.float32)
    metric = resolve("agreement", HERE)
    original = statistics(metric, [maps], None, [maps])
    noisy = maps + 0.1 * generator.standard_normal(maps.shape).astype(np.float32)
    result = drop(metric, original, statistics(metric, [noisy], None, [maps]))
    assert result.low < result.value < result.high
    assert result.value == pytest.approx(10, abs=1.5)


def test_chance_is_known_for_top1() -> None:
    assert chance(resolve("top1", HERE), 10) == 10.0
    assert chance(resolve("top1", HERE), np.array([0, 1, 2, 3, 3])) == 25.0
    assert chance(resolve("f1", HERE), 10) is None


def written(folder: Path, text: str) -> Metric:
    (folder / "own.py").write_text(text, encoding="utf-8")
    return resolve("own.py:own", folder)


def test_a_function_sees_every_output_of_the_whole_split(tmp_path: Path) -> None:
    metric = written(
        tmp_path,
        "import numpy as np\n"
        "def own(outputs, targets):\n"
        "    return np.abs(outputs[0] + outputs[1].sum(axis=1) - targets).max()\n"
        "own.higher_is_better = False\n",
    )
    assert not metric.higher_is_better
    first, second, targets = np.arange(5.0), np.ones((5, 2)), np.array([2.0, 3, 4, 5, 0])
    parts = [statistics(metric, [first[s], second[s]], targets[s], None) for s in (slice(0, 3), slice(3, 5))]
    rows = np.concatenate(parts)
    assert value(metric, rows) == 6.0
    better = statistics(metric, [first - 1, second], targets, None)
    assert drop(metric, better, rows).value == pytest.approx(6.0 - 5.0)


def test_a_function_may_have_targets_of_many_shapes(tmp_path: Path) -> None:
    metric = written(tmp_path, "def own(outputs, targets):\n    return sum(len(t) for t in targets)\n")
    targets = np.empty(2, dtype=object)
    targets[:] = [np.zeros((3, 4)), np.zeros((1, 4))]
    assert value(metric, statistics(metric, [np.zeros((2, 2))], targets, None)) == 4.0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "def own(outputs, targets):\n\n    return 1 / 0\n",
            "own.py, line 3: own failed with ZeroDivisionError",
        ),
        ("def own(outputs):\n    return 1.0\n", "own.py, line 1: own failed with TypeError: own() takes 1 positional"),
        ("\ndef own(outputs, targets):\n    return 'high'\n", "own.py, line 2: own returned 'high'; return a finite"),
        ("\ndef own(outputs, targets):\n    return outputs[0][0]\n", "line 2: own returned an array of shape (2,); "),
        ("def own(outputs, targets):\n    return float('nan')\n", "own.py, line 1: own returned nan"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path: Path, text: str, part: str) -> None:
    metric = written(tmp_path, text)
    rows = statistics(metric, [np.zeros((2, 2))], None, None)
    with pytest.raises(MetricError) as caught:
        value(metric, rows)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("declared", ["'no'", "0", "None"])
def test_a_direction_that_is_no_truth_value_is_refused(tmp_path: Path, declared: str) -> None:
    text = f"\ndef own(outputs, targets):\n    return 0.0\nown.higher_is_better = {declared}\n"
    with pytest.raises(MetricError) as caught:
        written(tmp_path, text)
    assert f"own.py, line 2: own.higher_is_better is {declared}; set it to True or False" in str(caught.value)


def test_a_function_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"absent.py: not found"):
        resolve("absent.py:own", tmp_path)
    with pytest.raises(MetricError, match=r"has no function 'own' \(it has other\)"):
        written(tmp_path, "def other():\n    pass\n")
    (tmp_path / "broken.py").write_text("x = 1\ndef own(:\n", encoding="utf-8")
    with pytest.raises(MetricError, match=r"broken.py, line 2"):
        resolve("broken.py:own", tmp_path)
    (tmp_path / "raising.py").write_text("x = 1\n\nraise OSError('two\\nlines')\n", encoding="utf-8")
    with pytest.raises(MetricError, match=r"raising.py, line 3: cannot be imported, OSError: two lines"):
        resolve("raising.py:own", tmp_path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="'accuracy' is not known; known are top1"):
        resolve("accuracy", HERE)


SCORES = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "output", "targets", "part"),
    [
        ("top1", SCORES, None, "needs targets and the data has none; use agreement"),
        ("top1", SCORES + np.float32(np.nan), [0, 1, 2], "output 0 of the model holds NaN"),
        ("top1", SCORES, [0, 1], "output of shape 3x3 and targets of shape 2 do not belong together"),
        ("top1", SCORES[:, :1], [0, 1, 0], "do not belong together"),
        ("top1", SCORES, [[0, 1, 2, 0]] * 3, "do not belong together"),
        ("top1", SCORES, [0.0, 1.0, 2.0], "labels must be integers"),
        ("top1", SCORES.astype(np.int64), [0, 1, 2], "scores of classes are needed"),
        ("top1", SCORES, [0, 1, 3], "labels are 0 to 3, the model has 3 classes"),
        ("top5", SCORES, [0, 1, 2], "use top1"),
        ("f1", np.zeros((1, 3, 2, 2), np.float32), np.zeros((1, 2, 2), np.int64), "use miou"),
        ("mse", SCORES, [0.0, 1.0, 2.0], "do not belong together"),
        ("mse", SCORES, None, "needs the outputs of the original model or targets"),
        ("mse", SCORES + np.float32(np.inf), SCORES, "is not finite"),
        ("psnr", SCORES, None, "psnr needs targets"),
        ("agreement", SCORES, [0, 1, 2], "needs the outputs of the original"),
    ],
)
def test_what_cannot_be_computed_is_refused(name: str, output: Any, targets: Any, part: str) -> None:
    with pytest.raises(MetricError) as caught:
        scored(name, output, targets)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_pair_are_refused() -> None:
    metric = resolve("top1", HERE)
    with pytest.raises(MetricError, match="rows of 3 examples against 2"):
        drop(metric, np.ones((3, 1)), np.ones((2, 1)))
    with pytest.raises(MetricError, match="at least 2 examples"):
        drop(metric, np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(MetricError, match="no examples"):
        value(metric, np.ones((0, 1)))
    with pytest.raises(MetricError, match="all targets are equal"):
        scored("psnr", SCORES, SCORES * 0)
    with pytest.raises(MetricError, match="unequal numbers of examples"):
        statistics(Metric("own", function=metric_function()), [np.ones(2), np.ones(3)], np.ones(2), None)


def metric_function() -> Any:
    return lambda outputs, targets: 0.0
