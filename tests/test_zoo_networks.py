"""The zoo's networks: parameters and multiply-accumulates of the papers, shapes, and that they run anywhere."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from onnxneutrino import cost
from onnxneutrino.differentiable import has_gradient
from onnxneutrino.errors import ModelError
from onnxneutrino.graph import tensor_types
from onnxneutrino.runtime import Runner
from onnxneutrino.zoo.builder import INPUT, IR, OPSET, OUTPUT, Builder, Tensor, scaled
from onnxneutrino.zoo.families import FAMILIES
from onnxneutrino.zoo.train import learned, with_batch_statistics

BY_NAME = {family.name: family for family in FAMILIES}
NAMES = list(BY_NAME)
SMALL_WIDTH = 0.125
# Learned parameters. lenet5: 156 + 2416 + 48120 + 10164 + 850, LeCun et al. with all maps connected. vgg11, vgg16:
# table 1 without dense layers, biases of the Conv replaced by BatchNormalization. resnet20, resnet56: He et al. state
# 0.27 M and 0.85 M; resnet18, mobilenetv2 and shufflenetv2 at 1000 classes: 11.7 M, 3.5 M and 2.3 M as commonly
# counted from the papers' tables. mobilenetv1: 4.2 M. densenet40, densenetbc100: 1.0 M and 0.8 M.
# fmt: off
LEARNED = {
    ("lenet5", 1, 28, 10): 61_706, ("vgg11", 3, 32, 10): 9_228_362, ("vgg16", 3, 32, 10): 14_724_042,
    ("resnet20", 3, 32, 10): 269_722, ("resnet56", 3, 32, 10): 853_018, ("resnet18", 3, 224, 1000): 11_689_512,
    ("resnet18", 3, 32, 10): 11_173_962, ("mobilenetv1", 3, 224, 1000): 4_231_976,
    ("mobilenetv2", 3, 224, 1000): 3_504_872, ("shufflenetv2", 3, 224, 1000): 2_278_604,
    ("densenet40", 3, 32, 10): 1_019_722, ("densenetbc100", 3, 32, 10): 769_162,
}
STATED = {
    "resnet20": 0.27e6, "resnet56": 0.85e6, "densenet40": 1.0e6, "densenetbc100": 0.8e6,
}
# Multiply-accumulates of an image of 224 pixels, 1000 classes, in millions, as the papers state them.
MACS = {"mobilenetv1": 569, "mobilenetv2": 300, "shufflenetv2": 146, "resnet18": 1800, "vgg16": 15_300,
        "googlenet": 1500}
# fmt: on
# Parameters of the modules 3a to 5b in thousands, table 1 of Szegedy et al. 2015.
INCEPTIONS = (159, 380, 364, 437, 463, 580, 840, 1072, 1388)


def built(name: str, channels: int, size: int, classes: int, seed: int | None = None) -> ModelProto:
    return BY_NAME[name].build(name, (channels, size, size), classes, seed=seed)


def learned_count(model: ModelProto) -> int:
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    parts = ("weight", "bias", "scale", "offset")
    return sum(size for name, size in sizes.items() if name.rpartition(".")[2] in parts)


@pytest.mark.parametrize(("name", "channels", "size", "classes"), list(LEARNED))
def test_parameters(name: str, channels: int, size: int, classes: int) -> None:
    assert learned_count(built(name, channels, size, classes)) == LEARNED[name, channels, size, classes]


@pytest.mark.parametrize("name", list(STATED))
def test_parameters_that_a_paper_states(name: str) -> None:
    assert learned_count(built(name, 3, 32, 10)) == pytest.approx(STATED[name], rel=0.05)


@pytest.mark.parametrize("name", list(MACS))
def test_multiply_accumulates(name: str) -> None:
    model = built(name, 3, 224, 1000)
    macs = cost.macs(model, tensor_types(model, {INPUT: (1, 3, 224, 224)}))
    assert macs / 1e6 == pytest.approx(MACS[name], rel=0.06)


def test_modules_of_googlenet() -> None:
    model = built("googlenet", 3, 32, 10)
    sizes = [math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.name.endswith(".weight")]
    convs = sizes[1:-1]  # without the first Conv and the dense layer
    counted = [sum(convs[start : start + 6]) / 1024 for start in range(0, len(convs), 6)]
    assert len(counted) == len(INCEPTIONS)
    assert sum(counted) == pytest.approx(sum(INCEPTIONS), rel=0.02)
    assert counted[0] == pytest.approx(INCEPTIONS[0], abs=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_every_network_is_sound(name: str, channels: int, size: int) -> None:
    model = BY_NAME[name].build(name, (channels, size, size), 7, width=SMALL_WIDTH)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == IR
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim][:1] == ["N"]
    assert not model.metadata_props
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    images = np.random.default_rng(0).standard_normal((3, channels, size, size), np.float32)
    runner = Runner(model)
    [together] = runner({INPUT: images})
    alone = np.concatenate([runner({INPUT: image[None]})[0] for image in images])
    assert together.shape == (3, 7)
    assert np.ptp(together) > 0
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_builder(name: str) -> None:
    """What the builder notes of a tensor is what shape inference finds, also for sizes that do not halve evenly."""
    net, size = Builder(None), (3, 52, 60)
    noted: dict[str, tuple[int, ...]] = {}
    plain = net._add

    def add(*arguments: object, **attributes: object) -> Tensor:
        made = plain(*arguments, **attributes)  # type: ignore[arg-type]
        noted[made.name] = made.shape
        return made

    net._add = add  # type: ignore[method-assign]
    logits = BY_NAME[name].layers(net, Tensor(INPUT, size), 10, SMALL_WIDTH)
    model = net.model(name, size, logits)
    noted[OUTPUT] = noted.pop(logits.name)
    types = tensor_types(model, {INPUT: (1, *size)})
    assert {own: types[own].shape[1:] for own in noted} == noted


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_knows_every_operator(name: str) -> None:
    form, statistics = with_batch_statistics(built(name, 3, 32, 10))
    assert all(has_gradient(node) for node in form.graph.node if node.op_type != "BatchNormalization")
    assert {own.rpartition(".")[2] for own in statistics} <= {"mean", "variance"}
    named = {
        tensor.name
        for tensor in form.graph.initializer
        if tensor.name.rpartition(".")[2] in ("weight", "bias", "scale", "offset")
    }
    assert named == set(learned(form))


def test_weights_are_those_of_he_and_of_the_seed() -> None:
    def weights(seed: int) -> dict[str, NDArray[np.float32]]:
        model = BY_NAME["resnet18"].build("net", (3, 32, 32), 10, seed=seed, width=0.5)
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])
    large = [array for name, array in first.items() if name.endswith(".weight") and array.size > 10_000]
    for array in large:
        assert np.std(array) == pytest.approx(math.sqrt(2 / math.prod(array.shape[1:])), rel=0.05)
        assert abs(np.mean(array)) < 4 * np.std(array) / math.sqrt(array.size)
    for part, value in (("scale", 1), ("offset", 0), ("mean", 0), ("variance", 1), ("bias", 0)):
        assert all((array == value).all() for name, array in first.items() if name.endswith(f".{part}"))


def test_the_shortcut_without_parameters_takes_every_other_pixel() -> None:
    net, image = Builder(0), (2, 5, 6)
    model = net.model("shortcut", image, net.subsampled(Tensor(INPUT, image), 2, 5))
    x = np.random.default_rng(0).standard_normal((3, *image), np.float32)
    [y] = Runner(model)({INPUT: x})
    assert np.array_equal(y[:, :2], x[:, :, ::2, ::2])
    assert y.shape == (3, 5, 3, 3)
    assert not y[:, 2:].any()


def test_the_shuffle_takes_channels_from_each_group_in_turn() -> None:
    net, image = Builder(0), (6, 1, 1)
    model = net.model("shuffle", image, net.shuffle(Tensor(INPUT, image), 2))
    [y] = Runner(model)({INPUT: np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)})
    assert y.ravel().tolist() == [0, 3, 1, 4, 2, 5]


def test_images_too_small_are_refused() -> None:
    with pytest.raises(ModelError, match="too small for this network: a window of 5 pixels finds 4"):
        built("lenet5", 1, 8, 10)


@pytest.mark.parametrize(("channels", "width", "wanted"), [(6, 1.0, 6), (64, 0.25, 16), (12, 0.1, 4), (116, 0.5, 56)])
def test_width(channels: int, width: float, wanted: int) -> None:
    assert scaled(channels, width) in (wanted, wanted + 4)
    assert scaled(channels, width) % 4 == 0 or width == 1
