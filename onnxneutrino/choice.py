"""Which of the networks that were tried is written (design: who decides, in docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import metrics, prepare
from onnxneutrino.bench import Candidate, Settings, accepted, lost
from onnxneutrino.chain_latency import LatencyTable
from onnxneutrino.data import Deciding
from onnxneutrino.formats import format_metric, format_ms
from onnxneutrino.summary import Chosen, measured_latencies
from onnxneutrino.task import Task, build


def choose(
    candidates: Sequence[Candidate],
    settings: Settings,
    task: Task,
    rows: NDArray[Any],
    judges: Deciding,
    original: ModelProto,
    warnings: list[str],
) -> Chosen:
    """The smallest accepted candidate of each stage whose drop on the whole test split is within delta too.

    With hard targets that which loses least of those that meet them; where none does within delta the smallest within
    delta, and where there is no delta the smallest.

    Args:
        candidates: all that were measured.
        settings: delta and confidence.
        task: the run.
        rows: the original's metric statistics on the whole test split.
        judges: that split.
        original: as it was given; where latency is the objective, what is not faster is not taken.
        warnings: gets a line for every accepted candidate that was passed over.
    """

    def first_within(pool: Sequence[Candidate]) -> tuple[Candidate | None, NDArray[Any]]:
        for candidate in pool:
            if isinstance(task.objective, LatencyTable) and not _faster(candidate, task, judges, original, warnings):
                continue
            own = _rows(candidate, task, judges)
            drop = metrics.drop(task.metric, rows, own, seed=task.seed)
            if drop.value <= settings.delta:
                return candidate, own
            warnings.append(
                f"{candidate.name} was accepted on the deciding images but drops {format_metric(drop.value)} on the "
                "whole test split; the next larger one was taken, so the test split took part in the selection"
            )
        return None, rows

    good = sorted((own for own in candidates if accepted(own, settings)), key=lambda own: (own.cost, lost(own)))
    if settings.goal:
        met = [own for own in good if own.cost <= settings.goal]
        others = good[:1] if math.isinf(settings.delta) else [own for own in good if own.cost > settings.goal]
        final, final_rows = first_within([*sorted(met, key=lost), *others])
        start = next((own for own in candidates[::-1] if own.trained and own.stage == 1), final)
        start_rows = final_rows if start is final or start is None else _rows(start, task, judges)
        return Chosen(start, start_rows, final, final_rows)
    early = [candidate for candidate in good if candidate.stage == 1]
    first, first_rows = first_within(early)
    if settings.stage == 1:
        return Chosen(first, first_rows, first, first_rows)
    later = [candidate for candidate in good if candidate.stage == 2 and (first is None or candidate.cost < first.cost)]
    second, second_rows = first_within(later)
    return Chosen(first, first_rows, second or first, second_rows if second else first_rows)


def _rows(candidate: Candidate, task: Task, judges: Deciding) -> NDArray[Any]:
    """Metric statistics on the whole test split."""
    model = build(task, candidate.network, batched=True)
    return prepare.evaluate(model, judges.test, task.metric, task.evaluation_batch, task.threads, task.batched)


def _faster(candidate: Candidate, task: Task, judges: Deciding, original: ModelProto, warnings: list[str]) -> bool:
    """Whether the finished network takes less time than the original, measured in turn with it."""
    example = prepare.first_examples(judges.test, 1)[0]
    before, after = measured_latencies([original, build(task, candidate.network)], example, task.threads)
    if after < before:
        return True
    warnings.append(
        f"{candidate.name} takes {format_ms(after)} where the original takes {format_ms(before)}: it was dropped, "
        "because a network made for its latency must not be slower"
    )
    return False
