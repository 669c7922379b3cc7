"""Wrong options and TOML files: one line that says which, exit code 1 or 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxneutrino.cli import main

Refused = Callable[..., str]
COUNT = 8


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Compress a sound model with these options; the one line on standard error, after checking that nothing is new."""
    monkeypatch.chdir(tmp_path)
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 6, 6] x) => (float[N, 16] y) {
        f = Flatten (x)
        [fc] y = MatMul (f, w) }"""
    )
    weight = np.random.default_rng(0).standard_normal((72, 16)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, "in.onnx")
    images = np.zeros((COUNT, 6, 6, 2), np.float32)
    np.savez("data.npz", x_train=images, x_test=images, y_train=np.arange(COUNT), y_test=np.arange(COUNT))

    def run(code: int, *options: str) -> str:
        before = set(tmp_path.iterdir())
        with pytest.raises(SystemExit) as exit_:
            main(["compress", "in.onnx", "out.onnx", "--quiet", "--trainer", "none", "--threads", "1", *options])
        shown = capfd.readouterr()
        assert exit_.value.code == code, shown.err
        assert shown.out == ""
        assert shown.err.startswith("onnxneutrino: ")
        assert shown.err.count("\n") == 1, shown.err
        assert set(tmp_path.iterdir()) == before
        return shown.err

    return run


DATA = '[data]\npath = "data.npz"\n'


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[[[ no = ", 2, "cannot be read as TOML"),
        (DATA + "shuffle = 1", 2, "unknown key 'shuffle' in [data]; known are path"),
        (DATA + "[training]\na = 1", 2, "unknown entry 'training'"),
        (DATA + "[train]\na = 1", 2, "unknown key 'a' in [train]; known are loss, optimizer"),
        (DATA + "[train]\noptimizer = 'sgd'", 2, "optimizer sgd needs a learning-rate"),
        (DATA + "[train]\nweight-average = 1.0", 2, "weight-average must be from 0 to below 1"),
        (DATA + "[train]\nloss = 'loss.txt'", 2, "loss must be file.py:function or an .onnx file"),
        (DATA + "[train]\nbefore = 'log'", 2, "before must be file.py:function"),
        (DATA + "[metric]\nkind = 'top1'", 2, "unknown key 'kind' in [metric]"),
        (DATA + "scale = 'a'", 2, "scale must be a number"),
        (DATA + "std = [0, 1]", 2, "std must be positive"),
        (DATA + "layout = 'CHWN'", 2, "layout must be one of NCHW, NHWC"),
        (DATA + "[compress]\ndelta = -1", 2, "delta must not be negative"),
        (DATA + "[compress]\ntime-limit = '5x'", 2, "time-limit must be a duration such as 90s, 15m or 2h, got '5x'"),
        ("[data]\npath = 3", 2, "path must be a string"),
    ],
)
def test_toml(refused: Refused, text: str, code: int, words: str) -> None:
    Path("in.toml").write_text(text, encoding="utf-8")
    line = refused(code)
    assert "in.toml: " in line
    assert words in line


@pytest.mark.parametrize(
    ("option", "value", "code", "words"),
    [
        ("--delta", "-1", 2, "delta must not be negative"),
        ("--delta", "nan", 2, "delta must be a number"),
        ("--time-limit", "0", 2, "time-limit must be positive"),
        ("--confidence", "2", 2, "confidence must be from 0.5"),
        ("--validation", "x", 2, "must be a share such as 0.1, or file"),
        ("--validation", "file", 1, "there is no x_val"),
        ("--scale", "0", 2, "scale must not be zero"),
        ("--std", "0,1", 2, "std must be positive"),
        ("--mean", "1,2,3", 1, "mean has 3 values for 2 channels"),
        ("--input-shape", "q=1x2", 1, "has no input 'q'; its inputs are x"),
        (
            "--input-shape",
            "x=1x2",
            1,
            "in.onnx: input 'x' is declared [N, 2, 6, 6], which --input-shape 1x2 contradicts",
        ),
        ("--input-shape", "x=1x2x6x9", 1, "contradicts"),
        ("--exclude", "*", 1, "no layer can be factorized: excluded by --exclude '*'"),
        ("--only", "none", 1, "no layer can be factorized: not matched by --only"),
    ],
)
def test_option(refused: Refused, option: str, value: str, code: int, words: str) -> None:
    assert words in refused(code, "--data", "data.npz", option, value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--time-limit", "5x"], "'5x' is not a duration; write 90s, 15m or 2h"),
        (["--stage", "3"], "3 is not in the range 1<=x<=2"),
        (["--input-shape", "junk"], "'junk' is not NAME=1x3x640x640"),
        (["--input-shape", "x=0x2x6x6"], "is not NAME=1x3x640x640"),
        (["--objective", "speed"], "'speed' is not one of"),
        (["--threads", "0"], "0 is not in the range"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--mean", "a"], "'a' is not a list of numbers"),
        (["--delta", "little"], "'little' is not a valid float"),
        (["--none"], "No such option"),
        (["third.onnx"], "unexpected extra argument"),
    ],
)
def test_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["compress", "in.onnx", "out.onnx", *arguments])
    shown = capfd.readouterr()
    assert exit_.value.code == 2
    assert shown.err.startswith("Usage: ")
    assert words in " ".join(shown.err.split())
    assert not list(tmp_path.iterdir())
