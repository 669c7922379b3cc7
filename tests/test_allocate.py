"""Allocation against enumeration, candidates against what the chains cost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxneutrino.allocate import Option, allocate, hull, ladder, total_cost, total_loss
from onnxneutrino.candidates import Point, candidates, cp_challenger, options, point, rank_grid
from onnxneutrino.factors import Moments, chain_macs, stage_geometries
from onnxneutrino.forms import applicable, decompose_all
from onnxneutrino.moments import MomentSum
from onnxneutrino.plan import Array, Choice, Geometry, Layer


def option(cost: float, loss: float) -> Option:
    return Option(Choice("svd", (int(cost) + 1,)), cost, loss)


def best_loss(problem: dict[str, list[Option]], budget: float) -> float:
    """Least summed loss within the budget, by enumeration."""
    return min(
        math.fsum(o.loss for o in pick)
        for pick in itertools.product(*problem.values())
        if math.fsum(o.cost for o in pick) <= budget
    )


PROBLEMS = st.dictionaries(
    st.text("abcde", min_size=1, max_size=2),
    st.lists(st.builds(option, st.integers(0, 60), st.floats(0, 10)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(problem=PROBLEMS, share=st.floats(0, 1))
def test_allocation_is_within_budget_and_near_the_best(problem: dict[str, list[Option]], share: float) -> None:
    low = math.fsum(min(o.cost for o in own) for own in problem.values())
    high = math.fsum(max(o.cost for o in own) for own in problem.values())
    budget = low + share * (high - low)
    plan = allocate(problem, budget)
    assert set(plan) == set(problem)
    assert all(plan[name] in own for name, own in problem.items())
    assert total_cost(plan) <= budget
    # Cells are rounded up: at worst each layer loses one of the 2048 cells of the budget.
    reachable = best_loss(problem, budget - (high - low) * len(problem) / 2048) if share > 0.01 else math.inf
    assert best_loss(problem, budget) - 1e-9 <= total_loss(plan) <= reachable + 1e-9


def curves(layers: int, seed: int) -> dict[str, list[Option]]:
    """Layers with losses that fall about exponentially with the share of the cost that is kept."""
    generator = np.random.default_rng(seed)
    problem = {}
    for index in range(layers):
        size, weight, speed = np.exp(generator.uniform((6, -2, 0.5), (13, 2, 2)))
        shares = np.sort(generator.random(40))
        losses = weight * np.exp(-speed * shares) * generator.uniform(0.8, 1.2, 40)
        problem[str(index)] = [option(float(c), float(v)) for c, v in zip(size * shares, losses, strict=True)]
        problem[str(index)].append(Option(None, float(size), 0.0))
    return problem


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_used(seed: int) -> None:
    problem = curves(20, seed)
    full = math.fsum(own[-1].cost for own in problem.values())
    lower = math.inf
    for ratio in (10, 5, 2):
        plan = allocate(problem, full / ratio)
        assert 0.99 * full / ratio <= total_cost(plan) <= full / ratio
        assert total_loss(plan) < lower
        lower = total_loss(plan)
        # No plan beats the Lagrangian bound: min of loss + m (cost - budget), layer by layer, for any m >= 0.
        bound = max(
            sum(min(o.loss + m * o.cost for o in own) for own in problem.values()) - m * full / ratio
            for m in np.geomspace(1e-9, 1e-1, 400)
        )
        assert bound - 1e-9 <= total_loss(plan) <= bound * 1.02


def test_a_budget_below_the_cheapest_gives_the_cheapest() -> None:
    problem = {"a": [option(4, 1), option(3, 2)], "b": [option(5, 0)]}
    plan = allocate(problem, 7.9)
    assert plan == {"a": option(3, 2), "b": option(5, 0)}
    assert total_cost(allocate(problem, 8)) == 8


def test_an_ample_budget_keeps_every_layer() -> None:
    problem = {name: [*(option(c, 9 - c) for c in range(9)), Option(None, 9, 0.0)] for name in "abc"}
    assert {o.choice for o in allocate(problem, 27).values()} == {None}


def test_options_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one option"):
        allocate({"a": []}, 1)
    with pytest.raises(ValueError, match="loss nan"):
        allocate({"a": [option(1, math.nan)]}, 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(option, st.integers(0, 50), st.floats(0, 10)), min_size=1, max_size=20))
def test_ladders_fall_and_hulls_are_convex(own: list[Option]) -> None:
    steps = ladder(own)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(steps))
    assert all(any(s.cost <= o.cost and s.loss <= o.loss for s in steps) for o in own)
    corners = hull(steps)
    slopes = [(a.loss - b.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes, reverse=True)
    assert (corners[0], corners[-1]) == (steps[0], steps[-1])
    for middle in steps:
        for a, b in itertools.pairwise(corners):
            if a.cost <= middle.cost <= b.cost:
                line = a.loss + (b.loss - a.loss) * (middle.cost - a.cost) / (b.cost - a.cost)
                assert middle.loss >= line - 1e-9


def conv(shape: tuple[int, int, int, int] = (24, 16, 3, 3), strides: tuple[int, int] = (2, 1)) -> Layer:
    generator = np.random.default_rng(0)
    weight = (
        generator.standard_normal(shape).astype(np.float32) / np.sqrt(np.arange(1, shape[0] + 1))[:, None, None, None]
    )
    pads = (shape[2] // 2, shape[3] // 2, shape[2] // 2, 0)
    geometry = Geometry((shape[2], shape[3]), strides, pads, (1, 1))
    height, width = geometry.output_size(9, 7)
    return Layer(
        name="conv",
        op="Conv",
        kind="conv2d",
        input="x",
        output="y",
        nodes=("conv",),
        weight=weight.astype(np.float32),
        bias=np.zeros(shape[0], np.float32),
        geometry=geometry,
        input_size=(9, 7),
        positions=height * width,
        weight_shape=shape,
    )


def moments(layer: Layer) -> Moments:
    size = layer.weight[0].size
    generator = np.random.default_rng(1)
    mixing = generator.standard_normal((size, size)) / np.sqrt(np.arange(1, size + 1))
    rows: Array = np.maximum(generator.standard_normal((5 * size, size)) @ mixing.T, 0).astype(np.float32)
    total = MomentSum(size)
    total.add(rows)
    return total.moments()


@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (24, 16, 3, 1), (24, 16, 1, 1), (8, 20, 2, 5)])
def test_costs_from_shapes_are_those_of_the_chains(shape: tuple[int, int, int, int]) -> None:
    layer = conv(shape)
    decompositions = decompose_all(layer.weight, layer.bias, moments(layer))
    assert tuple(decompositions) == applicable(shape)
    for form, decomposition in decompositions.items():
        ranks = (3, 4) if form == "tucker2" else (3,)
        factors = decomposition.factors(ranks)
        counted = 0
        size = layer.input_size
        for stage, own in zip(factors.written, stage_geometries(factors.written, layer.geometry), strict=True):
            size = own.output_size(*size)
            counted += size[0] * size[1] * stage.weight.size
        costs = point(layer, Choice(form, ranks))
        assert costs.params == factors.params
        assert costs.macs == counted == chain_macs(factors.written, layer.geometry, layer.input_size)


def test_macs_of_a_matmul_count_every_position() -> None:
    layer = conv((24, 16, 1, 1), (1, 1))
    matmul = Layer(**{**vars(layer), "kind": "matmul", "geometry": Geometry(), "input_size": (1, 1), "positions": 50})
    assert matmul.macs == 50 * 24 * 16
    assert point(matmul, Choice("svd", (5,))).macs == 50 * 5 * (24 + 16)


def test_candidates_gain_something_and_carry_their_errors() -> None:
    layer = conv()
    decompositions = decompose_all(layer.weight, layer.bias, moments(layer))
    points = candidates(layer, decompositions)
    assert points[0] == Point(None, layer.params, layer.macs, 0.0)
    assert {p.choice.form for p in points if p.choice} == set(applicable(layer.weight.shape)) - {"cp"}
    for p in points[1:]:
        assert p.choice is not None
        assert p.params < layer.params or p.macs < layer.macs
        assert 0 <= p.error <= 1
    sample = points[len(points) // 2]
    assert sample.choice is not None
    factors = decompositions[sample.choice.form].factors(sample.choice.ranks)
    assert (factors.params, factors.error) == (sample.params, pytest.approx(sample.error, abs=1e-9))


def test_options_of_either_cost_are_ladders_up_to_the_layer_itself() -> None:
    layer = conv()
    points = candidates(layer, decompose_all(layer.weight, layer.bias, moments(layer)))
    for cost, whole in ((lambda p: p.params, layer.params), (lambda p: p.macs, layer.macs)):
        own = options(points, cost, sensitivity=3.0)
        assert own == ladder(own)
        assert (own[-1].cost, own[-1].loss) == (whole, 0.0)
        assert own[0].loss <= 3.0


@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (64, 16, 1, 1), (10, 8, 3, 1)])
def test_rank_grids_are_dense_where_small_and_rounded_where_large(shape: tuple[int, int, int, int]) -> None:
    layer = conv(shape)
    for form in applicable(shape):
        grid = rank_grid(layer, form)
        if form == "interpolative":  # from where it saves a tenth of the chain, which in some layers is nowhere
            assert all(r >= 0.1 * (shape[0] + layer.patch) for (r,) in grid)
            assert grid or shape[2:] != (1, 1)
            continue
        for axis in range(len(grid[0])):
            ranks = sorted({r[axis] for r in grid})
            assert ranks[0] == 1
            assert len(ranks) <= 25
            assert all(r % 8 == 0 for r in ranks if r >= 64)
            if shape[0] == 512:
                gaps = np.diff(ranks)
                assert gaps[-1] >= gaps[0]
                assert len(ranks) >= 12


def test_cp_takes_a_layer_only_where_it_is_better_at_no_more_cost() -> None:
    layer = conv()
    decompositions = decompose_all(layer.weight, layer.bias, moments(layer))
    cp = decompositions["cp"]

    def params(p: Point) -> float:
        return p.params

    chosen = Option(Choice("channel", (4,)), 800.0, 1.0)
    better = cp_challenger(layer, chosen, cp, params)
    assert better.choice is not None
    assert better.choice.form == "cp"
    assert better.cost <= 800 < params(point(layer, Choice("cp", (better.choice.ranks[0] + 1,))))
    assert better.loss == pytest.approx(cp.factors(better.choice.ranks).error, abs=1e-9)
    unbeatable = Option(Choice("channel", (4,)), 800.0, 0.0)
    assert cp_challenger(layer, unbeatable, cp, params) is unbeatable
    too_small = Option(Choice("channel", (1,)), 10.0, 1.0)
    assert cp_challenger(layer, too_small, cp, params) is too_small
    kept = Option(None, 1e6, 0.0)
    assert cp_challenger(layer, kept, cp, params) is kept
