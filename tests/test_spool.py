"""Arrays in temporary files: the same values, no memory of their own, and no files left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxneutrino import weights
from onnxneutrino.graph import with_arrays
from onnxneutrino.runtime import Runner
from onnxneutrino.spool import Spool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def matrix(seed: int, rows: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 160)).astype(np.float32)


def test_arrays_come_back_as_views_of_a_file(folder: Path) -> None:
    spool = Spool(segment=200_000)
    kept = [spool.keep(matrix(seed)) for seed in range(5)]
    for seed, array in enumerate(kept):
        np.testing.assert_array_equal(array, matrix(seed))
        assert weights.is_mapped(array)
        assert array.flags.aligned
    assert len(list(folder.rglob("*"))) == 1 + 3  # two arrays of 82 kB in each file
    transposed = spool.keep(matrix(7).T)
    np.testing.assert_array_equal(transposed, matrix(7).T)
    larger = spool.keep(matrix(8, 1000))
    np.testing.assert_array_equal(larger, matrix(8, 1000))
    np.testing.assert_array_equal(kept[0], matrix(0))


def test_small_and_kept_arrays_stay(folder: Path) -> None:
    spool = Spool()
    small = np.ones(10, np.float32)
    assert spool.keep(small) is small
    own = spool.keep(matrix(0))
    assert spool.keep(own) is own


def test_files_go_with_their_arrays(folder: Path) -> None:
    spool = Spool(segment=100_000)
    first, second = spool.keep(matrix(0)), spool.keep(matrix(1))
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 2
    del first
    gc.collect()
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 1
    del spool
    gc.collect()
    np.testing.assert_array_equal(second, matrix(1))
    del second
    gc.collect()
    assert not list(folder.iterdir())


def test_pages_are_given_back(folder: Path) -> None:
    spool = Spool()
    kept = spool.keep(np.ones((4096, 4096), np.float32))
    assert kept.sum() == 4096**2
    full = resident_file_bytes()
    weights.let_go()
    assert full - resident_file_bytes() > 0.9 * kept.nbytes
    assert kept.sum() == 4096**2


def resident_file_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def test_a_graph_refers_to_the_file(folder: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> n (float[N,128] x) => (float[N,160] y) '
        "<float[128,160] w> { y = MatMul (x, w) }"
    )
    del model.graph.value_info[:]
    model.graph.initializer.append(helper.make_tensor("w", 1, (128, 160), np.zeros(128 * 160)))
    kept = Spool().keep(matrix(3))
    light = with_arrays(model, {"w": kept})
    assert [tensor.name for tensor in weights.light_tensors(light)] == ["w"]
    assert np.shares_memory(weights.array(light.graph.initializer[0]), kept)
    x = matrix(4, 3)[:, :128]
    np.testing.assert_allclose(Runner(light)({"x": x})[0], x @ matrix(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [np.s_[:, :80], np.s_[::2], np.s_[:1]])
def test_parts_that_no_file_holds_are_copied(folder: Path, part: tuple[slice, ...]) -> None:
    value = Spool().keep(matrix(5))[part]
    tensor = weights.initializer(value, "w")
    assert not weights.is_light(tensor)
    np.testing.assert_array_equal(weights.array(tensor), value)


def test_a_part_in_the_middle_of_a_file_is_found(folder: Path) -> None:
    kept = Spool().keep(matrix(6, 400))
    tensor = weights.initializer(kept[100:300], "w")
    assert weights.is_light(tensor)
    np.testing.assert_array_equal(weights.array(tensor), matrix(6, 400)[100:300])
