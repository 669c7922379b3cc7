"""The learning rate of every step of a fine-tune, and the moving average of its weights."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARMUP_SHARE = 0.05
DROPS = (0.5, 0.75)  # shares of the steps at which the schedule `step` divides by ten
DROP = 0.1


@dataclass(frozen=True)
class Schedule:
    """Steps of an optimizer: warm-up over the first 5 %, then as `shape` says.

    Attributes:
        steps: how many.
        batch: examples of each.
        learning_rate: the largest.
        shape: `cosine` to zero, `step` to a tenth at 50 % and again at 75 % of the steps, or `constant`.
    """

    steps: int
    batch: int
    learning_rate: float
    shape: str = "cosine"

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = max(1, round(WARMUP_SHARE * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.shape == "constant":
            return self.learning_rate
        if self.shape == "step":
            return self.learning_rate * DROP ** bisect.bisect_right(DROPS, step / self.steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def peak(rate: float, steps: int, long_run: int) -> float:
    """The largest learning rate of `steps` steps where `rate` is that of `long_run`: `rate · steps / long_run`.

    Adam steps by its rate whatever the size of the gradient, and many steps are needed to mend what large ones break.
    """
    return rate * min(steps / long_run, 1.0) if long_run else rate


def averaged(
    average: Mapping[str, NDArray[Any]], arrays: Mapping[str, NDArray[Any]], decay: float, step: int
) -> dict[str, NDArray[Any]]:
    """The exponential moving average after step `step`, counted from 0.

    `d · average + (1 - d) · arrays` with `d = min(decay, (1 + step) / (10 + step))`: the first weights, which training
    soon leaves, are soon forgotten.
    """
    kept = np.float32(min(decay, (1 + step) / (10 + step)))
    return {name: array + kept * (average[name] - array) for name, array in arrays.items()}
