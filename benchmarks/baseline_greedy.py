"""Spatial SVD with compression ratios chosen greedily from a table of scores, as AIMET does it.

For every layer and every ratio of its cost, 0.1 ... 0.9 and, for networks that give way late, 0.05 and 0.02, the metric
of the network with that one layer compressed is measured on the first 500 deciding images; the scores of a layer are
replaced by the nearest ones that rise with the ratio (isotonic regression). For a cost, the highest score threshold is
wanted at which the network in which every layer takes its smallest ratio scoring at least that much (none: it stays
whole) is small enough. Convolutions take `spatial_hv` (Jaderberg et al. 2014), matrices the SVD.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.optimize
from baseline_bench import layer_cost, shrunk
from baseline_factors import plain_form
from numpy.typing import NDArray

from onnxneutrino import metrics
from onnxneutrino.forms import full_ranks
from onnxneutrino.layer_options import Objective
from onnxneutrino.plan import Choice, Form, Layer
from onnxneutrino.prepare import evaluate
from onnxneutrino.task import Network, Task, build

RATIOS = (0.02, 0.05, *(index / 10 for index in range(1, 10)))
SCORED_IMAGES = 500


class GreedySpatial:
    """Ranks by a threshold on the scores of layers compressed one at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._table = {layer.name: rising(self._scores(layer)) for layer in task.layers}
        higher = {float(score) for scores in self._table.values() for score in scores}
        self._thresholds = sorted(higher)

    def _scores(self, layer: Layer) -> NDArray[np.float64]:
        """The metric with this layer alone at every ratio, `(ratios,)`; negative where lower is better."""
        task = self._task
        split = task.select.subset(np.arange(min(len(task.select), SCORED_IMAGES)))
        sign = 1.0 if task.metric.higher_is_better else -1.0
        found = []
        for ratio in RATIOS:
            model = build(task, shrunk(layer, Network(), ratio_choice(layer, ratio, task.objective)), batched=True)
            rows = evaluate(model, split, task.metric, task.evaluation_batch, task.threads, task.batched)
            found.append(sign * metrics.value(task.metric, rows))
        return np.asarray(found)

    def choices(self, setting: float) -> Mapping[str, Choice]:
        """The setting is a place among the thresholds."""
        ratios = ratios_at(self._table, self._thresholds, int(setting * len(self._thresholds)))
        return {
            layer.name: ratio_choice(layer, ratios[layer.name], self._task.objective) for layer in self._task.layers
        }


def rising(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest scores, in squares, that do not fall."""
    return np.asarray(scipy.optimize.isotonic_regression(scores).x)


def ratios_at(table: Mapping[str, NDArray[np.float64]], thresholds: list[float], place: int) -> dict[str, float]:
    """Every layer's smallest ratio that scores at least the threshold at `place`; 1 where none does, or past the last.

    Args:
        table: scores at `RATIOS`, rising, by layer.
        thresholds: rising.
        place: index of the threshold.
    """
    if place >= len(thresholds):
        return dict.fromkeys(table, 1.0)
    found = {}
    for name, scores in table.items():
        index = int(np.searchsorted(scores, thresholds[place]))
        found[name] = RATIOS[index] if index < len(RATIOS) else 1.0
    return found


def ratio_choice(layer: Layer, ratio: float, objective: Objective) -> Choice:
    """The largest rank at which the layer costs at most `ratio` of what it does; at least 1, full rank for 1."""
    shape = layer.weight.shape
    convolution = layer.kind != "map" and len(shape) == 4 and min(shape[2:]) > 1
    form: Form = "spatial_hv" if convolution else plain_form(shape)
    low, high = 1, full_ranks(form, shape)[0]
    if ratio >= 1:
        return Choice(form, (high,))
    allowed = ratio * layer_cost(layer, None, objective)
    while low < high:
        middle = (low + high + 1) // 2
        if layer_cost(layer, Choice(form, (middle,)), objective) <= allowed:
            low = middle
        else:
            high = middle - 1
    return Choice(form, (low,))
