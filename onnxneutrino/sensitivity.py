"""How much the output suffers for each layer's own error, measured: one layer factorized, all others as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxneutrino import cost
from onnxneutrino.data import Inputs
from onnxneutrino.layer_options import LayerOptions
from onnxneutrino.probe import divergence
from onnxneutrino.runtime import Runner
from onnxneutrino.segments import between
from onnxneutrino.task import Network, Task, build

ERRORS = (0.02, 0.1, 0.4)
IMAGES, MACS = 128, 4 * 10**11
SLOPES = (0.5, 2.0)
TINY = 1e-9


@dataclass(frozen=True)
class Curve:
    """Divergence at the output over a layer's relative error: measured points, linear between their logarithms.

    Beyond the points the outer pieces go on, their slopes bounded by 1/2 and 2. Without points it is the error itself.

    Attributes:
        points: `(error, divergence)`, by rising error.
    """

    points: tuple[tuple[float, float], ...] = ()

    def __call__(self, error: float) -> float:
        """The divergence at a relative error; 0 for none."""
        if error <= 0 or not self.points:
            return max(error, 0.0)
        x = math.log(error)
        xs, ys = np.log(np.array(self.points).T)
        if x < xs[0]:
            return math.exp(ys[0] + self._slope(xs[:2], ys[:2]) * (x - xs[0]))
        if x > xs[-1]:
            return math.exp(ys[-1] + self._slope(xs[-2:], ys[-2:]) * (x - xs[-1]))
        return math.exp(float(np.interp(x, xs, ys)))

    @staticmethod
    def _slope(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> float:
        return float(np.clip(np.diff(ys)[0] / np.diff(xs)[0], *SLOPES)) if len(xs) > 1 else 1.0


def measured_sensitivities(
    task: Task,
    layers: Mapping[str, LayerOptions],
    places: Mapping[str, str | None],
    batch: Inputs | None,
    tell: Callable[[str, float], None],
) -> dict[str, Curve]:
    """The curve of every layer, factorized alone at errors of about 2, 10 and 40 %.

    Args:
        task: the run.
        layers: the fits on the original.
        places: where a layer's part of the graph can start (`segments.resting_places`).
        batch: inputs, of which 128 are used, fewer where all runs would take more than 4e11 multiply-accumulates;
            None where that is too long in any case.
        tell: progress.

    Returns:
        By layer; without points where not even one input can be afforded.
    """
    runs = max(cost.macs(task.model, task.types) * len(layers) * len(ERRORS), 1)
    most = min(IMAGES, MACS // runs)
    if batch is None or not most:
        return dict.fromkeys(layers, Curve())
    rested = _at_places(task, places, {name: array[:most] for name, array in batch.items()})
    found: dict[str, Curve] = {}
    for index, (name, own) in enumerate(layers.items()):
        tell("measuring sensitivity", index / len(layers))
        choices = [option for option in own.options if option.choice is not None and option.loss > 0]
        nearest = {min(choices, key=lambda o: abs(math.log(o.loss / error))) for error in ERRORS if choices}
        points: list[tuple[float, float]] = []
        for option in sorted(nearest, key=lambda o: o.loss):
            assert option.choice is not None
            graph = build(task, Network({name: own.factors(option.choice)}), batched=True)
            run = Runner(between(graph, places[name], task.loss.outputs, task.types), threads=task.threads)
            lost = divergence(task.loss, [[rested[output] for output in task.loss.outputs]], [run(rested)])
            points.append((option.loss, max(lost, TINY, *(before for _, before in points))))
        found[name] = Curve(tuple(points))
    return found


def _at_places(task: Task, places: Mapping[str, str | None], batch: Inputs) -> Inputs:
    """The inputs with what the original computes at the places and puts out."""
    wanted = dict.fromkeys([*(place for place in places.values() if place is not None), *task.loss.outputs])
    run = Runner(task.batched, list(wanted), threads=task.threads)
    return {**batch, **dict(zip(wanted, run(batch), strict=True))}
