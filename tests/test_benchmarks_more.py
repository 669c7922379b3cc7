"""The benchmarks ablation, allocation and overhead: what they switch off, draw and compute."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import allocation  # noqa: E402
import overhead  # noqa: E402
from cells import Settings  # noqa: E402

from onnxneutrino import conductor, search, tuning  # noqa: E402
from onnxneutrino.allocate import Option, allocate, total_cost  # noqa: E402
from onnxneutrino.config import load_config  # noqa: E402
from onnxneutrino.layer_options import chains  # noqa: E402
from onnxneutrino.plan import Choice  # noqa: E402
from onnxneutrino.proposals import POWERS, predicted  # noqa: E402
from onnxneutrino.sensitivity import Curve  # noqa: E402
from onnxneutrino.workbench import Workbench  # noqa: E402

DIGITS = ROOT / "fixtures" / "digits.onnx"
CURVES = {"a": Curve(((0.1, 0.01), (0.4, 0.2))), "b": Curve(((0.1, 0.3), (0.4, 0.9))), "c": Curve()}


@pytest.fixture(scope="module")
def judged() -> allocation.Judged:
    return allocation.judged_task(DIGITS, "params", 0, 1)


@pytest.fixture(scope="module")
def full(judged: allocation.Judged) -> Workbench:
    return Workbench(judged.task, 60.0, images=64)


# --- ablation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_variant_replaces_what_is_there_and_puts_it_back(name: str) -> None:
    variant = ablation.VARIANTS[name]

    def now() -> list[Any]:
        found = []
        for path in variant.patches:
            own: Any = sys.modules[f"onnxneutrino.{path.split('.')[0]}"]
            for part in path.split(".")[1:]:
                own = getattr(own, part)
            found.append(own)
        return found

    before = now()
    with ablation.switched_off(variant):
        assert now() == list(variant.patches.values())
        assert all(a is not b for a, b in zip(now(), before, strict=True))
    assert now() == before
    given = {"time_limit": 60.0, **variant.options}
    config = load_config(DIGITS, given)
    assert {key: getattr(config, key) for key in given} == given
    assert variant.patches or variant.options or name == "full"


def test_a_name_that_is_gone_is_not_passed_over() -> None:
    with pytest.raises(AttributeError), ablation.switched_off(ablation.Variant("", {"search.no_such_name": None})):
        pass


def forms(bench: Workbench) -> set[str]:
    options, _ = bench.options(None)
    return {option.choice.form for own in options.values() for option in own if option.choice is not None}


def test_one_form_leaves_one_form(judged: allocation.Judged, full: Workbench) -> None:
    with ablation.switched_off(ablation.VARIANTS["channel"]):
        assert forms(Workbench(judged.task, 60.0, images=64)) == {"svd", "channel"}
    assert forms(full) > {"svd", "channel"}


@pytest.mark.parametrize("variant", ["full", "refit"])
def test_without_refit_a_network_is_its_fits(full: Workbench, variant: str) -> None:
    with ablation.switched_off(ablation.VARIANTS[variant]):
        own = full.propose(None, full.full_cost / 8, "eighth")
    fitted = chains(full._fitted(None), own.choices, 1)
    same = [
        np.array_equal(stage.weight, other.weight)
        for name, factors in own.network.factors.items()
        for stage, other in zip(factors.stages, fitted[name].stages, strict=True)
    ]
    assert all(same) == (variant == "refit")


def test_weighting_and_sensitivity_are_left_out(judged: allocation.Judged, full: Workbench) -> None:
    assert full._curvature
    assert all(curve.points for curve in full.sensitivities().values())
    with ablation.switched_off(ablation.VARIANTS["curvature"]):
        assert not Workbench(judged.task, 60.0, images=64)._curvature
    with ablation.switched_off(ablation.VARIANTS["sensitivity"]):
        curves = Workbench(judged.task, 60.0, images=64).sensitivities()
    assert list(curves) == list(full.sensitivities())
    assert all(curve(0.3) == 0.3 for curve in curves.values())


def test_nothing_is_remembered_without_memory() -> None:
    asked = []

    def answer() -> list[Any]:
        asked.append(1)
        return [np.zeros(3)]

    for variant, times in (("full", 1), ("memory", 3)):
        asked.clear()
        with ablation.switched_off(ablation.VARIANTS[variant]):
            memory = tuning.Memory()
        for _ in range(3):
            memory(("key", 0), answer)
        assert len(asked) == times


def test_the_table_has_the_sum_of_all_steps_and_tells_of_failures() -> None:
    about = {"model": "net", "settings": vars(Settings(8, "params", 1, 0, 2))}
    good = {
        **about,
        "variant": "full",
        "original": {"params": 300, "macs": 1000},
        "result": {"params": 100, "macs": 250},
        "drop": 0.5,
        "drop_interval": {"low": 0.1, "high": 0.9},
        "compressed": True,
        "report": {"training": [{"steps": 7}, {"steps": 35}]},
        "process_seconds": 90.0,
        "versions": {"onnx": "1.2"},
    }
    text = ablation.document([good, {**about, "variant": "trim", "failed": "it broke"}], about["settings"])
    assert "| everything | 3.00x | 4.00x | 0.50 | 0.10 to 0.90 | 42 | 1.5 |" in text
    assert "no trimming: failed, it broke" in text
    assert "`search.trim`" in text


# --- allocation -------------------------------------------------------------------------------------------------


def options(seed: int) -> dict[str, list[Option]]:
    generator = np.random.default_rng(seed)
    return {
        layer: [
            Option(Choice("svd", (rank,)), 10.0 * rank, float(generator.uniform(0.5, 1) / rank)) for rank in range(1, 9)
        ]
        for layer in CURVES
    }


def test_perturbed_plans_differ_and_keep_the_budget() -> None:
    plans = allocation.perturbed_plans(options(0), CURVES, 120.0, 8, 0)
    assert len(plans) == 8
    assert all(total_cost(plan) <= 120 for plan in plans)
    assert len({tuple(plan[layer].cost for layer in CURVES) for plan in plans}) == 8
    assert all(plan[layer] in options(0)[layer] for plan in plans for layer in CURVES)


def test_without_spread_the_plans_are_those_of_the_surrogates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "SPREAD", 0.0)
    found = allocation.perturbed_plans(options(1), CURVES, 120.0, 12, 0)
    wanted = []
    for power in POWERS:
        losses = {
            layer: [Option(o.choice, o.cost, predicted(o.loss, CURVES[layer], power)) for o in own]
            for layer, own in options(1).items()
        }
        plan = {layer: option.choice for layer, option in allocate(losses, 120.0).items()}
        wanted += [plan] if plan not in wanted else []
    assert [{layer: option.choice for layer, option in plan.items()} for plan in found] == wanted


def test_predictions_are_sums_of_errors_and_of_divergences() -> None:
    plan = {layer: own[2] for layer, own in options(2).items()}
    found = allocation.predictions(plan, CURVES)
    errors = [option.loss for option in plan.values()]
    divergences = [CURVES[layer](option.loss) for layer, option in plan.items()]
    assert found["power 0"] == pytest.approx(sum(errors))
    assert found["power 1"] == pytest.approx(sum(divergences))
    assert found["power 0.5"] == pytest.approx(sum(math.sqrt(a * b) for a, b in zip(errors, divergences, strict=True)))
    assert set(found) == set(allocation.PREDICTIONS) - {"divergence"}


def test_correlation_is_one_for_any_rising_prediction() -> None:
    drops = np.random.default_rng(0).uniform(1, 8, 20)
    pairs = [{"rising": math.exp(drop), "falling": -(drop**3), "drop": drop} for drop in drops]
    assert allocation.correlation(pairs, "rising") == pytest.approx(1.0)
    assert allocation.correlation(pairs, "falling") == pytest.approx(-1.0)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_ceiling_is_what_the_truth_itself_reaches(noise: float) -> None:
    generator = np.random.default_rng(0)
    truth = generator.standard_normal(4000)
    halves = truth[:, None] + noise * generator.standard_normal((4000, 2))
    pairs = [
        {"truth": t, "halves": tuple(own), "drop": float(np.mean(own))} for t, own in zip(truth, halves, strict=True)
    ]
    assert allocation.ceiling(pairs) == pytest.approx(allocation.correlation(pairs, "truth"), abs=0.015)


def test_interval_covers_the_correlation_in_19_of_20_samples() -> None:
    generator = np.random.default_rng(0)
    slope = 0.8
    true = 6 / math.pi * math.asin(slope / 2)  # Spearman's of a bivariate normal of correlation 0.8
    covered = 0
    for _ in range(400):
        x, e = generator.standard_normal((2, 20))
        y = slope * x + math.sqrt(1 - slope**2) * e
        low, high = allocation.interval(
            allocation.correlation([{"x": a, "drop": b} for a, b in zip(x, y, strict=True)], "x"), 20
        )
        covered += low <= true <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_drop_is_that_of_the_whole_split_and_the_mean_of_its_halves(
    judged: allocation.Judged, full: Workbench
) -> None:
    own = full.propose(None, full.full_cost / 20, "twentieth")
    drop, halves = judged.drop(own)
    assert drop.value > 0
    sizes = len(judged.rows[::2]), len(judged.rows[1::2])
    assert drop.value == pytest.approx(float(np.average(halves, weights=sizes)))
    unchanged = search.Candidate("none", conductor.Network(), {}, 0.0, 0.0)
    assert judged.drop(unchanged)[0].value == 0


# --- overhead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_exponent_is_that_of_a_power_law(power: float) -> None:
    params = [1e5, 1e6, 2e7]
    assert overhead.exponent(params, [3e-5 * n**power for n in params]) == pytest.approx(power)


def counted(size: str) -> int:
    """Weights of the Convs and the Gemm, and four numbers for every channel of a BatchNormalization."""
    widths = [width for block in overhead.SIZES[size] for width in block]
    before = [3, *widths[:-1]]
    return sum(9 * a * b + 4 * b for a, b in zip(before, widths, strict=True)) + 10 * widths[-1] + 10


def test_sizes_are_what_they_are_called() -> None:
    model = overhead.network("0.1")
    assert sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer) == counted("0.1")
    assert all(counted(size) == pytest.approx(1e6 * float(size), rel=0.25) for size in overhead.SIZES)
    assert counted("20") == 20_046_026
