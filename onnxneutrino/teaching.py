"""Training batches: augmented inputs, the original's outputs on them, and the labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxneutrino.calibrate import Run
from onnxneutrino.data import Split
from onnxneutrino.finetune import Example


def examples(split: Split, batch: int, seed: int, teacher: Run, labels: bool) -> Iterator[Example]:
    """Endless batches of exactly `batch` examples, every epoch in a new order; short ones are left out.

    Args:
        split: at least `batch` examples.
        batch: examples in each.
        seed: of order and augmentation.
        teacher: gives the original's outputs.
        labels: hand integer labels on where the split has them.
    """
    epoch = 0
    while True:
        for drawn in split.batches(batch, seed=seed * 1009 + epoch, augment=True):
            if len(drawn) < batch:
                continue
            usable = labels and drawn.targets is not None and np.issubdtype(drawn.targets.dtype, np.integer)
            yield Example(drawn.inputs, teacher(drawn.inputs), drawn.targets if usable else None)
        epoch += 1
