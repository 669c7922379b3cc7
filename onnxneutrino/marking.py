"""Mark: the normalized graph and its layers; and the same without the channels that it does not need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import cost, large, metrics, prepare
from onnxneutrino.config import Config
from onnxneutrino.data import Inputs
from onnxneutrino.formats import format_ratio
from onnxneutrino.journal import Journal
from onnxneutrino.narrowing import spare_channels
from onnxneutrino.normalize import normalize
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.phases import Phases
from onnxneutrino.plan import Frozen, Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.task import Marked, Task

NARROWING_SHARE = 0.05  # of the time limit, for looking at the channels and again for putting them in order
NARROWING_DROP = 0.5  # of delta: what remains is for the factorization


def mark(opened: prepare.Opened, samples: Sequence[Inputs], config: Config) -> Marked:
    """Normalize the graph, free its batch and list its layers."""
    model, notes = normalize(opened.model, samples, _runs(config.threads))
    return _marked(opened, model, notes, samples, config)


def _marked(
    opened: prepare.Opened, model: ModelProto, notes: Sequence[str], samples: Sequence[Inputs], config: Config
) -> Marked:
    types = prepare.types_of(model, opened.shapes)
    found = find_layers(model, types, config.exclude, config.only)
    batched, freed = prepare.free(model, samples, config.threads)
    return Marked(
        opened=opened,
        model=model,
        batched=batched,
        notes=tuple(notes),
        types=types,
        layers=tuple(layer for layer in found if isinstance(layer, Layer)),
        frozen=tuple(layer for layer in found if isinstance(layer, Frozen)),
        order=tuple(layer.name for layer in found),
        freed=freed,
    )


def narrow(
    marked: Marked, samples: Sequence[Inputs], config: Config, task: Task, clock: Phases, journal: Journal
) -> Marked:
    """The graph without the channels that it does without; the same one where there are none."""
    if large.is_large(marked.layers):
        return marked
    clock.phase("look for spare channels")
    units = set(config.limits) or {config.objective}

    def kept(model: ModelProto) -> bool:
        if math.isinf(task.delta):
            return True
        rows = prepare.evaluate(model, task.select, task.metric, task.evaluation_batch, task.threads, task.batched)
        drop = metrics.drop(task.metric, task.original_rows, rows, seed=task.seed)
        return drop.value <= NARROWING_DROP * task.delta

    removal = journal.step(
        "spare channels",
        lambda: spare_channels(
            marked,
            task.loss,
            task.train,
            task.evaluation_batch,
            not units.isdisjoint({"macs", "latency"}),
            task.threads,
            task.seed,
            NARROWING_SHARE * config.time_limit,
            kept,
            lambda what, share: clock.tell(what),
        ),
    )
    if not removal.groups:
        return marked
    own = _marked(marked.opened, removal.applied(marked.model), marked.notes, samples, config)
    before, after = cost.params(marked.model), cost.params(own.model)
    clock.say(f"removed {len(removal.groups)} groups of channels: {format_ratio(before / after)} fewer parameters")
    return own


def _runs(threads: int) -> Callable[[ModelProto, Inputs], list[NDArray[Any]]]:
    """Run a graph on inputs; the session is kept until another graph comes, for building one takes longer."""
    kept: list[tuple[ModelProto, Runner]] = []

    def run(graph: ModelProto, inputs: Inputs) -> list[NDArray[Any]]:
        if not kept or kept[0][0] is not graph:
            kept.clear()
            kept.append((graph, Runner(graph, threads=threads)))
        return kept[0][1](inputs)

    return run
