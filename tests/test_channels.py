"""Removing channels: which go together, that nothing else changes, and the least squares behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from graphs_drawn import Drawn, graphs
from hypothesis import event, given, settings
from models_drawn import build, random
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model
from steps_drawn import STEPS

from onnxneutrino import conductor, cost, metrics, prepare
from onnxneutrino.channel_removal import LEAST_CHANNELS, Reader, covariance, made_good, removal_order
from onnxneutrino.channels import Channels, find_channels
from onnxneutrino.config import Config, DataConfig
from onnxneutrino.factors import Moments
from onnxneutrino.graph import arrays, complete_inputs, name_nodes, tensor_types, with_arrays
from onnxneutrino.marking import mark
from onnxneutrino.moments import MomentSum
from onnxneutrino.narrowing import Removal, spare_channels
from onnxneutrino.passes import find_layers as find_layers_module
from onnxneutrino.passes.drop_channels import drop_channels
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Layer
from onnxneutrino.prepare import types_of
from onnxneutrino.runtime import Runner
from onnxneutrino.zoo.families import FAMILIES

ROWS = 4000


def found(model: ModelProto, shapes: dict[str, tuple[int, ...]]) -> Channels:
    types = types_of(model, shapes)
    layers = [layer for layer in find_layers(model, types) if isinstance(layer, Layer)]
    return find_channels(model, types, layers, [layer.name for layer in layers])


def shapes_of(model: ModelProto) -> dict[str, tuple[int, ...]]:
    return {
        value.name: tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim) for value in model.graph.input
    }


def unread(model: ModelProto, channels: Channels, removed: list[int]) -> ModelProto:
    """The model whose layers have zeros for what they read of the removed groups."""
    values = arrays(model)
    new: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if node.name not in channels.inputs:
            continue
        for own in channels.slices:
            if own.constant == node.input[1] and own.axis == _inner_axis(node):
                weight = np.moveaxis(np.array(new.get(own.constant, values[own.constant])), own.axis, 0)
                weight[np.isin(own.groups, removed)] = 0
                new[own.constant] = np.moveaxis(weight, 0, own.axis)
    return with_arrays(model, new)


def _inner_axis(node: onnx.NodeProto) -> int:
    turned = any(entry.name == "transB" and entry.i for entry in node.attribute)
    return 1 if node.op_type == "Conv" or turned else 0


def check_exact(model: ModelProto, seed: int = 0, most: int = 12) -> int:
    """Drop random groups whose readers ignore them: outputs must stay. Returns how many groups there are."""
    shapes = shapes_of(model)
    channels = found(model, shapes)
    read = {int(group) for groups in channels.inputs.values() for group in groups} - {0}
    counts = [*channels.inputs.values(), *channels.outputs.values()]
    rng = np.random.default_rng(seed)
    removed: list[int] = []
    for group in rng.permutation(sorted(read)).tolist()[:most]:
        tried = [*removed, group]
        if all((~np.isin(groups, tried)).any() for groups in counts):
            removed = tried
    if not removed:
        return len(read)
    plain = unread(model, channels, removed)
    sliced = {own.constant for own in channels.slices}
    changed = {name: array for name, array in arrays(plain).items() if name in sliced}
    made = drop_channels(model, channels, removed, changed, {})
    onnx.checker.check_model(made, full_check=True)
    assert cost.params(made) < cost.params(model)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for before, after in zip(Runner(plain, threads=1)(inputs), Runner(made, threads=1)(inputs), strict=True):
        assert before.shape == after.shape
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(before).max())))
    return len(read)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_lose_channels_and_nothing_else(family: Any) -> None:
    """Residuals, Concats, depthwise convolutions, BatchNormalization and Flattens of the zoo."""
    size = 28 if family.name == "lenet5" else 32
    channels = 1 if family.name in ("lenet5", "mlp") else 3
    model = family.build(family.name, (channels, size, size), 10, width=0.25, seed=1)
    assert check_exact(model) > 0


@settings(deadline=None, max_examples=200, derandomize=True)
@given(drawn=graphs(STEPS))
def test_drawn_graphs_lose_channels_and_nothing_else(drawn: Drawn) -> None:
    """Whatever the operators are; layers of any size count here."""
    with mock.patch.object(find_layers_module, "MIN_WEIGHTS", 1), mock.patch.object(find_layers_module, "MIN_RANK", 1):
        event(f"{min(check_exact(drawn.model), 8)} groups")


BODIES = {
    "residual": ("c = Conv<kernel_shape=[1,1]>(x, a) d = Conv<kernel_shape=[1,1]>(x, b) s = Add(c, d) r = Relu(s) "
                 "y = Conv<kernel_shape=[1,1]>(r, e)", 16),
    "concat": ("c = Conv<kernel_shape=[1,1]>(x, a) d = Conv<kernel_shape=[1,1]>(x, b) r = Concat<axis=1>(c, d) "
               "y = Conv<kernel_shape=[1,1]>(r, w)", 32),
    "softmax": ("c = Conv<kernel_shape=[1,1]>(x, a) r = Softmax<axis=1>(c) y = Conv<kernel_shape=[1,1]>(r, e)", 0),
    "split": ("c = Conv<kernel_shape=[1,1]>(x, a) p, q = Split<axis=1, num_outputs=2>(c) s = Add(p, q) "
              "y = Conv<kernel_shape=[1,1]>(s, h)", 0),
    "scaled": ("c = Conv<kernel_shape=[1,1]>(x, a) t = Mul(c, m) p = PRelu(t, m) "
               "y = Conv<kernel_shape=[1,1]>(p, e)", 0),
    "shared weight": ("c = Conv<kernel_shape=[1,1]>(x, a) d = Conv<kernel_shape=[1,1]>(c, e) "
                      "y = Conv<kernel_shape=[1,1]>(d, e)", 0),
    "squeeze and excite": ("c = Conv<kernel_shape=[1,1]>(x, a) g = GlobalAveragePool(c) "
                           "u = Conv<kernel_shape=[1,1]>(g, e) v = Sigmoid(u) s = Mul(c, v) "
                           "y = Conv<kernel_shape=[1,1]>(s, f)", 16),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BODIES))
def test_groups(name: str) -> None:
    """How many groups there are: an Add ties two layers, a Concat keeps them apart, what is not known stays."""
    body, groups = BODIES[name]
    named = {own: random(16, 16, 1, 1, seed=index) for index, own in enumerate("abef")}
    named |= {"w": random(16, 32, 1, 1, seed=7), "h": random(16, 8, 1, 1, seed=8), "m": random(16, 1, 1, seed=9)}
    used = {own: array for own, array in named.items() if f"{own})" in body}
    model = build(body, "float[1,16,5,5] x", **used)
    name_nodes(model.graph)
    assert check_exact(model) == groups


def test_initializers_that_are_inputs_too() -> None:
    """Below IR 4 every initializer is listed as an input, with its shape."""
    model = redundant()
    model.ir_version = 3
    model = complete_inputs(model)
    assert len(model.graph.input) == 5
    weights = [value.name for value in model.graph.input[1:]]
    channels = found(model, {"x": (1, 4, 8, 8)})
    biases = {name: np.zeros(16, np.float32) for name in ("first", "second")}
    made = drop_channels(model, channels, [3], {}, biases)
    onnx.checker.check_model(made, full_check=True)
    assert len(made.graph.input) == len(weights) + 1 + len(biases)


def test_left_out_layers_are_not_touched() -> None:
    """Neither the rows of a layer that the user left out nor what it reads may go."""
    body = (
        "c = Conv<kernel_shape=[1,1]>(x, a) d = Conv<kernel_shape=[1,1]>(c, b) f = Conv<kernel_shape=[1,1]>(d, e) "
        "y = Conv<kernel_shape=[1,1]>(f, g)"
    )
    model = build(body, "float[1,16,5,5] x", **{own: random(16, 16, 1, 1, seed=i) for i, own in enumerate("abeg")})
    name_nodes(model.graph)
    types = tensor_types(model, {})
    layers = [layer for layer in find_layers(model, types) if isinstance(layer, Layer)]
    names = [layer.name for layer in layers]
    channels = find_channels(model, types, layers, names, untouched=[names[1]])
    assert [name for name, groups in channels.inputs.items() if groups.any()] == [names[3]]


# --- numerics -----------------------------------------------------------------------------------------------


def moments_of(rows: NDArray[Any]) -> Moments:
    total = MomentSum(rows.shape[1])
    total.add(rows.astype(np.float32))
    return total.moments()


def mixed(channels: int, kernel: int, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    size = channels * kernel
    return rng.standard_normal((ROWS, size)) @ (rng.standard_normal((size, size)) / size + np.eye(size)) + 0.5


def test_what_makes_up_is_the_least_squares_solution() -> None:
    rows, rng = mixed(6, 3, 1), np.random.default_rng(2)
    weight, bias = rng.standard_normal((5, 6, 3)), rng.standard_normal(5)
    gone = np.array([False, True, False, False, True, False])
    moments = moments_of(rows)
    new, shifted = made_good(
        weight.astype(np.float32), bias.astype(np.float32), moments.mean, covariance(moments), gone
    )
    kept = ~np.repeat(gone, 3)
    design = np.hstack([rows[:, kept], np.ones((len(rows), 1))])
    best = np.linalg.lstsq(design, rows @ weight.reshape(5, -1).T + bias, rcond=None)[0]
    assert not new[:, gone].any()
    np.testing.assert_allclose(new.reshape(5, -1)[:, kept], best[:-1].T, atol=2e-3)
    np.testing.assert_allclose(shifted, best[-1], atol=2e-3)


def reader(weight: NDArray[Any], rows: NDArray[Any] | None, inputs: Any, outputs: Any, price: float = 1.0) -> Reader:
    sigma = None if rows is None else covariance(moments_of(rows))
    return Reader(weight.astype(np.float32), sigma, np.array(inputs), np.array(outputs), price)


def test_the_order_is_that_of_errors_made_one_after_the_other() -> None:
    """Errors are those of least squares on what is left, compared with a search that solves them all anew."""
    rows, rng = mixed(8, 2, 3), np.random.default_rng(4)
    weight = rng.standard_normal((5, 8, 2)) * np.linspace(0.2, 2.0, 8)[:, None]
    centred = rows - rows.mean(axis=0)
    wanted = centred @ weight.reshape(5, -1).T

    def error(gone: list[int]) -> float:
        kept = ~np.repeat(np.isin(np.arange(8), gone), 2)
        own = np.linalg.lstsq(centred[:, kept], wanted, rcond=None)[0]
        return float(((centred[:, kept] @ own - wanted) ** 2).sum() / len(rows))

    expected: list[int] = []
    while len(expected) < 8 - LEAST_CHANNELS:
        left = [own for own in range(8) if own not in expected]
        expected.append(min(left, key=lambda own: error([*expected, own])))
    order = removal_order([reader(weight, rows, np.arange(1, 9), [0] * 5)], 9, np.zeros(9), np.inf)
    assert [group - 1 for group in order] == expected
    # The errors add up to that of all of them: the order ends before the one that would exceed the bound.
    for count in range(1, len(expected)):
        bound = error(expected[:count]) * 1.01
        found = removal_order([reader(weight, rows, np.arange(1, 9), [0] * 5)], 9, np.zeros(9), bound)
        assert len(found) == count


def test_dear_errors_and_small_savings_go_last() -> None:
    rows, weight = mixed(8, 1, 5), np.ones((4, 8, 1))
    one, two = np.arange(1, 9), np.arange(9, 17)
    pair = [reader(weight, rows, one, [0] * 4, 1.0), reader(weight, rows, two, [0] * 4, 1000.0)]
    order = removal_order(pair, 17, np.zeros(17), np.inf)
    assert set(order[:4]) <= set(one.tolist())
    extra = np.where(np.arange(17) > 8, 1e7, 0.0)
    assert set(removal_order(pair, 17, extra, np.inf)[:4]) <= set(two.tolist())


def test_what_stays_is_in_no_order() -> None:
    rows, weight = mixed(8, 1, 6), np.ones((4, 8, 1))
    held = [0, 0, 1, 2, 3, 4, 5, 6]
    order = removal_order([reader(weight, rows, held, [0] * 4)], 7, np.zeros(7), np.inf)
    assert 0 not in order
    assert not removal_order([reader(weight, None, held, [0] * 4)], 7, np.zeros(7), np.inf)


# --- whole runs ---------------------------------------------------------------------------------------------

# Four of the 16 channels behind the first Conv, which has no bias, are mixtures of others; the second has four as well.
NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,4,8,8] x) => (float[N,8] y)
    <float[16,4,3,3] w0, float[16,16,3,3] w1, float[8,256] w2, float[8] b2>
    {
        [first] c0 = Conv <pads = [1,1,1,1]> (x, w0)
        [relu0] r0 = Relu (c0)
        [second] c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (r0, w1)
        [relu1] r1 = Relu (c1)
        [flat] f = Flatten (r1)
        [head] y = Gemm <transB = 1> (f, w2, b2)
    }
"""
SPARE = 4


def redundant(seed: int = 0) -> ModelProto:
    model = parse_model(NET)
    rng = np.random.default_rng(seed)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) / 2)
        if value.name in ("w0", "w1"):  # Relu lets positive multiples through
            array[-SPARE:] = array[:SPARE] * 1.5
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), value.name))
    del model.graph.value_info[:]
    return model


def prepared(folder: Path, model: ModelProto, **changes: Any) -> Config:
    rng = np.random.default_rng(1)
    held = {}
    for split, count in (("train", 2000), ("test", 400)):
        held[f"x_{split}"] = rng.standard_normal((count, 8, 8, 4)).astype(np.float32)
        held[f"y_{split}"] = Runner(model)({"x": held[f"x_{split}"].transpose(0, 3, 1, 2)})[0].argmax(axis=1)
    np.savez(folder / "data.npz", allow_pickle=False, **held)
    data = DataConfig(path="data.npz", base=folder)
    return dataclasses.replace(
        Config(data=data, metric="top1", threads=1, labels=False, delta=2.0, trainer="none", time_limit=60.0), **changes
    )


def test_spare_channels_go_and_the_output_stays(tmp_path: Path) -> None:
    model = redundant()
    config = prepared(tmp_path, model, delta=None, max_params=0.8 * cost.params(model))
    result = conductor.compress(model, config)
    rows = {row.name: row for row in result.report.layers}
    shapes = {name: row.narrowed_shape or () for name, row in rows.items()}
    assert shapes["first"][0] <= 16 - SPARE
    assert shapes["second"][0] <= 16 - SPARE
    assert shapes["second"][1] == shapes["first"][0]
    assert shapes["head"][1] == 16 * shapes["second"][0]
    assert result.model is not None
    assert all(row.form is None for row in rows.values()), "what is left is small enough as it is"
    assert cost.params(result.model) == sum(row.params_after for row in rows.values())
    assert sum(row.params_before for row in rows.values()) == cost.params(model)
    x = np.random.default_rng(5).standard_normal((200, 4, 8, 8)).astype(np.float32)
    wanted, made = (Runner(own)({"x": x})[0] for own in (model, result.model))
    assert ((made - wanted) ** 2).mean() < 0.05 * wanted.var()


def test_where_nothing_is_accepted_the_original_has_all_its_channels(tmp_path: Path) -> None:
    model = redundant()
    with mock.patch.object(conductor, "search", return_value=[]):
        result = conductor.compress(model, prepared(tmp_path, model))
    assert result.model is not None
    assert not result.report.compressed
    assert cost.params(result.model) == cost.params(model)
    assert all(row.narrowed_shape is None for row in result.report.layers)


def test_half_as_many_go_until_what_counts_is_kept(tmp_path: Path) -> None:
    model = redundant()
    config = prepared(tmp_path, model)
    metric = metrics.resolve(config.metric, config.metric_base)
    opened = prepare.open_model(model, "net", config)
    dataset = prepare.open_dataset(opened, metric, config)
    marked = mark(opened, prepare.first_examples(dataset.test, 3), config)
    loss = prepare.choose_loss(marked.model, marked.types, config)

    def spare(kept: Callable[[ModelProto], bool]) -> Removal:
        return spare_channels(marked, loss, dataset.train, 128, False, 1, 0, 60.0, kept)

    whole = spare(lambda own: True)
    assert len(whole.groups) >= 2 * SPARE
    asked: list[int] = []

    def kept(own: ModelProto) -> bool:
        asked.append(cost.params(own))
        return len(asked) == 3

    part = spare(kept)
    assert part.groups == whole.groups[: len(whole.groups) // 4]
    assert asked == sorted(asked)
    assert not spare(lambda own: False).groups
