"""Which candidate is written: within delta on the whole test split, at the targets, and never slower."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxneutrino import choice
from onnxneutrino.bench import Candidate, Settings
from onnxneutrino.chain_latency import LatencyTable
from onnxneutrino.choice import choose
from onnxneutrino.metrics import Drop
from onnxneutrino.summary import Chosen


def candidate(name: str, cost: float, drop: float, stage: int = 2, trained: float = 1.0, ms: float = 0.5) -> Candidate:
    """Its network is its drop on the whole test split, half a point above that on the deciding images, and its time."""
    network = SimpleNamespace(whole=drop + 0.5, ms=ms)
    return Candidate(name, network, {}, cost, 0.0, Drop(drop, 0.0, drop, drop), trained, stage)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`choose` for such candidates, the original's time being 1 ms; gives what it chose and its warnings."""
    monkeypatch.setattr(choice, "build", lambda task, network, batched=False: network)
    monkeypatch.setattr(choice.prepare, "evaluate", lambda model, *rest: np.array([model.whole]))
    monkeypatch.setattr(choice.prepare, "first_examples", lambda split, count: [{}])
    monkeypatch.setattr(choice.metrics, "drop", lambda metric, rows, own, seed: Drop(float(own[0]), 0, 0, 0))
    monkeypatch.setattr(choice, "measured_latencies", lambda models, sample, threads: [own.ms for own in models])

    def run(*candidates: Candidate, objective: Any = "params", **changes: Any) -> tuple[Chosen, list[str]]:
        settings = Settings(**{"delta": 2.0, "z": 0.0, "stage": 2, **changes}, time_limit=1, train=True,
                            dry_run=False, seed=0)  # fmt: skip
        task: Any = SimpleNamespace(
            objective=objective, metric=None, seed=0, threads=1, evaluation_batch=1, batched=None
        )
        judges: Any = SimpleNamespace(test=None)
        original: Any = SimpleNamespace(ms=1.0)
        warnings: list[str] = []
        return choose(candidates, settings, task, np.zeros(1), judges, original, warnings), warnings

    return run


def test_the_smallest_within_delta_on_all_images_is_taken(chosen: Any) -> None:
    first, small, smallest = (
        candidate("first", 9, 0.1, stage=1), candidate("small", 7, 1.0), candidate("smallest", 5, 1.8)
    )  # fmt: skip
    refused = candidate("refused", 3, 2.1)
    found, warnings = chosen(first, small, smallest, refused)
    assert (found.stage1, found.final) == (first, small)
    assert found.final_rows == [1.5]
    assert len(warnings) == 1
    assert "smallest was accepted on the deciding images but drops 2.30" in warnings[0]


def test_for_latency_what_is_not_faster_is_dropped_with_a_warning(chosen: Any) -> None:
    quick, slow = candidate("quick", 0.9, 0.5, ms=0.99), candidate("slow", 0.6, 0.5, ms=1.0)
    table = LatencyTable({}, 1.0)
    found, warnings = chosen(quick, slow, objective=table)
    assert found.final is quick
    (line,) = warnings
    assert line.startswith("slow takes 1.00 ms where the original takes 1.00 ms: it was dropped")
    kept, warnings = chosen(slow, objective=table)
    assert kept.final is None
    assert len(warnings) == 1
    assert chosen(slow)[0].final is slow, "no other objective promises time"


def test_at_the_targets_the_least_drop_is_taken(chosen: Any) -> None:
    start = candidate("start", 1.5, 0.1, stage=1)
    plan, last = candidate("plan", 0.9, 9.0, stage=1, trained=0.0), candidate("last", 1.0, 3.0)
    found, warnings = chosen(plan, start, last, goal=1.0, delta=float("inf"))
    assert (found.stage1, found.final, warnings) == (start, last, [])


def test_out_of_deltas_reach_the_smallest_within_delta_is_taken(chosen: Any) -> None:
    met, larger, largest = candidate("met", 1.0, 3.0), candidate("larger", 1.4, 1.0), candidate("largest", 2.0, 0.0)
    assert chosen(met, largest, larger, goal=1.0)[0].final is larger
    assert chosen(met, goal=1.0)[0].final is None
    just = candidate("just", 1.0, 1.4)
    assert chosen(just, larger, goal=1.0)[0].final is just


def test_without_delta_and_targets_met_the_nearest_is_taken(chosen: Any) -> None:
    near, far = candidate("near", 1.1, 50.0), candidate("far", 1.6, 3.0)
    better = candidate("better", 1.1, 20.0)
    assert chosen(near, far, better, goal=1.0, delta=float("inf"))[0].final is better
