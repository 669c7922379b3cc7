"""The learning rate of a network, found by a range test."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxneutrino import clock
from onnxneutrino.finetune import Example, Trainer

DEFAULT_RATE = 1e-3
RATES = (8e-4, 3e-3)
FIRST_RATE = 3e-4
RATE_GROWTH = 1.12
RISE = 0.5
SMOOTHED = 6
SAFETY = 1.5
# The steps of a fine-tune from which on it gets the whole rate: what a large one breaks takes steps to mend. ResNet-20
# at 1.75x, 250 steps: 1e-3 took the divergence on test images from 0.093 to 0.146, 2e-4 to 0.085; at 2.26x, 550 steps:
# from 0.185 to 0.168, and with 2.5e-4 to 0.146. biasfield at 3.0x, 600 steps: from 0.058, 8e-4 to 0.061, 2e-4 to 0.054.
LONG_RUN = 1500


def find_rate(trainer: Trainer, examples: Iterator[Example], seconds: float) -> float:
    """Two thirds of the learning rate at which the loss rises by half, from 8e-4 to 3e-3 (Smith 2017, range test).

    A factorized network starts close to a minimum: steps of any size find little to gain at once, and too large ones
    show at once. The rate grows by 12 % a step until the mean loss of six steps, less the teacher's own, is half above
    that of six steps at rate zero. Lower rates lose less on the way and end worse (VGG-like network, 1500 steps: 3.5e-4
    left a drop of 2.36, 1.2e-3 one of 1.50), hence the bound below. The trainer's arrays and moments are spoiled
    afterwards. Where the test would take longer than `seconds`, 1e-3 must do.
    """
    start = clock.now()
    still = [trainer.step(next(examples), 0.0) for _ in range(SMOOTHED)]
    bound = float(np.mean(still)) + RISE * max(float(np.mean(still)), float(np.std(still)))
    if (clock.now() - start) / SMOOTHED * math.log(SAFETY * RATES[1] / FIRST_RATE, RATE_GROWTH) > seconds:
        return DEFAULT_RATE
    losses: list[float] = []
    rate = FIRST_RATE
    while rate < SAFETY * RATES[1]:
        losses.append(trainer.step(next(examples), rate))
        if len(losses) >= SMOOTHED and np.mean(losses[-SMOOTHED:]) > bound:
            break
        rate *= RATE_GROWTH
    # The mean is that of the middle of its steps.
    return float(np.clip(rate / RATE_GROWTH ** (SMOOTHED // 2) / SAFETY, *RATES))
