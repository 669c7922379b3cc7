"""How much the output suffers for each layer's own error, measured: one layer factorized, all others as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxneutrino import cost
from onnxneutrino.data import Inputs
from onnxneutrino.layer_options import LayerOptions
from onnxneutrino.probe import divergence
from onnxneutrino.runtime import Runner
from onnxneutrino.segments import between
from onnxneutrino.task import Network, Task, build

ERROR = 0.05
IMAGES, MACS = 128, 4 * 10**11


def measured_sensitivities(
    task: Task,
    layers: Mapping[str, LayerOptions],
    places: Mapping[str, str | None],
    batch: Inputs | None,
    tell: Callable[[str, float], None],
) -> dict[str, float]:
    """Divergence per unit of relative error, each layer factorized alone at an error of about 5 %.

    Args:
        task: the run.
        layers: the fits on the original.
        places: where a layer's part of the graph can start (`segments.resting_places`).
        batch: inputs, of which 128 are used, fewer where a run of every layer would take more than 4e11
            multiply-accumulates; None where that is too long in any case.
        tell: progress.

    Returns:
        By layer; 1 for all where not even one input can be afforded.
    """
    most = min(IMAGES, MACS // max(cost.macs(task.model, task.types) * len(layers), 1))
    if batch is None or not most:
        return dict.fromkeys(layers, 1.0)
    rested = _at_places(task, places, {name: array[:most] for name, array in batch.items()})
    found: dict[str, float] = {}
    for index, (name, own) in enumerate(layers.items()):
        tell("measuring sensitivity", index / len(layers))
        choices = [option for option in own.options if option.choice is not None]
        option = min(choices, key=lambda o: abs(o.loss - ERROR), default=None)
        if option is None or option.choice is None or option.loss <= 0:
            found[name] = 1.0
            continue
        graph = build(task, Network({name: own.factors(option.choice)}), batched=True)
        run = Runner(between(graph, places[name], task.loss.outputs, task.types), threads=task.threads)
        lost = divergence(task.loss, [[rested[output] for output in task.loss.outputs]], [run(rested)])
        found[name] = max(lost, 1e-9) / option.loss
    return found


def _at_places(task: Task, places: Mapping[str, str | None], batch: Inputs) -> Inputs:
    """The inputs with what the original computes at the places and puts out."""
    wanted = dict.fromkeys([*(place for place in places.values() if place is not None), *task.loss.outputs])
    run = Runner(task.batched, list(wanted), threads=task.threads)
    return {**batch, **dict(zip(wanted, run(batch), strict=True))}
