"""docs/examples/torch_trainer.py: its operators are ONNX's, and it trains what may change towards the original."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from models_drawn import drawn

from onnxneutrino.external import TRAINABLE
from onnxneutrino.graph import arrays, with_arrays
from onnxneutrino.runtime import Runner

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "torch_trainer.py"
NET = """
    net (float[N,3,8,8] x) => (float[N,10] y)
    <float[6,3,3,1] w0, float[6,6,1,3] w1, float[6] b1, float[10,96] w2, float[10] b2, int64[2] shape = {0, -1}>
    {
        a = Conv <pads = [1,0,1,0]> (x, w0)  b = Conv <pads = [0,1,0,1]> (a, w1, b1)  c = Relu (b)
        d = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [0,0,1,1]> (c)
        e = Reshape (d, shape)  y = Gemm <transB = 1> (e, w2, b2)
    }
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torch", reason="PyTorch is not installed: it is no dependency")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("torch_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_towards_the_original(example: ModuleType) -> None:
    import torch

    original, names = drawn(NET, scaled=True), ["w0", "w1", "b1", "w2"]
    rng = np.random.default_rng(0)
    moved = {name: arrays(original)[name] + 0.1 * rng.standard_normal(arrays(original)[name].shape) for name in names}
    candidate = with_arrays(original, moved)
    candidate.metadata_props.add(key=TRAINABLE, value="\n".join(names))
    x = rng.integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)
    np.savez("cifar10.npz", x_train=x, y_train=rng.integers(0, 10, 256))
    onnx.save(candidate, "candidate.onnx")
    onnx.save(original, "original.onnx")
    batch = rng.standard_normal((64, 3, 8, 8)).astype(np.float32)
    wanted = Runner(original)({"x": batch})[0]
    own = {name: torch.from_numpy(np.array(value)) for name, value in arrays(original).items()}
    np.testing.assert_allclose(example._output(original, own, torch.from_numpy(batch)), wanted, rtol=1e-4, atol=1e-4)
    example.LABELS, example.RATE = 0.0, 1e-2  # type: ignore[attr-defined]
    ticks = itertools.count()  # a clock of steps: how many there are does not depend on the machine
    example.time = SimpleNamespace(monotonic=lambda: next(ticks))  # type: ignore[attr-defined]
    trained = example.train("candidate.onnx", "original.onnx", 400)
    onnx.checker.check_model(trained, full_check=True)

    def divergence(model: onnx.ModelProto) -> float:
        given = Runner(model)({"x": batch})[0]
        logs = [value - np.log(np.exp(value).sum(1, keepdims=True)) for value in (wanted, given)]
        return float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=1)))

    assert divergence(trained) < 0.8 * divergence(candidate)
    np.testing.assert_array_equal(arrays(trained)["b2"], arrays(candidate)["b2"])
