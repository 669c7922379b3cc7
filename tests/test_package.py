"""What is shipped: type information, the public names, one result for a path and a model, and shell completion."""

from __future__ import annotations

import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from models_drawn import drawn

import onnxneutrino
from onnxneutrino import errors
from onnxneutrino.cli import main
from onnxneutrino.config import OBJECTIVES
from onnxneutrino.runtime import Runner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VARIABLE = "_ONNXNEUTRINO_COMPLETE"
NETWORK = """g (float[N, 1, 8, 8] x) => (float[N, 4] y)
    <float[12, 1, 3, 3] w1, float[12, 12, 3, 3] w2, float[432, 4] w3> {
    [c1] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
    r = Relu (a)
    [c2] b = Conv <kernel_shape = [3, 3]> (r, w2)
    s = Relu (b)
    f = Flatten (s)
    [f1] y = MatMul (f, w3) }"""


def test_type_information_is_shipped() -> None:
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["onnxneutrino"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert importlib.resources.files("onnxneutrino").joinpath("py.typed").is_file()


def test_public_names_are_those_that_are_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\bonnxneutrino\.(\w+)\(", readme))
    tree = set(re.findall(r"\w+Error\b", str(errors.__doc__)))
    assert set(onnxneutrino.__all__) == used | tree


def test_a_path_and_a_model_give_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = drawn(NETWORK, scaled=True)
    inputs = np.random.default_rng(1).standard_normal((128, 1, 8, 8)).astype(np.float32)
    labels = Runner(model, threads=1)({"x": inputs})[0].argmax(1)
    np.savez("data.npz", x_train=inputs[:64], y_train=labels[:64], x_test=inputs[64:], y_test=labels[64:])
    onnx.save(model, "in.onnx")

    made = []
    for given in (model, "in.onnx"):
        result = onnxneutrino.compress(given, data="data.npz", delta=20, trainer="none", threads=1)
        assert result.model is not None
        assert result.report.compressed
        made.append(result.model.SerializeToString(deterministic=True))
    assert made[0] == made[1]


def completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, ...]]:
    """What the shell is offered for the last of `words`: pairs of kind and text."""
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    offered = answered("bash_complete", monkeypatch, capsys)
    return [tuple(line.split(",", 1)) for line in offered.splitlines()]


def answered(instruction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the installed command prints in place of its work, for an instruction in its completion variable."""
    [program] = PROJECT["project"]["scripts"]
    monkeypatch.setenv(VARIABLE, instruction)
    with pytest.raises(SystemExit) as ended:
        main.main(args=[], prog_name=program)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("onnxneutrino ", ["analyze", "compare", "compress", "evaluate", "profile", "zoo"]),
        ("onnxneutrino zoo ", ["fetch", "list", "train"]),
        ("onnxneutrino co", ["compare", "compress"]),
        ("onnxneutrino compress --max", ["--max-params", "--max-macs", "--max-size", "--max-memory", "--max-latency"]),
        ("onnxneutrino compress --objective ", list(OBJECTIVES)),
        ("onnxneutrino evaluate in.onnx --layout NH", ["NHWC"]),
    ],
)
def test_completion(
    words: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(words, monkeypatch, capsys) == [("plain", text) for text in offered]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_completion_has_every_option(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offered = {text for _, text in completed(f"onnxneutrino {name} --", monkeypatch, capsys)}
    options = [own for own in main.commands[name].params if isinstance(own, click.Option)]
    assert offered == {text for own in options for text in (*own.opts, *own.secondary_opts)} | {"--help"}


def test_completion_of_a_model_is_left_to_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed("onnxneutrino compress in", monkeypatch, capsys) == [("file", "in")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_to_source(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version, and there is no bash here")
    text = answered(f"{shell}_source", monkeypatch, capsys)
    assert f"{VARIABLE}={shell}_complete" in text
    executable = shutil.which(shell)
    if executable is not None:
        subprocess.run([executable, "-n"], input=text, text=True, check=True)


def test_bash_takes_the_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    text = answered("bash_source", monkeypatch, capsys) + "\ncomplete -p onnxneutrino\n"
    done = subprocess.run([bash, "--norc"], input=text, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"complete .*-F \w+ onnxneutrino\n", done.stdout)
    assert done.stderr == ""
