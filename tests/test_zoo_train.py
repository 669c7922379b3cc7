"""Training from scratch: BatchNormalization with the statistics of each batch, every family, and what is written."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxneutrino.cli import main
from onnxneutrino.config import load_config
from onnxneutrino.errors import DataError, ModelError
from onnxneutrino.events import Event
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.graph import with_batch
from onnxneutrino.inspection import evaluate
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy
from onnxneutrino.zoo.builder import INPUT, OUTPUT, Builder, Tensor
from onnxneutrino.zoo.families import FAMILIES, Family
from onnxneutrino.zoo.fetch import fetch
from onnxneutrino.zoo.recipes import find
from onnxneutrino.zoo.train import learned, lessons, train, with_batch_statistics

BATCH, CLASSES, SIZE = 16, 4, 12
LABELS_ALONE = Loss("classes", (OUTPUT,), label_weight=1.0, temperature=1.0)
Double = NDArray[np.float64]


def drawn(count: int, seed: int, size: int = SIZE, wrong: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noisy images, the red, green or blue of which is brighter, or none, and which; `wrong` is added to the label."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    images = random.integers(0, 130, (count, size, size, 3))
    brighter = np.eye(CLASSES, dtype=np.int64)[labels, :3] * 120
    return (images + brighter[:, None, None]).astype(np.uint8), (labels + wrong) % CLASSES


def write_npz(path: Path, train_count: int = 256, wrong: int = 0) -> Path:
    x_train, y_train = drawn(train_count, 0, wrong=wrong)
    x_test, y_test = drawn(200, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def example(seed: int, size: int = SIZE) -> Example:
    images, labels = drawn(BATCH, seed, size)
    pixels = (images.transpose(0, 3, 1, 2) / 128 - 1).astype(np.float32)
    return Example({INPUT: pixels}, [100 * np.eye(CLASSES, dtype=np.float32)[labels]], labels)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_every_family_learns(family: Family) -> None:
    form, statistics = with_batch_statistics(family.build("net", (3, SIZE, SIZE), CLASSES, width=0.125))
    with Trainer(
        training_copy(form, BATCH), learned(form), LABELS_ALONE, 1, weight_decay=0.01, statistics=statistics
    ) as trainer:
        losses = [trainer.step(example(step), 4e-3) for step in range(24)]
        found = trainer.arrays()
    assert set(found) == {*learned(form), *statistics}
    assert 0 < np.mean(losses[-6:]) < 0.9 * np.mean(losses[:3])


def small_net() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, mean, dense; scales and offsets that are not 1 and 0."""
    net, image = Builder(0), (2, 5, 5)
    x = net.conv_norm_relu(Tensor(INPUT, image), 6, 3)
    model = net.model("net", image, net.dense(net.global_average(x), 3))
    random = np.random.default_rng(1)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("norm1."):
            values = random.uniform(0.5, 1.5, tensor.dims[0]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def cross_entropy(arrays: dict[str, Double], x: Double, labels: NDArray[np.int64]) -> float:
    """Of `small_net` with the statistics of the batch."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    maps = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + 5, j : j + 5], arrays["conv1.weight"][:, :, i, j])
        for i, j in itertools.product(range(3), repeat=2)
    )
    mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    scale, offset = (arrays[f"norm1.{part}"][:, None, None] for part in ("scale", "offset"))
    features = np.maximum((maps - mean) / np.sqrt(variance + 1e-5) * scale + offset, 0).mean((2, 3))
    logits = features @ arrays["dense1.weight"].T + arrays["dense1.bias"]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), labels]))


def test_gradients_through_the_statistics_of_the_batch() -> None:
    """They equal central differences of the loss in double precision."""
    model = small_net()
    form, statistics = with_batch_statistics(model)
    random = np.random.default_rng(2)
    x, labels = random.standard_normal((8, 2, 5, 5)), random.integers(0, 3, 8)
    given = Example({INPUT: x.astype(np.float32)}, [np.zeros((8, 3), np.float32)], labels)
    arrays = {tensor.name: np.float64(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    with Trainer(training_copy(form, 8), learned(form), LABELS_ALONE, 1, statistics=statistics) as trainer:
        found = trainer.gradients(given)
    assert set(found) == {"conv1.weight", "norm1.scale", "norm1.offset", "dense1.weight", "dense1.bias"}
    for name, gradient in found.items():
        wanted = np.zeros(gradient.size)
        for index in range(gradient.size):
            ends = []
            for step in (1e-5, -1e-5):
                moved = arrays[name].copy()
                moved.flat[index] += step
                ends.append(cross_entropy({**arrays, name: moved}, np.float64(given.inputs[INPUT]), labels))
            wanted[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient.ravel(), wanted, atol=2e-6, err_msg=name)


def test_statistics_are_exponential_averages() -> None:
    """After some batches: 0.9 of the old and 0.1 of the batch's mean and (biased) variance."""
    model = small_net()
    form, statistics = with_batch_statistics(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    mean, variance = np.float64(arrays["norm1.mean"]), np.float64(arrays["norm1.variance"])
    maps = Runner(model, ["conv1_out"])
    random = np.random.default_rng(3)
    with Trainer(training_copy(form, 8), learned(form), LABELS_ALONE, 1, statistics=statistics) as trainer:
        for _ in range(5):
            x = random.standard_normal((8, 2, 5, 5)).astype(np.float32) + 1
            trainer.step(Example({INPUT: x}, [np.zeros((8, 3), np.float32)], np.zeros(8, np.int64)), 0.0)
            [seen] = maps({INPUT: x})
            mean = 0.9 * mean + 0.1 * seen.mean((0, 2, 3))
            variance = 0.9 * variance + 0.1 * seen.var((0, 2, 3))
        found = trainer.arrays()
    np.testing.assert_allclose(found["norm1.mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["norm1.variance"], variance, rtol=1e-5)
    np.testing.assert_array_equal(found["conv1.weight"], arrays["conv1.weight"])


def test_the_loss_is_the_cross_entropy() -> None:
    model = small_net()
    form, statistics = with_batch_statistics(model)
    random = np.random.default_rng(4)
    x, labels = random.standard_normal((8, 2, 5, 5)).astype(np.float32), random.integers(0, 3, 8)
    arrays = {tensor.name: np.float64(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    with Trainer(training_copy(form, 8), learned(form), LABELS_ALONE, 1, statistics=statistics) as trainer:
        certain = 100 * np.eye(3, dtype=np.float32)[labels]
        loss = trainer.step(Example({INPUT: x}, [certain], labels), 0.0)
    assert loss == pytest.approx(cross_entropy(arrays, np.float64(x), labels), rel=1e-5)


def test_weight_decay_shrinks_what_has_no_gradient() -> None:
    """AdamW: a weight whose gradient is zero is multiplied by 1 - rate · decay (Loshchilov and Hutter 2019)."""
    model = with_batch(small_net(), 4)
    dark = Example({INPUT: np.zeros((4, 2, 5, 5), np.float32)}, [np.zeros((4, 3), np.float32)], np.zeros(4, np.int64))
    form, statistics = with_batch_statistics(model)
    with Trainer(
        training_copy(form, 4), learned(form), LABELS_ALONE, 1, weight_decay=0.5, statistics=statistics
    ) as trainer:
        before = trainer.arrays()["conv1.weight"]
        trainer.step(dark, 0.1)
        after = trainer.arrays()["conv1.weight"]
    np.testing.assert_allclose(after, (1 - 0.1 * 0.5) * before, rtol=1e-5)


def test_lessons_differ_from_epoch_to_epoch() -> None:
    from onnxneutrino.data import IndexedSplit

    def read(rows: NDArray[np.int64], generator: np.random.Generator | None) -> dict[str, NDArray[np.float32]]:
        assert generator is not None
        return {INPUT: rows[:, None] + generator.random((len(rows), 1), np.float32) / 2}

    split = IndexedSplit(read, np.arange(10) % 3, np.arange(10))
    epochs = [[next(stream) for _ in range(2)] for stream in [lessons(split, 4, 3, 0)] for _ in range(6)]
    orders = {tuple(int(value) for own in epoch for value in own.inputs[INPUT].ravel()) for epoch in epochs}
    assert len(orders) == 6
    for own in itertools.chain.from_iterable(epochs):
        assert own.labels is not None
        assert (own.labels == np.int64(own.inputs[INPUT].ravel()) % 3).all()
        assert (own.teacher[0].argmax(1) == own.labels).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small network with its data, as `fetch` leaves it."""
    data = write_npz(tmp_path / "colours.npz")
    fetch(find("vgglight-images"), tmp_path / "net", data=data)
    return tmp_path / "net"


def test_train_and_compress(folder: Path) -> None:
    before = set(folder.iterdir())
    result = CliRunner().invoke(main, ["zoo", "train", str(folder), "--epochs", "10", "--threads", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["before"] < 60
    assert found["after"] > 95
    assert (found["metric"], found["examples"], found["steps"], found["epochs"]) == ("top1", 200, 40, 10.0)
    assert found["written"] is True
    assert set(folder.iterdir()) == before
    path = folder / "model.onnx"
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert evaluate(path, load_config(path, {"threads": 1})).value == found["after"]
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}
    command = ["compress", str(path), str(folder / "out.onnx"), "--time-limit", "6s", "--threads", "1", "--delta", "3"]
    result = CliRunner().invoke(main, [*command, "--json", "-"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["original"]["metric"] == found["after"]
    assert report["compressed"]
    assert (folder / "out.onnx").stat().st_size < path.stat().st_size


def test_the_time_limit_gives_the_steps(folder: Path) -> None:
    found = train(folder, seconds=2.0, threads=1)
    assert 0.5 < found.seconds < 15.0
    assert found.steps >= 1


def test_nothing_is_written_where_the_metric_falls(folder: Path, tmp_path: Path) -> None:
    assert train(folder, seconds=0, epochs=2, threads=1).written
    trained = (folder / "model.onnx").read_bytes()
    write_npz(tmp_path / "colours.npz", wrong=1)
    result = CliRunner().invoke(main, ["zoo", "train", str(folder), "--epochs", "2", "--threads", "1"])
    assert result.exit_code == 0
    assert result.stdout.endswith("The metric fell: " + str(folder / "model.onnx") + " stays as it was.\n")
    assert (folder / "model.onnx").read_bytes() == trained


def test_an_interrupt_keeps_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    taken = []

    def interrupted(self: Trainer, example: Example, rate: float) -> float:
        taken.append(rate)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = CliRunner().invoke(main, ["zoo", "train", str(folder), "--epochs", "5"])
    assert result.exit_code == 1
    assert result.stderr.endswith("onnxneutrino: interrupted; nothing was written\n")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_progress_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Trainer, example: Example, rate: float) -> float:
        time.sleep(0.2)
        return 1.25

    monkeypatch.setattr(Trainer, "step", slow)
    events: list[Event] = []
    train(folder, seconds=0, epochs=3, threads=1, tell=events.append)
    assert events[0].detail == "the test split before"
    own = [event for event in events if event.training is not None]
    assert own[0].detail == "net, loss 1.250"
    for event in own:
        assert event.training is not None
        assert 0 < event.training.step < event.training.steps == 12
        assert event.training.epoch == event.training.step / 4
        assert event.time_left is not None
        assert event.time_left > 0


@pytest.mark.parametrize("spoil", ["model", "labels", "metric", "opset"])
def test_what_cannot_be_trained_is_refused(spoil: str, folder: Path, tmp_path: Path) -> None:
    wanted: type[Exception] = ModelError
    if spoil == "model":
        (folder / "model.onnx").unlink()
        says = f"{folder / 'model.onnx'}: no such file; `onnxneutrino zoo fetch RECIPE"
    elif spoil == "labels":
        x, y = drawn(64, 0)
        np.savez(tmp_path / "colours.npz", x_train=x, x_test=x, y_test=y)
        wanted, says = DataError, "the training split has no labels; add y_train"
    elif spoil == "opset":
        model = onnx.load(folder / "model.onnx")
        model.opset_import[0].version = 13
        onnx.save(model, folder / "model.onnx")
        says = "node 'norm1': BatchNormalization is trained from opset 14 on"
    else:
        text = (folder / "model.toml").read_text()
        (folder / "model.toml").write_text(text.replace("top1", "agreement"))
        says = "only classifiers are trained here, with top1, top5 or f1, not agreement"
    with pytest.raises(wanted, match=says):
        train(folder, seconds=1)
