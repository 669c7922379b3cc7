"""What goes wrong from outside while a run goes on: data that change, vanish or raise midway, clocks, full disks."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hostile_runs import Runs
from onnx import numpy_helper, parser

from onnxneutrino import data_npz
from onnxneutrino.config import DataConfig
from onnxneutrino.data import open_data
from onnxneutrino.data_values import Dataset, InputSpec
from onnxneutrino.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
SPEC = InputSpec("x", (None, 1, 6, 6), np.dtype(np.float32))


def written(folder: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (64, 6, 6), np.uint8)
    np.savez(folder / "data.npz", x_train=images, x_test=images)
    return folder / "data.npz"


def opened(path: Path) -> Dataset:
    return open_data(DataConfig(str(path)), [SPEC], seed=0, classes=None)


def test_small_data_outlive_their_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = opened(path)
    before = next(data.test.batches(64)).inputs["x"]
    path.write_bytes(b"")
    path.unlink()
    np.testing.assert_array_equal(next(data.test.batches(64)).inputs["x"], before)


@pytest.mark.parametrize("change", ["cut short", "replaced", "removed"])
def test_mapped_data_that_change_end_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A page of a map that is no longer in its file would end the process with SIGBUS."""
    monkeypatch.setattr(data_npz, "COPIED_BYTES", 0)
    path = written(tmp_path)
    batches = opened(path).test.batches(16)
    next(batches)
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() if change == "replaced" else b"")
    with pytest.raises(DataError, match=rf"data\.npz: {'is gone' if change == 'removed' else 'has changed'} since"):
        next(batches)


LOADER = """
import numpy as np
class Fails:
    passes = 0
    def __iter__(self):
        Fails.passes += 1
        for index in range(8):
            x = np.random.default_rng(index).standard_normal((8, 1, 6, 6)).astype("float32")
            if Fails.passes > {sound} and index == 5:
                {fault}
            yield x, None
def load():
    return {{"train": Fails(), "test": list(Fails())}}
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [("raise OSError('the disk is gone')", "OSError: the disk is gone"), ("x[0, 0, 0, 0] = np.nan", "NaN or infinity")],
)
def test_loader_that_fails_in_a_later_epoch(runs: Runs, tmp_path: Path, fault: str, words: str) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 1, 6, 6] x) => (float[N, 8] y) '
        "{ f = Flatten (x)\n [a] h = Gemm (f, w1)\n r = Relu (h)\n [b] y = Gemm (r, w2) }"
    )
    for name, shape in {"w1": (36, 64), "w2": (64, 8)}.items():
        weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weights, name))
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "loader.py").write_text(LOADER.format(sound=5, fault=fault), encoding="utf-8")
    given = ["compress", "in.onnx", "out.onnx", "--data", "loader.py:load", "--delta", "5", "--time-limit", "20s"]
    outcome = runs(tmp_path, *given, "--threads", "1", "--quiet")
    assert words in outcome.line
    assert "loader.py" in outcome.line
    assert not (tmp_path / "out.onnx").exists()


def test_nothing_is_decided_by_a_clock_that_can_be_set() -> None:
    """`time.perf_counter` and `time.monotonic` never jump; `time.time` and `datetime.now` do."""
    files = [*(ROOT / "onnxneutrino").glob("*.py"), *(ROOT / "passes").glob("*.py")]
    assert len(files) > 100
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("time", "time"), ("datetime", "now")}, file.name
