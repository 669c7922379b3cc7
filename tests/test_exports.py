"""Small classifiers as PyTorch and TensorFlow export them go through a whole run, in either's own layout."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import onnxneutrino

SIZE, CHANNELS, CLASSES, TRAIN, TEST = 12, 3, 4, 256, 256
DELTA = 2.0
STEPS = 40
BATCH = 64
OPTIONS: dict[str, Any] = {"delta": DELTA, "trainer": "none", "threads": 1}


def images(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images `(count, SIZE, SIZE, CHANNELS)` in noise: stripes across one axis or two, or none, of any phase."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    made = generator.standard_normal((count, SIZE, SIZE, CHANNELS)) * 0.3
    phase = generator.uniform(0, 2 * np.pi, (2, count, 1, 1))
    axis = np.arange(SIZE) * np.pi / 2
    made[..., 0] += np.cos(axis[:, None] + phase[0]) * (labels % 2)[:, None, None]
    made[..., 1] += np.cos(axis[None, :] + phase[1]) * (labels // 2)[:, None, None]
    return made.astype(np.float32), labels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `data.npz`."""
    monkeypatch.chdir(tmp_path)
    (x_train, y_train), (x_test, y_test) = images(TRAIN, 0), images(TEST, 1)
    np.savez("data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return tmp_path


def pytorch_network() -> Any:
    """A trained PyTorch classifier of `(N, CHANNELS, SIZE, SIZE)` images, in inference mode."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    nn = torch.nn
    network = nn.Sequential(
        *(nn.Conv2d(CHANNELS, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)),
    )
    inputs, labels = (torch.from_numpy(array) for array in images(TRAIN, 0))
    inputs = inputs.permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(STEPS):
        chosen = torch.arange(step * BATCH, (step + 1) * BATCH) % TRAIN
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
    return network.eval()


def export_pytorch(exporter: str) -> NDArray[np.float32]:
    """Write `in.onnx` with one of PyTorch's exporters; the network's own outputs on the test split."""
    network = pytorch_network()
    import torch

    options: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"], "dynamo": exporter == "dynamo"}
    if exporter == "dynamo":
        pytest.importorskip("onnxscript", reason="onnxscript, which PyTorch's newer exporter needs, is not installed")
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    else:
        options["dynamic_axes"] = {"image": {0: "batch"}, "scores": {0: "batch"}}
    if exporter == "unfolded":
        options |= {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(network, (torch.zeros(2, CHANNELS, SIZE, SIZE),), "in.onnx", **options)
    with torch.no_grad():
        return np.asarray(network(torch.from_numpy(images(TEST, 1)[0]).permute(0, 3, 1, 2)).numpy())


def export_tensorflow() -> NDArray[np.float32]:
    """Write `in.onnx` of a trained Keras classifier of `(N, SIZE, SIZE, CHANNELS)` images; its own test outputs."""
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    tf2onnx = pytest.importorskip("tf2onnx", reason="tf2onnx is not installed")
    keras = tensorflow.keras
    keras.utils.set_random_seed(0)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, CHANNELS), name="image"),
            *(layers.Conv2D(16, 3, padding="same", use_bias=False), layers.BatchNormalization(momentum=0.9)),
            *(layers.ReLU(), layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)),
            *(layers.BatchNormalization(momentum=0.9), layers.ReLU(), layers.Conv2D(32, 3, padding="same")),
            *(layers.BatchNormalization(momentum=0.9), layers.ReLU(), layers.GlobalAveragePooling2D()),
            layers.Dense(CLASSES, name="scores"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(0.01), loss)
    inputs, labels = images(TRAIN, 0)
    network.fit(inputs, labels, batch_size=BATCH, epochs=STEPS * BATCH // TRAIN, verbose=0)
    signature = [tensorflow.TensorSpec((None, SIZE, SIZE, CHANNELS), tensorflow.float32, name="image")]
    called = tensorflow.function(lambda image: {"scores": network(image)}, input_signature=signature, autograph=False)
    tf2onnx.convert.from_function(called, signature, output_path="in.onnx")
    return np.asarray(network(images(TEST, 1)[0]))


def outputs(model: ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output, by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [scores] = session.run(None, {session.get_inputs()[0].name: inputs})
    return np.asarray(scores)


def check(own: NDArray[np.float32], layout: str) -> None:
    """Compress `in.onnx`, whose images have this layout, and compare it with the framework's `own` test outputs."""
    inputs, labels = images(TEST, 1)
    inputs = inputs.transpose(0, 3, 1, 2) if layout == "NCHW" else inputs
    original = onnx.load("in.onnx")
    np.testing.assert_allclose(outputs(original, inputs), own, atol=1e-3)
    accuracy = 100 * float(np.mean(own.argmax(1) == labels))
    assert accuracy > 95

    result = onnxneutrino.compress("in.onnx", data="data.npz", layout=layout, **OPTIONS)
    report, compressed = result.report, result.model
    assert compressed is not None
    onnx.checker.check_model(compressed, full_check=True)
    assert report.original.metric == pytest.approx(accuracy)
    assert report.compressed
    assert report.enhancement is not None
    assert report.enhancement.params > 1.5
    assert any(row.form for row in report.layers if row.op == "Conv")
    right = 100 * float(np.mean(outputs(compressed, inputs).argmax(1) == labels))
    assert report.drop == pytest.approx(accuracy - right)
    assert report.drop is not None
    assert report.drop <= DELTA

    assert list(compressed.graph.input) == list(original.graph.input)
    assert list(compressed.graph.output) == list(original.graph.output)
    assert compressed.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the batch is still free
    assert list(compressed.opset_import) == list(original.opset_import)
    assert compressed.ir_version == original.ir_version
    assert not any(node.op_type == "BatchNormalization" for node in compressed.graph.node)
    for count in (1, 3):
        np.testing.assert_allclose(
            outputs(compressed, inputs[:count]), outputs(compressed, inputs)[:count], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript", "unfolded"])
def test_pytorch(folder: Path, exporter: str) -> None:
    own = export_pytorch(exporter)
    # In inference mode the exporters fold it themselves.
    kept = [node for node in onnx.load("in.onnx").graph.node if node.op_type == "BatchNormalization"]
    assert len(kept) == (3 if exporter == "unfolded" else 0)
    check(own, "NCHW")


def test_tensorflow(folder: Path) -> None:
    check(export_tensorflow(), "NHWC")
