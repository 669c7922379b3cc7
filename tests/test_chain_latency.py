"""Latency tables: graphs of chains compute what they stand for, times interpolate, costs come from the table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from models_drawn import drawn as drawn_model
from models_drawn import random
from onnx import ModelProto

from onnxneutrino import chain_latency, cost
from onnxneutrino.candidates import fast_ranks, next_fast, point, rank_axes
from onnxneutrino.chain_graph import INPUT, drawn, input_shape, layer_graph
from onnxneutrino.chain_latency import FormTimes, LatencyTable, LayerTimes, measure
from onnxneutrino.factors import Moments
from onnxneutrino.graph import TensorType, element_dtype
from onnxneutrino.layer_options import LayerOptions, cost_unit
from onnxneutrino.plan import Choice, Form, Geometry, Kind, Layer
from onnxneutrino.runtime import Runner, observed_types


def layer(
    shape: tuple[int, ...] = (48, 40, 3, 3), kind: Kind = "conv2d", size: tuple[int, ...] = (6, 6), half: bool = False
) -> Layer:
    kernel = shape[2:]
    conv = kind.startswith("conv")
    axes = len(kernel)
    pads = tuple(k // 2 for k in kernel) * 2 if conv else (0,) * 2 * axes
    geometry = Geometry(kernel, (1,) * axes, pads, (1,) * axes)
    positions = math.prod(geometry.output_size(*size)) if kind != "matmul" else 5
    return Layer(
        "layer", "Conv", kind, "x", "y", ("layer",), random(*shape), random(shape[0]), geometry, size, positions,
        shape, half, ("w", "b"),
    )  # fmt: skip


LAYERS: Mapping[str, Layer] = {
    "conv2d": layer(),
    "conv1d": layer((24, 16, 3, 1), "conv1d", (10, 1)),
    "conv3d": layer((16, 16, 3, 3, 3), "conv3d", (4, 4, 4)),
    "gemm": layer((24, 40, 1, 1), "gemm", (1, 1)),
    "matmul": layer((24, 40, 1, 1), "matmul", (1, 1)),
    "map": layer((24, 16, 4, 4), "map", (4, 4)),
    "half": layer(half=True),
}
FORMS_OF: Mapping[str, tuple[Form, tuple[int, ...]]] = {
    "conv2d": ("tucker2", (8, 4)),
    "conv1d": ("channel", (8,)),
    "conv3d": ("input", (4,)),
    "gemm": ("svd", (8,)),
    "matmul": ("svd", (8,)),
    "map": ("spatial_hv", (8,)),
    "half": ("cp", (8,)),
}


def macs(model: ModelProto) -> int:
    (given,) = model.graph.input
    kind = given.type.tensor_type
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    known = {given.name: TensorType(shape, element_dtype(kind.elem_type))}
    return cost.macs(model, observed_types(model, known, {given.name: shape}))


def run(model: ModelProto, own: Layer) -> list[Any]:
    return Runner(model)({INPUT: drawn(*input_shape(own)).astype(np.float16 if own.half else np.float32)})


@pytest.mark.parametrize("name", LAYERS)
def test_graphs_of_layers_and_chains_cost_what_these_do(name: str) -> None:
    own = LAYERS[name]
    choice = Choice(*FORMS_OF[name])
    for wanted, expected in ((None, own.macs), (choice, point(own, choice).macs)):
        for copies in (1, 3):
            model = layer_graph(own, wanted, copies=copies)
            found = run(model, own)
            assert len(found) == copies
            assert macs(model) == copies * expected
            assert all(np.isfinite(output).all() for output in found)
            rows = own.positions if own.kind == "matmul" else 1
            assert all(output.size == own.weight.shape[0] * rows for output in found)


def test_a_second_pool_stands_beside_the_first() -> None:
    own = LAYERS["conv2d"]
    largest, mean = run(layer_graph(own, None, pools=2), own)
    assert (largest >= mean).all()
    assert (largest > mean).any()
    (call,) = run(layer_graph(own, None, copies=0), own)
    np.testing.assert_array_equal(call, np.maximum(drawn(*input_shape(own)), 0))


@pytest.mark.parametrize("top", [1, 3, 4, 17, 31, 32, 40, 64, 200, 4096])
def test_fast_ranks_are_whole_blocks_or_below_two_of_them(top: int) -> None:
    found = fast_ranks(top, 24)
    assert found == sorted(set(found))
    assert 0 < len(found) <= 26
    assert found[-1] <= top < found[-1] + (4 if top < 32 else 16)
    assert all(rank % 16 == 0 or (rank < 32 and rank % 4 == 0) or top < 4 for rank in found)


def test_ranks_take_time_like_the_next_fast_one() -> None:
    assert [next_fast(rank) for rank in (1, 4, 5, 13, 16, 17, 32, 33)] == [4, 4, 8, 16, 16, 32, 32, 48]


def test_times_between_measured_ranks_are_linear_and_beyond_them_none() -> None:
    one = FormTimes(((4, 16, 64),), np.array([1.0, 2.0, 5.0]))
    assert [one.at((rank,)) for rank in (4, 16, 64)] == [1.0, 2.0, 5.0]
    assert one.at((32,)) == pytest.approx(3.0)
    assert one.at((17,)) == one.at((32,)), "a begun block takes as long as a whole one"
    assert one.at((1,)) == 1.0
    assert one.at((80,)) == math.inf
    pair = FormTimes(((16, 48), (16, 80)), np.array([[1.0, 3.0], [2.0, 8.0]]))
    assert pair.at((32, 48)) == pytest.approx((1 + 3 + 2 + 8) / 4)
    odd = FormTimes(((4, 17),), np.array([1.0, 2.0]))
    assert odd.at((17,)) == 2.0
    with pytest.raises(ValueError, match="times"):
        FormTimes(((4, 16),), np.zeros(3))


def test_a_form_that_was_not_measured_is_no_option() -> None:
    own = LayerTimes(2.0, {"svd": FormTimes(((4,),), np.array([1.0]))})
    assert own.ms(None) == 2.0
    assert own.ms(Choice("svd", (4,))) == 1.0
    assert own.ms(Choice("channel", (4,))) == math.inf
    assert own.scaled(0.5).ms(Choice("svd", (3,))) == 0.5


TWO = """g (float[1,32,8,8] x) => (float[1,48,8,8] y)
<float[48,32,3,3] w, float[48] b, float[48,48,3,3] v>
{ h = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu(h) y = Conv <pads=[1,1,1,1]> (r, v) }"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Runs take no time but what a model of it says: 10 for a call, and MACs in millions."""
    overhead = [10.0]

    class Fake:
        def __init__(self, model: ModelProto, threads: int, spinning: bool) -> None:
            assert threads == 1
            assert spinning
            pools = sum("Global" in node.op_type for node in model.graph.node)
            self.ms = overhead[0] + pools + macs(model) / 1e6

    def timed(runners: Sequence[Fake], inputs: Sequence[Any], turns: int, seconds: float = 0.0) -> list[float]:
        drift = next(drifts)  # the cores are now slower, now faster
        return [drift * runner.ms for runner in runners]

    drifts: Iterator[float] = itertools.cycle((1.0, 2.0, 0.7))
    monkeypatch.setattr(chain_latency, "Runner", Fake)
    monkeypatch.setattr(chain_latency, "timed", timed)
    return lambda ms: overhead.__setitem__(0, ms)


def two_layers() -> tuple[ModelProto, list[Layer]]:
    own = layer((48, 32, 3, 3), size=(8, 8))
    same = layer((48, 48, 3, 3), size=(8, 8))
    return drawn_model(TWO), [replace(own, name="first"), replace(same, name="second")]


def test_a_table_is_free_of_overheads_and_of_the_speed_of_the_moment(clock: Callable[[float], None]) -> None:
    model, layers = two_layers()
    table = measure(model, layers, {}, 1, 60.0)
    assert table.total == pytest.approx(10.0 + sum(own.macs for own in layers) / 1e6)
    assert table.rest == pytest.approx(10.0)
    for own in layers:
        times = table.layers[own.name]
        assert times.whole == pytest.approx(own.macs / 1e6)
        for form, measured in times.forms.items():
            for ranks in itertools.product(*measured.axes):
                choice = Choice(form, ranks)
                assert times.ms(choice) == pytest.approx(point(own, choice).macs / 1e6)


def test_the_time_given_decides_how_many_ranks_are_measured(clock: Callable[[float], None]) -> None:
    model, layers = two_layers()
    fine, coarse = (measure(model, layers, {}, 1, seconds).layers["second"].forms for seconds in (60.0, 0.0))
    for form, times in fine.items():
        assert times.ms.size > coarse[form].ms.size
        assert [len(ranks) for ranks in coarse[form].axes] == [2] * len(times.axes)
        offered = rank_axes(layers[1], form, fast_ranks)
        for ranks, few in zip(offered, coarse[form].axes, strict=True):
            assert (few[0], few[-1]) == (ranks[0], ranks[-1])


def test_layers_that_take_longer_alone_are_scaled_to_the_network(clock: Callable[[float], None]) -> None:
    model, layers = two_layers()
    clock(0.0)
    # The same layer twice: more than the network holds.
    extra = [*layers, *(replace(own, name=f"{own.name} again") for own in layers)]
    table = measure(model, extra, {}, 1, 60.0)
    assert table.rest == 0.0
    assert table.total == pytest.approx(sum(own.macs for own in layers) / 1e6, rel=1e-6)


def test_a_layer_in_two_places_costs_both(clock: Callable[[float], None]) -> None:
    model, (_, own) = two_layers()
    wide = replace(own, input_size=(16, 16), positions=256)
    table = measure(model, [replace(own, others=(wide,))], {}, 1, 60.0)
    alone = measure(model, [own], {}, 1, 60.0)
    choice = Choice("channel", (16,))
    factor = table.layers["second"].whole / alone.layers["second"].whole
    assert table.layers["second"].ms(choice) / alone.layers["second"].ms(choice) == pytest.approx(factor)


def test_measured_times_are_positive_and_of_every_form() -> None:
    model, layers = two_layers()
    table = measure(model, layers[1:], {"x": random(1, 32, 8, 8)}, 1, 0.0)
    times = table.layers["second"]
    assert set(times.forms) == {"channel", "input", "spatial_hv", "spatial_vh", "tucker2", "cp"}
    assert all((own.ms > 0).all() for own in times.forms.values())
    assert times.whole > 0


def options_at(ms: Callable[[int], float]) -> LayerOptions:
    """Options of a layer of 10 ms whose chains take `ms` of their largest rank."""
    own = layer((64, 64, 3, 3))
    forms = {}
    for form in ("channel", "spatial_hv"):
        (ranks,) = rank_axes(own, form, fast_ranks)
        forms[form] = FormTimes((tuple(ranks),), np.array([ms(rank) for rank in ranks]))
    table = LatencyTable({"layer": LayerTimes(10.0, forms)}, 1.0)
    rows = random(500, own.patch, seed=1)
    moments = Moments(np.zeros(own.patch, np.float32), 500, rows=rows)
    return LayerOptions(own, moments, table)


def test_options_cost_their_times_and_have_fast_ranks() -> None:
    found = options_at(lambda rank: rank / 8)
    assert found.whole.cost == 10.0
    assert len(found.options) > 3
    for option in found.options:
        if option.choice is not None:
            assert option.cost == option.choice.ranks[0] / 8
            assert option.choice.ranks[0] in fast_ranks(option.choice.ranks[0], 24)


def test_a_chain_slower_than_its_layer_is_no_option() -> None:
    found = options_at(lambda rank: 9.5 if rank > 16 else 2.0)
    assert {option.choice.ranks for option in found.options if option.choice} <= {(4,), (8,), (16,)}
    assert options_at(lambda rank: 11.0).options == [found.whole]


def test_truncations_of_a_trained_chain_have_fast_ranks() -> None:
    first = options_at(lambda rank: rank / 8)
    current = first.factors(Choice("spatial_hv", (48,)))
    own = LayerOptions(first.layer, first._moments, LatencyTable({"layer": table_of(first)}, 0.0), current)
    ranks = {option.choice.ranks[0] for option in own.options if option.choice}
    assert ranks <= {4, 8, 16, 32, 48}
    assert 48 in ranks


def table_of(own: LayerOptions) -> LayerTimes:
    (ranks,) = rank_axes(own.layer, "spatial_hv", fast_ranks)
    return LayerTimes(10.0, {"spatial_hv": FormTimes((tuple(ranks),), np.array(ranks) / 8)})


def test_the_unit_of_a_table_is_its_ms() -> None:
    own = layer()
    table = LatencyTable({"layer": LayerTimes(3.0, {"channel": FormTimes(((16,),), np.array([1.5]))})}, 0.5)
    assert table.total == 3.5
    assert cost_unit(own, table)(point(own, Choice("channel", (16,)))) == 1.5
