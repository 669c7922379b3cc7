"""What a user can get wrong: one line that names it, exit code 1 or 2, nothing written and nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

from onnxneutrino.cli import main

NODES = """[conv1] h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
    [act] r = Relu (h)
    [flat] f = Flatten (r)
    [fc] y = Gemm (f, w2, b2)"""
COUNT = 32
NEGATIVE = {
    "cifar10_external_data_missing.onnx": "put that file beside the model",
    "corrupt_1234.onnx": "not an ONNX model",
    "git_lfs_pointer.onnx": "git lfs pull",
    "super_resolution_ir1_no_opset.onnx": "no opset_import",
    "supres_contrib_ops.onnx": "without custom operators",
}


def convnet(nodes: str = NODES, sizes: str = "N, 2, 6, 6", version: int = 17, **changed: Any) -> ModelProto:
    """A Conv and a Gemm, 2,612 parameters, four classes; `changed` replaces weights."""
    generator = np.random.default_rng(0)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {version}]> g (float[{sizes}] x) => (float[N, 4] y) {{ {nodes} }}'
    )
    weights = {
        "w1": generator.normal(0, 0.3, (16, 2, 3, 3)),
        "b1": np.zeros(16),
        "w2": generator.normal(0, 0.1, (576, 4)),
        "b2": np.zeros(4),
    }
    for name, array in {**weights, **changed}.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def spoiled(name: str, shape: tuple[int, ...], value: float) -> dict[str, Any]:
    array = np.zeros(shape)
    array.flat[1] = value
    return {name: array}


def images(shape: tuple[int, ...] = (COUNT, 6, 6, 2)) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


LABELS = np.arange(COUNT) % 4
GOOD: dict[str, Any] = {"x_train": images(), "y_train": LABELS, "x_test": images(), "y_test": LABELS}


class Folder:
    """A working directory with a sound model, sound data and an old output; and the command run in it."""

    def __init__(self, path: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capture = capture
        onnx.save(convnet(), path / "in.onnx")
        np.savez(path / "data.npz", **GOOD)
        (path / "out.onnx").write_bytes(b"the old model")
        (path / "tmp").mkdir()

    def files(self) -> dict[str, bytes | None]:
        found = (file for file in self.path.rglob("*") if file.name != "__pycache__" and file.suffix != ".pyc")
        return {str(file): file.read_bytes() if file.is_file() else None for file in found}

    def refused(self, *arguments: str, code: int = 1, command: str = "compress") -> str:
        """Run the command; the one line on standard error, after checking that it was refused cleanly."""
        given = [*arguments] if command != "compress" or "--trainer" in arguments else [*arguments, "--trainer", "none"]
        given = [command, *given, "--threads", "1", *(["--quiet"] if command == "compress" else [])]
        before = self.files()
        with pytest.raises(SystemExit) as exit_:
            main(given)
        shown = self._capture.readouterr()
        assert exit_.value.code == code, shown.err
        assert shown.out == ""
        assert shown.err.count("\n") == 1, shown.err
        assert shown.err.startswith("onnxneutrino: ")
        assert "internal error" not in shown.err
        assert self.files() == before
        return shown.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Folder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Folder(tmp_path, capfd)


# --- the model ----------------------------------------------------------------------------------------------------


def whole() -> bytes:
    return bytes(convnet().SerializeToString())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"not a model at all", "not an ONNX model"),
        (lambda: b"", "the file is empty"),
        (lambda: whole()[:5000], "truncated; export or download it again"),
        (lambda: b"\0" * 400, "not an ONNX model"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (lambda: convnet(version=6).SerializeToString(), "opset 6 is not supported"),
        (lambda: convnet(version=99).SerializeToString(), "opset 99 is not supported"),
        (lambda: convnet(**spoiled("w1", (16, 2, 3, 3), np.nan)).SerializeToString(), "tensor 'w1' holds NaN"),
        (lambda: convnet(**spoiled("w2", (576, 4), np.inf)).SerializeToString(), "tensor 'w2' holds infinity"),
        (lambda: convnet("[act] r = Relu (x)\n y = Flatten (r)").SerializeToString(), "no layer can be factorized"),
        (lambda: convnet(NODES.replace("Relu", "Wish")).SerializeToString(), "No Op registered for Wish"),
        (lambda: convnet(NODES.replace("Relu (h)", "Relu (q)")).SerializeToString(), "input 'q' of node: name: act"),
        (lambda: convnet(sizes="4, 2, 6, 6").SerializeToString(), "input 'x' has a fixed batch of 4; export it"),
    ],
)
def test_model(folder: Folder, content: Callable[[], bytes], words: str) -> None:
    Path("bad.onnx").write_bytes(content())
    line = folder.refused("bad.onnx", "out.onnx", "--data", "data.npz")
    assert words in line
    assert "bad.onnx" in line


def test_free_sizes_that_no_data_fixes(folder: Folder) -> None:
    Path("free.onnx").write_bytes(convnet(sizes="N, 2, H, W").SerializeToString())
    line = folder.refused("free.onnx", "out.onnx", "--data", "random")
    assert "free.onnx" in line
    assert "fix it with --input-shape x=1x2x?x?" in line


def test_weight_of_a_shape_that_does_not_run(folder: Folder) -> None:
    onnx.save(convnet(w2=np.zeros((99, 4))), "bad.onnx")
    assert "Name:'fc'" in folder.refused("bad.onnx", "out.onnx", "--data", "data.npz")


@pytest.mark.parametrize("command", ["compress", "analyze", "profile", "evaluate"])
def test_model_is_missing_or_a_folder(folder: Folder, command: str) -> None:
    Path("models").mkdir()
    target = ["out.onnx"] if command == "compress" else []
    assert "none.onnx: no such file" in folder.refused("none.onnx", *target, command=command)
    assert "models: is a folder" in folder.refused("models", *target, command=command)


def test_model_that_may_not_be_read(folder: Folder) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    Path("in.onnx").chmod(0)
    with pytest.raises(SystemExit) as exit_:
        main(["compress", "in.onnx", "out.onnx"])
    Path("in.onnx").chmod(0o644)
    assert exit_.value.code == 1
    assert Path("out.onnx").read_bytes() == b"the old model"


def test_external_data(folder: Folder) -> None:
    onnx.save(convnet(), "ext.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    content = Path("weights.bin").read_bytes()
    Path("weights.bin").unlink()
    line = folder.refused("ext.onnx", "out.onnx", "--data", "data.npz")
    assert "ext.onnx: its external data 'weights.bin' (tensor 'w1') is missing" in line
    Path("weights.bin").write_bytes(content[:50])
    assert "'weights.bin' ends before 'w1'" in folder.refused("ext.onnx", "out.onnx", "--data", "data.npz")


@pytest.mark.parametrize(("file", "words"), NEGATIVE.items())
def test_damaged_files_seen_in_the_wild(folder: Folder, shared: Path, file: str, words: str) -> None:
    line = folder.refused(str(shared / "models" / "negative" / file), "out.onnx", "--data", "random")
    assert file in line
    assert words in line


# --- the data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x_train": images((COUNT, 5, 6, 2))}, "x_train: examples of shape 5x6x2"),
        ({"x_test": images((COUNT, 6, 6, 3))}, "x_test: examples of shape 6x6x3"),
        ({"x_train": images((COUNT, 7))}, "x_train: examples of shape 7"),
        ({"x_train": np.array(["a"] * COUNT)}, "x_train: dtype <U1 does not fit the input 'x'"),
        ({"x_train": images().astype(complex)}, "x_train: dtype complex128 does not fit"),
        ({"x_train": np.array([{}] * COUNT)}, "array 'x_train' is pickled"),
        ({"x_test": np.where(images() > 2, np.nan, images())}, "x_test: NaN or infinity in example"),
        ({"x_train": images()[:0], "y_train": LABELS[:0]}, "x_train: has no examples"),
        ({"x_test": images()[:0], "y_test": LABELS[:0]}, "x_test: has no examples"),
        ({"x_test": images()[:1], "y_test": LABELS[:1]}, "data.npz: the test split has 1 example"),
        ({"x_test": None}, "has no array 'x_test'"),
        ({"y_test": None}, "the test split has no targets for top1"),
        ({"y_train": LABELS + 1}, "y_train: label 4 at index 3 is out of range"),
        ({"y_test": LABELS - 1}, "y_test: label -1 at index 0 is out of range"),
        ({"y_train": LABELS.astype(np.float32)}, "labels have dtype float32"),
        ({"y_train": np.eye(4, dtype=int)[LABELS]}, "labels are one-hot"),
        ({"y_train": LABELS[1:]}, "x_train has 32 examples, y_train 31 entries"),
    ],
)
def test_arrays(folder: Folder, changed: dict[str, Any], words: str) -> None:
    np.savez("data.npz", **{name: array for name, array in {**GOOD, **changed}.items() if array is not None})
    line = folder.refused("in.onnx", "out.onnx", "--data", "data.npz")
    assert "data.npz" in line
    assert words in line


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.npz", "none.npz: not found"),
        ("", "no data is given; describe it in the TOML file"),
        ("junk.npz", "is not an .npz file"),
        ("tmp", "tmp: has no folder 'train'"),
        ("loader.py:load", "loader.py: not found"),
    ],
)
def test_data_path(folder: Folder, path: str, words: str) -> None:
    Path("junk.npz").write_bytes(Path("data.npz").read_bytes()[:3000])
    assert words in folder.refused("in.onnx", "out.onnx", "--data", path)


def test_no_data_at_all(folder: Folder) -> None:
    assert "no data is given" in folder.refused("in.onnx", "out.onnx")
    assert "no data is given" in folder.refused("in.onnx", command="evaluate")


def test_original_at_chance_level_names_the_suspects(folder: Folder) -> None:
    labels = np.zeros(COUNT, int)
    np.savez("data.npz", **{**GOOD, "y_test": labels, "x_test": np.zeros((COUNT, 6, 6, 2))})
    onnx.save(convnet(b2=np.array([-1, 0, 1, 0])), "in.onnx")
    line = folder.refused("in.onnx", "out.onnx", "--data", "data.npz", "--scale", "3")
    assert "in.onnx: top1 on the test split is 0.00, chance level is 25.00" in line
    assert "layout (NCHW), scale (3), mean and std" in line


LOADER = """
import numpy as np
import sys
def batch(shape=(2, 6, 6), count=16):
    return np.ones((count, *shape), "float32"), np.arange(count) % 4
class Broken:
    def __iter__(self):
        yield batch()
        raise RuntimeError("the disk is gone")
def load():
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    raise ValueError('no\\nluck')", "line 11: load failed with ValueError: no luck"),
        ("    sys.exit(0)", "load failed with SystemExit: 0"),
        ("    return {'train': (batch() for _ in 'ab'), 'test': [batch()]}", "train is a generator"),
        ("    return None", "load returned NoneType"),
        ("    return {'train': [batch()]}", "returned no 'test'"),
        ("    return {'train': [], 'test': [batch()]}", "train has no batches"),
        ("    return {'train': [batch((6, 6, 2))], 'test': [batch()]}", "transposed to NCHW it would fit"),
        ("    return {'train': [({'q': batch()[0]}, None)], 'test': [batch()]}", "inputs are q; the model has x"),
        ("    return {'train': Broken(), 'test': [batch()]}", "RuntimeError: the disk is gone"),
        ("    return (", "line 11: "),
        ("    pass\nimport nothing_of_this_name", "cannot be imported, ModuleNotFoundError"),
        ("    pass\ndel load", "has no function 'load'"),
    ],
)
def test_loader(folder: Folder, body: str, words: str) -> None:
    Path("loader.py").write_text(LOADER + body + "\n", encoding="utf-8")
    line = folder.refused("in.onnx", "out.onnx", "--data", "loader.py:load")
    assert "loader.py" in line
    assert words in line


# --- the metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("top7", 2, "metric 'top7' is not known; known are top1"),
        ("map50", 1, "the first output has shape 32x4, not images x boxes x 6; let the loader return a function"),
        ("top5", 1, "top5 is 100 for every model of 4 classes"),
        ("psnr", 1, "do not belong together"),
        ("none.py:f", 1, "none.py: not found"),
        ("metric.py:none", 1, "has no function 'none'"),
        ("metric.py:raises", 1, "line 3: raises failed with KeyError: 'k'"),
        ("metric.py:nan", 1, "nan returned nan; return a finite number"),
        ("metric.py:leaves", 1, "leaves failed with SystemExit"),
    ],
)
def test_metric(folder: Folder, name: str, code: int, words: str) -> None:
    Path("metric.py").write_text(
        "import sys\ndef raises(outputs, targets):\n    raise KeyError('k')\n"
        "def nan(outputs, targets):\n    return float('nan')\ndef leaves(outputs, targets):\n    sys.exit()\n",
        encoding="utf-8",
    )
    assert words in folder.refused("in.onnx", "out.onnx", "--data", "data.npz", "--metric", name, code=code)


def test_top1_without_labels(folder: Folder) -> None:
    np.savez("data.npz", x_train=images(), x_test=images())
    line = folder.refused("in.onnx", "out.onnx", "--data", "data.npz", "--metric", "top1")
    assert "data.npz: the test split has no targets for top1; add y_test, or use --metric agreement" in line


# --- the output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("none/out.onnx", "the folder none does not exist"),
        ("tmp", "tmp: is a folder; give the name of a file in it"),
        ("", "is a folder"),
        ("in.onnx", "in.onnx: is the input itself"),
        ("data.npz/out.onnx", "data.npz is not a folder"),
        ("sub/out.onnx", "out.report.json: is a folder"),
    ],
)
def test_output(folder: Folder, target: str, words: str) -> None:
    Path("sub/out.report.json").mkdir(parents=True)
    assert words in folder.refused("in.onnx", target, "--data", "data.npz")


def test_output_that_is_a_pipe_stays_one(folder: Folder) -> None:
    os.mkfifo("pipe")
    line = folder.refused("in.onnx", "pipe", "--data", "data.npz")
    assert "pipe: is a device or pipe" in line
    assert Path("pipe").is_fifo()


def test_read_only_folder(folder: Folder) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    Path("tmp").chmod(0o500)
    assert "tmp is not writable" in folder.refused("in.onnx", "tmp/out.onnx", "--data", "data.npz")


def test_json_file_is_checked_before_the_work(folder: Folder) -> None:
    for command, target in (("compress", ["out.onnx"]), ("evaluate", []), ("analyze", []), ("profile", [])):
        line = folder.refused("in.onnx", *target, "--data", "data.npz", "--json", "none/a.json", command=command)
        assert "none/a.json: the folder none does not exist" in line


@pytest.mark.parametrize("limit", [2000, 4500])
def test_full_disk(folder: Folder, limit: int) -> None:
    """At 2000 bytes neither model nor report fits; at 4500 the model does and the report does not."""
    np.savez("data.npz", x_train=images(), x_test=images())
    before = folder.files()
    command = [sys.executable, "-m", "onnxneutrino", "compress", "in.onnx", "out.onnx", "--data", "data.npz"]
    done = subprocess.run(
        [*command, "--delta", "70", "--trainer", "none", "--quiet", "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("onnxneutrino: out.")
    assert "cannot be written: File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert folder.files() == before


# --- the network ----------------------------------------------------------------------------------------------------


def test_models_to_compare_must_have_the_same_inputs(folder: Folder) -> None:
    onnx.save(convnet(sizes="N, 2, 6, 7", w2=np.zeros((672, 4))), "other.onnx")
    line = folder.refused("in.onnx", "--compare", "other.onnx", command="profile")
    assert "other.onnx: its inputs differ from those of in.onnx" in line


def test_debug_shows_the_traceback(folder: Folder) -> None:
    with pytest.raises(Exception, match=r"none\.onnx: no such file"):
        main(["evaluate", "none.onnx", "--debug"])
