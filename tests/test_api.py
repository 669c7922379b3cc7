"""The Python API: the same run as the command, without the shell and without files."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper, parser

import onnxneutrino
from onnxneutrino import errors
from onnxneutrino.events import Event
from onnxneutrino.runtime import Runner

PUBLIC = {
    *("compress", "NeutrinoError", "ModelError", "DataError", "MetricError", "TrainingError", "OutputError"),
    "UsageError",
}
OPTIONS: dict[str, Any] = {"delta": 20, "trainer": "none", "threads": 1}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelProto:
    """A network of low rank; the working directory has it as `in.onnx`, and `data.npz` on which it is always right."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    made = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 24] x) => (float[N, 4] y) {
        [f1] h = MatMul (x, w1)
        r = Relu (h)
        [f2] y = MatMul (r, w2) }"""
    )
    weights = {
        "w1": generator.standard_normal((24, 3)) @ generator.standard_normal((3, 32)),
        "w2": generator.standard_normal((32, 4)),
    }
    for name, array in weights.items():
        made.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(made, "in.onnx")
    inputs = generator.standard_normal((64, 24)).astype(np.float32)
    labels = Runner(made)({"x": inputs})[0].argmax(1)
    np.savez("data.npz", x_train=inputs[:32], y_train=labels[:32], x_test=inputs[32:], y_test=labels[32:])
    return made


def params(model: ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


@pytest.mark.parametrize("kind", ["text", "path", "model"])
def test_compress(model: ModelProto, kind: str) -> None:
    given: Any = {"text": "in.onnx", "path": Path("in.onnx"), "model": model}[kind]
    before = {path: path.read_bytes() for path in Path().iterdir()}
    content = model.SerializeToString(deterministic=True)
    result = onnxneutrino.compress(given, data="data.npz", **OPTIONS)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert model.SerializeToString(deterministic=True) == content
    assert result.model is not None
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.compressed
    assert result.report.stage2 is not None
    assert result.report.stage2.params == params(result.model) < params(model) == result.report.original.params
    assert result.report.original.metric == 100
    assert result.report.drop is not None
    assert result.report.drop <= 20
    assert result.report.model == ("model" if kind == "model" else "in.onnx")


def test_toml_file_beside_the_model(model: ModelProto) -> None:
    Path("in.toml").write_text('[data]\npath = "data.npz"\n[compress]\nstage = 1\n', encoding="utf-8")
    result = onnxneutrino.compress("in.onnx", **OPTIONS)
    assert result.report.stage2 is None
    assert result.report.data == "data.npz"


def test_hard_targets(model: ModelProto) -> None:
    options = {**OPTIONS, "data": "data.npz", "delta": None}
    result = onnxneutrino.compress(model, **options, max_params="0.6k", max_macs=550)
    assert result.model is not None
    assert params(result.model) <= 550
    assert {row.name: row.limit for row in result.report.targets} == {"params": 600, "macs": 550}
    assert not result.report.missed()
    missed = onnxneutrino.compress(model, **options, max_params=1).report
    assert [row.name for row in missed.missed()] == ["params"]


def test_progress_tells_the_phases(model: ModelProto) -> None:
    events: list[Event] = []
    onnxneutrino.compress(model, data="data.npz", progress=events.append, **OPTIONS)
    phases = list(dict.fromkeys(event.phase for event in events if event.phase))
    assert phases == [
        "load", "normalize", "measure the original", "look for spare channels", "calibrate", "search", "verify"
    ]  # fmt: skip
    assert any("top1 100.00" in event.message for event in events)


def test_dry_run_has_no_model(model: ModelProto) -> None:
    result = onnxneutrino.compress(model, data="data.npz", dry_run=True, **OPTIONS)
    assert result.model is None
    assert result.report.candidates


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, errors.DataError, "no data is given"),
        ({"data": "none.npz"}, errors.DataError, "none.npz: not found"),
        ({"data": "data.npz", "wish": 1}, errors.UsageError, "unknown option 'wish'; known are"),
        ({"data": "data.npz", "delta": -1}, errors.UsageError, "delta must not be negative"),
        ({"data": "data.npz", "max_size": "5x"}, errors.UsageError, "max-size must be a positive quantity"),
        ({"data": "data.npz", "time_limit": "5x"}, errors.UsageError, "time-limit must be a duration"),
        ({"data": "data.npz", "metric": "map50"}, errors.MetricError, "map50: the first output has shape"),
        ({"data": "data.npz", "exclude": "*"}, errors.ModelError, "no layer can be factorized"),
    ],
)
def test_refusals(model: ModelProto, options: dict[str, Any], error: type[errors.NeutrinoError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        onnxneutrino.compress(model, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)


def test_public_names() -> None:
    assert set(onnxneutrino.__all__) == PUBLIC
    assert onnxneutrino.__all__ == sorted(onnxneutrino.__all__)
    for name in PUBLIC:
        assert inspect.getdoc(getattr(onnxneutrino, name))


def test_error_tree_is_drawn_in_its_docstring() -> None:
    kinds = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert kinds == PUBLIC - {"compress"}
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in kinds)
    assert {kind.exit_code for kind in errors.NeutrinoError.__subclasses__()} == {1, 2}
    assert errors.UsageError.exit_code == 2


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, onnxneutrino; print([m for m in ('onnx', 'onnxruntime', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
