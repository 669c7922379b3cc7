"""Options of one layer: their costs are those of real chains, their losses those of real outputs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from onnxneutrino.candidates import Point
from onnxneutrino.factors import Factors, Moments, chain_macs
from onnxneutrino.forms import applicable, decompose, full_ranks
from onnxneutrino.layer_options import LayerOptions, Target, cost_unit
from onnxneutrino.moments import MomentSum
from onnxneutrino.plan import Array, Form, Geometry, Kind, Layer

ROWS = 2000


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(shape: tuple[int, int, int, int] = (24, 12, 3, 3), kind: Kind = "conv2d", half: bool = False) -> Layer:
    """A layer whose weight's spectrum falls, as that of a trained one does."""
    outputs = shape[0]
    flat = normal(outputs, int(np.prod(shape[1:])))
    left, values, right = np.linalg.svd(flat, full_matrices=False)
    weight = (left * (values / np.arange(1, len(values) + 1))) @ right
    geometry = Geometry(shape[2:], pads=(1, 1, 1, 1)) if kind == "conv2d" else Geometry()
    size = (8, 8) if kind == "conv2d" else (1, 1)
    return Layer(
        "layer", "Conv", kind, "x", "y", ("layer",), weight.reshape(shape).astype(np.float32), normal(outputs, seed=1),
        geometry, size, 64 if kind == "conv2d" else 1, shape, half, ("w", "b"),
    )  # fmt: skip


def rows_of(own: Layer) -> Array:
    size = own.weight[0].size
    mixing = normal(size, size, seed=3) / np.arange(1, size + 1)
    return np.asarray(normal(ROWS, size, seed=2) @ mixing + 0.3, np.float32)


def moments(own: Layer) -> Moments:
    total = MomentSum(own.weight[0].size)
    total.add(rows_of(own))
    return total.moments()


def output_error(own: Layer, factors: Factors) -> float:
    """`E|y - y'|² / E|y - mean y|²` on the rows, by running layer and chain."""
    rows = rows_of(own).astype(np.float64)
    wanted = rows @ own.weight.reshape(len(own.weight), -1).T + own.bias
    got = rows @ factors.product().reshape(len(own.weight), -1).T + factors.bias
    return float(np.sum((wanted - got) ** 2) / np.sum((wanted - wanted.mean(axis=0)) ** 2))


def trained(own: Layer, form: Form, ranks: tuple[int, ...]) -> tuple[Layer, Factors]:
    """The layer after a chain of this form was fine-tuned: its factors moved, its weight is their product."""
    factors = decompose(form, own.weight, own.bias, moments(own)).factors(ranks)
    stages = tuple(
        replace(stage, weight=stage.weight * (1 + 0.05 * normal(*stage.weight.shape, seed=index)))
        for index, stage in enumerate(factors.stages)
    )
    factors = replace(factors, stages=stages, bias=factors.bias + 0.1, error=float("nan"))
    return replace(own, weight=factors.product(), bias=factors.bias), factors


@pytest.mark.parametrize("objective", ["params", "macs", "size", "memory"])
@pytest.mark.parametrize(("shape", "kind"), [((24, 12, 3, 3), "conv2d"), ((24, 40, 1, 1), "gemm")])
def test_options_cost_what_their_chains_do_and_lose_what_their_outputs_do(
    objective: str, shape: tuple[int, int, int, int], kind: Kind
) -> None:
    own = layer(shape, kind)
    found = LayerOptions(own, moments(own), objective)
    assert found.whole in found.options
    assert found.whole.loss == 0.0
    weights = 4.0 if objective in ("size", "memory") else 1.0
    unit = objective == "macs"
    assert found.whole.cost == (own.macs if unit else weights * own.params)
    factorized = [option for option in found.options if option.choice is not None]
    assert len(factorized) > 5
    for option in factorized[:: max(1, len(factorized) // 6)]:
        assert option.choice is not None
        factors = found.factors(option.choice)
        assert (factors.form, factors.ranks) == (option.choice.form, option.choice.ranks)
        macs = chain_macs(factors.written, own.geometry, own.input_size)
        assert option.cost == (macs if unit else weights * factors.params)
        assert option.loss == pytest.approx(output_error(own, factors), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("objective", ["params", "macs"])
def test_options_rise_in_cost_and_fall_in_loss(objective: str) -> None:
    own = layer()
    found = LayerOptions(own, moments(own), objective).options
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(found))
    assert found[-1].choice is None


def test_half_weights_take_two_bytes() -> None:
    point = Point(None, 100, 7, 0.0)
    assert cost_unit(layer(half=True), "size")(point) == 200
    assert cost_unit(layer(), "size")(point) == 400


CHAINS: list[tuple[Form, tuple[int, ...]]] = [
    ("channel", (9,)),
    ("input", (7,)),
    ("spatial_hv", (12,)),
    ("spatial_vh", (12,)),
    ("tucker2", (8, 10)),
    ("cp", (14,)),
]


@pytest.mark.parametrize(("form", "ranks"), CHAINS)
def test_a_trained_chain_is_its_own_option_at_no_loss_and_its_truncations_cost_less(
    form: Form, ranks: tuple[int, ...]
) -> None:
    own, factors = trained(layer(), form, ranks)
    found = LayerOptions(own, moments(own), "params", factors)
    assert {option.choice.form if option.choice else None for option in found.options} == {form}, "forms are frozen"
    itself = found.options[-1]
    assert itself.choice is not None
    assert (itself.choice.ranks, itself.loss, itself.cost) == (ranks, 0.0, factors.params)
    assert found.factors(itself.choice) is factors
    truncated = found.options[:-1]
    assert truncated
    for option in truncated:
        assert option.choice is not None
        assert all(r <= top for r, top in zip(option.choice.ranks, ranks, strict=True))
        assert option.cost < factors.params
        assert option.loss > 0
    # The surrogate's loss is measured from the trained chain, not from the original.
    for option in truncated[:: max(1, len(truncated) // 4)]:
        assert option.choice is not None
        smaller = found.factors(option.choice)
        assert smaller.params == option.cost
        assert option.loss == pytest.approx(output_error(own, smaller), rel=0.05, abs=2e-3)


def test_a_chain_of_rank_one_stays_as_it_is() -> None:
    own, factors = trained(layer(), "channel", (1,))
    found = LayerOptions(own, moments(own), "params", factors)
    assert [option.choice.ranks for option in found.options if option.choice] == [(1,)]
    own, factors = trained(layer(), "cp", (1,))
    found = LayerOptions(own, moments(own), "params", factors)
    assert found.options[-1].loss == 0.0


def test_the_full_rank_of_every_form_loses_nothing() -> None:
    own = layer((10, 8, 3, 3))
    found = LayerOptions(own, moments(own), "params")
    for form in applicable(own.weight.shape):
        if form != "cp":
            assert output_error(own, found.fits[form].factors(full_ranks(form, own.weight.shape))) < 1e-6


def test_a_challenger_costs_no_more_and_loses_at_most_half() -> None:
    """A weight that is exactly CP of rank 6, which the other forms cannot write so cheaply."""
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal((size, 6)) for size in (24, 12, 3, 3))
    own = replace(layer(), weight=np.einsum("or,ir,hr,wr->oihw", a, b, c, d).astype(np.float32))
    found = LayerOptions(own, moments(own), "params")
    swaps = [(option, found.challenger(option)) for option in found.options]
    swaps = [(option, swapped) for option, swapped in swaps if swapped != option]
    assert len(swaps) >= 3
    for option, swapped in swaps:
        assert swapped.choice is not None
        assert swapped.choice.form == "cp"
        assert swapped.cost <= option.cost
        assert swapped.loss <= 0.5 * option.loss
        assert swapped.cost == found.factors(swapped.choice).params
    assert found.challenger(found.whole) == found.whole


def test_without_cp_there_is_no_challenger() -> None:
    own = layer((24, 40, 1, 1), "gemm")
    found = LayerOptions(own, moments(own), "params")
    assert all(found.challenger(option) == option for option in found.options)


def test_hard_targets_count_every_cost_in_shares_of_its_limit() -> None:
    own = layer()
    targets = (Target("params", 500.0, "params", 10.0), Target("macs", 9000.0, "macs", 0.0))
    found = LayerOptions(own, moments(own), targets)
    counts = {kind: LayerOptions(own, moments(own), kind) for kind in ("params", "macs")}
    assert found.whole.cost == pytest.approx(sum(counts[t.name].whole.cost / t.limit for t in targets))
    for option in found.options:
        assert option.cost == pytest.approx(sum(option.costs))
    for index, target in enumerate(targets):
        costs = {option.choice: option.costs[index] * target.limit for option in found.options}
        for option in counts[target.name].options:
            assert option.choice not in costs or costs[option.choice] == pytest.approx(option.cost)


def test_with_hard_targets_an_option_goes_only_where_another_is_better_in_every_cost() -> None:
    own = layer()
    targets = (Target("params", 500.0, "params", 0.0), Target("macs", 9000.0, "macs", 0.0))
    kept = LayerOptions(own, moments(own), targets).options
    for one, other in itertools.permutations(kept, 2):
        better = all(a <= b for a, b in zip(one.costs, other.costs, strict=True)) and one.loss <= other.loss
        assert not better, f"{one} makes {other} useless"
    for kind in ("params", "macs"):
        index = [target.name for target in targets].index(kind)
        alone = LayerOptions(own, moments(own), kind).options
        for option in alone:
            limit = option.cost / targets[index].limit * (1 + 1e-9)
            best = min(each.loss for each in kept if each.costs[index] <= limit)
            assert best <= option.loss * (1 + 1e-9), "what one cost alone would choose, or better, is still there"
