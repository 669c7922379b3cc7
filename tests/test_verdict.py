"""The three lines at the end of a run name what the report shows, and nothing it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from onnxneutrino.formats import TIMES
from onnxneutrino.report import (
    CandidateRow,
    DecidingImages,
    Interval,
    LayerRow,
    Report,
    SixMetrics,
    TargetRow,
    Training,
    enhancement,
)
from onnxneutrino.verdict import verdict

BEFORE = SixMetrics(85.47, 3_000_000, 12_000_000, 40_000_000, 13_000_000, 1.4)
AFTER = SixMetrics(84.6, 100_000, 400_000, 8_000_000, 500_000, 0.4)


def row(cost: float, drop: float, accepted: bool, trained: bool = True) -> CandidateRow:
    return CandidateRow("plan", {}, cost, 85.47 - drop, drop, trained, 1.0, accepted)


def layer(left: int, reason: str | None = None) -> LayerRow:
    return LayerRow("conv", "Conv", (4, 4, 3, 3), None, (), 1000, left, 10, 10, reason)


def made(**changes: Any) -> Report:
    own = Report(
        model="net.onnx",
        data="data.npz",
        metric_name="top1",
        original=BEFORE,
        delta=1.0,
        objective="params",
        compressed=True,
        stage2=AFTER,
        enhancement=enhancement(BEFORE, AFTER, 0.87),
        drop=0.87,
        drop_select=Interval(0.8, 0.6, 1.0),
        deciding=DecidingImages("half of the test split", 5000),
        candidates=(row(100_000, 0.8, True),),
        training=(Training("plan", 400, 64, 2, 1e-3),),
        layers=(layer(900), layer(100, "depthwise")),
        settings={"time_limit": 480.0, "confidence": 0.8, "trainer": "ort"},
    )
    return dataclasses.replace(own, **changes)


def test_what_was_achieved() -> None:
    assert verdict(made()).achieved == (
        f"30.0{TIMES} fewer params, 5.00{TIMES} fewer MACs, 30.0{TIMES} smaller on disk; "
        "top1 drops by 0.870, 1.00 is allowed."
    )
    nothing = verdict(made(compressed=False)).achieved
    assert nothing == "No smaller model stays within delta 1.00: the normalized original was written."


def test_costs_that_rose_are_not_told_as_gains() -> None:
    heavier = dataclasses.replace(AFTER, macs=80_000_000)
    told = verdict(made(enhancement=enhancement(BEFORE, heavier, 0.5))).achieved
    assert "MACs" not in told


REFUSED = (row(100_000, 0.8, True), row(80_000, 1.4, False), row(60_000, 3.0, False), row(90_000, 9.0, False, False))
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "time": ({}, "Time: the smallest network", "--time-limit 16m"),
    "no fine-tune": ({"training": ()}, "Time: no network was trained.", "--time-limit 16m"),
    "untrained": (
        {"training": (), "settings": {"trainer": "none", "time_limit": 60.0}},
        "--trainer none",
        "without --trainer none",
    ),
    "refused": ({"candidates": REFUSED}, f"37.5{TIMES} smaller, lost 1.40.", "Or a larger --delta"),
    "few images": ({"drop_select": Interval(0.1, -3.0, 3.2)}, "The 5000 deciding images", "x_val"),
    "frozen": ({"layers": (layer(100), layer(900, "depthwise"))}, "90.0 % of what is left", "analyze"),
    "targets out of reach": (
        {"targets": (TargetRow("params", 5e4, 6e4),), "delta": None},
        "not even the smallest plan",
        "Larger targets",
    ),
    "targets": ({"targets": (TargetRow("macs", 1e7, None),)}, "Hard targets: they are met", "Lower targets"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_limited_it_and_what_to_try(case: str) -> None:
    changes, limited, advice = CASES[case]
    found = verdict(made(**changes))
    assert limited in found.limited
    assert advice in found.advice
    assert not any(CASES[other][1] in found.limited for other in CASES if other != case)


def test_the_chance_that_is_named_is_what_decided() -> None:
    # The interval is 1.96 standard errors wide on either side; 80 % one-sided are 0.8416.
    told = verdict(made(drop_select=Interval(0.1, 0.1 - 1.96, 0.1 + 1.96))).limited
    assert "± 0.842" in told
