"""The learning rate of every step of a fine-tune."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW: warm-up over the first 5 %, then a cosine to zero."""

    steps: int
    batch: int
    learning_rate: float

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = max(1, round(WARMUP_SHARE * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
