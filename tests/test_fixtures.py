"""The embedded example: its files agree with each other and with their README, and the bare command works on it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from onnxneutrino import cost, inspection
from onnxneutrino.config import load_config
from onnxneutrino.graph import arrays, load
from onnxneutrino.report import Report

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODEL = FIXTURES / "digits.onnx"
LARGEST_FILE = 2_000_000
# Section 2 of the design, in its order.
# fmt: off
REPORT_FIELDS = frozenset((
    "original", "stage1", "stage2", "enhancement", "drop", "drop_interval", "drop_select", "drop_report", "delta",
    "objective", "compressed", "layers", "normalization", "candidates", "seconds", "seed", "versions", "warnings",
))
# fmt: on


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "digits.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_digits", FIXTURES / "make_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stated(pattern: str) -> float:
    """The number that the fixtures' README states."""
    found = re.search(pattern, (FIXTURES / "README.md").read_text(encoding="utf-8"))
    assert found is not None, f"fixtures/README.md states no {pattern}"
    return float(found[1].replace(",", ""))


def test_arrays_are_what_the_readme_says(data: dict[str, np.ndarray]) -> None:
    assert set(data) == {"x_train", "y_train", "x_test", "y_test"}
    for half in ("train", "test"):
        images, labels = data[f"x_{half}"], data[f"y_{half}"]
        assert images.shape == (len(labels), 8, 8)
        assert images.dtype == np.uint8
        assert (images.min(), images.max()) == (0, 16)
        assert labels.dtype == np.int64
        assert set(labels.tolist()) == set(range(10))
    assert len(data["x_train"]) + len(data["x_test"]) == 1797
    assert len(data["x_test"]) == stated(r"(\d+) test images")


def test_halves_are_stratified(data: dict[str, np.ndarray]) -> None:
    train, test = (np.bincount(data[f"y_{half}"], minlength=10) for half in ("train", "test"))
    assert np.abs(train - test).max() <= 1


def test_no_image_is_in_both_halves(data: dict[str, np.ndarray]) -> None:
    train = {image.tobytes() for image in data["x_train"]}
    assert not any(image.tobytes() in train for image in data["x_test"])


def test_data_is_that_of_scikit_learn(data: dict[str, np.ndarray], script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; pip install -e '.[fixtures]'")
    remade = script.split_digits()
    assert list(remade) == list(data)
    for name, array in remade.items():
        assert array.dtype == data[name].dtype
        np.testing.assert_array_equal(array, data[name])
    for copy in ("one.npz", "two.npz"):
        script.save_arrays(tmp_path / copy, remade)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_network_is_the_script_s(script: ModuleType) -> None:
    trained, untrained = load(MODEL).model, script.untrained()
    onnx.checker.check_model(trained, full_check=True)
    assert MODEL.stat().st_size < LARGEST_FILE
    assert trained.ir_version == 8
    assert [(entry.domain, entry.version) for entry in trained.opset_import] == [("", 17)]
    assert trained.graph.node == untrained.graph.node
    assert [*trained.graph.input, *trained.graph.output] == [*untrained.graph.input, *untrained.graph.output]
    assert trained.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert cost.params(trained) == stated(r"([\d,]+) parameters")
    before, after = arrays(untrained), arrays(trained)
    assert {name: array.shape for name, array in after.items()} == {k: array.shape for k, array in before.items()}
    assert all(np.isfinite(array).all() for array in after.values())


def test_accuracy_is_what_the_readme_states(data: dict[str, np.ndarray]) -> None:
    found = inspection.evaluate(MODEL, load_config(MODEL, {}))
    accuracy, count = found.value, found.examples
    assert count == len(data["x_test"])
    # One image: another processor may round another way.
    assert accuracy == pytest.approx(stated(r"top-1 ([\d.]+) %"), abs=100 / count + 0.01)


def test_network_is_trained(script: ModuleType, tmp_path: Path) -> None:
    config = load_config(MODEL, {})
    onnx.save(script.untrained(), tmp_path / "untrained.onnx")
    chance = inspection.evaluate(tmp_path / "untrained.onnx", config).value
    accuracy = inspection.evaluate(MODEL, config).value
    assert chance < 40 < 95 < accuracy


def test_bare_command_compresses_it(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in FIXTURES.iterdir() if path.is_file()}
    command = [sys.executable, "-m", "onnxneutrino", "compress", str(MODEL), "out.onnx", "--delta", "1"]
    done = subprocess.run([*command, "--time-limit", "20s"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "out.report.json", "out.report.html"}
    assert {path: path.read_bytes() for path in FIXTURES.iterdir() if path.is_file()} == before

    target = tmp_path / "out.onnx"
    written, original = load(target).model, load(MODEL).model
    onnx.checker.check_model(written, full_check=True)
    assert written.graph.input == original.graph.input
    assert written.graph.output == original.graph.output
    assert written.opset_import == original.opset_import
    assert written.ir_version == original.ir_version
    assert {node.domain for node in written.graph.node} == {""}

    text = (tmp_path / "out.report.json").read_text(encoding="utf-8")
    report = Report.from_json(text)
    assert set(json.loads(text)) >= REPORT_FIELDS
    assert report.compressed
    assert report.stage2 is not None
    assert report.stage2.params == cost.params(written) < cost.params(original) == report.original.params
    assert report.stage2.size_bytes == target.stat().st_size < MODEL.stat().st_size
    assert report.drop is not None
    assert report.drop <= report.delta == 1.0
    assert report.drop_interval is not None
    assert report.drop_interval.low <= report.drop <= report.drop_interval.high
    accuracy = inspection.evaluate(target, load_config(MODEL, {})).value
    assert accuracy == pytest.approx(report.stage2.metric)
    assert accuracy == pytest.approx(report.original.metric - report.drop)
    assert "Stage 2" in done.stdout
