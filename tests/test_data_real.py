from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxneutrino.config import DataConfig, load_config
from onnxneutrino.data import InputSpec, open_data
from onnxneutrino.metrics import resolve, statistics, value
from onnxneutrino.runtime import Runner

FLOAT = np.dtype(np.float32)


def test_real_batches_are_quick(shared: Path) -> None:
    spec = InputSpec("x", (None, 3, 32, 32), FLOAT)
    config = DataConfig(
        path=str(shared / "data" / "cifar10_40k.npz"), scale=1 / 255, mean=(0.5,) * 3, augment=("crop4", "hflip")
    )
    data = open_data(config, (spec,), seed=0, classes=10)
    assert data.stop is not None
    assert (len(data.train), len(data.stop), len(data.test)) == (36000, 4000, 10000)
    stream, seconds = data.train.batches(128, seed=0, augment=True), []
    for _ in range(30):
        start = time.perf_counter()
        batch = next(stream)
        seconds.append(time.perf_counter() - start)
        assert batch.inputs["x"].shape == (128, 3, 32, 32)
    # A millisecond or two when the machine is idle.
    assert min(seconds) < 0.02


def test_real_accuracy_is_the_published_one(shared: Path) -> None:
    folder = shared / "models"
    config = load_config(folder / "mnist_fc_256x4.onnx", {})
    model = onnx.load(str(folder / "mnist_fc_256x4.onnx"))
    declared = model.graph.input[0].type.tensor_type.shape.dim
    spec = InputSpec(model.graph.input[0].name, tuple(d.dim_value or None for d in declared), FLOAT)
    data = open_data(config.data, (spec,), seed=0, classes=10)
    runner, metric = Runner(model), resolve(config.metric, config.metric_base)
    rows = [statistics(metric, runner(b.inputs), b.targets, None) for b in data.test.batches(1)]
    assert value(metric, np.concatenate(rows)) == pytest.approx(97.64, abs=0.005)
