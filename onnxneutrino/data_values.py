"""What data is: batches, splits that can be iterated again and again, and the splits of one data set.

A `Split` streams; nothing here holds more than one batch. Two kinds exist: `IndexedSplit`, whose
examples can be read by number (arrays, image files, drawn inputs), and the loader's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.data_function import UserFunction

Inputs: TypeAlias = dict[str, NDArray[Any]]
Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples for the model: one array per input, first axis the example; targets None for none."""

    inputs: Inputs
    targets: NDArray[Any] | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class InputSpec:
    """One input of the model: the first axis is the batch, None is a free dimension."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    @property
    def example(self) -> tuple[int | None, ...]:
        """Shape of one example."""
        return self.shape[1:]


class Split(Protocol):
    """Examples in a fixed order that can be streamed any number of times."""

    @property
    def labelled(self) -> bool:
        """Whether the batches have targets."""

    def __len__(self) -> int:
        """Number of examples."""

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """Stream every example once, `size` at a time; the last batch may be short.

        Args:
            size: examples in a batch.
            seed: None for the split's own order, else a shuffle that the seed decides.
            augment: apply the configured augmentation, drawn from the seed (0 for None).
        """

    def subset(self, indices: Rows) -> Split:
        """Make a split of the examples at these positions, in this split's own order."""


@dataclass(frozen=True, eq=False)
class IndexedSplit:
    """A split whose examples are read by number.

    Attributes:
        read: from row numbers `(n,)` and a generator (None: no augmentation) to the model's inputs.
        targets: `(all rows, ...)`, or None.
        rows: the rows that belong to this split.
    """

    read: Callable[[Rows, np.random.Generator | None], Inputs]
    targets: NDArray[Any] | None
    rows: Rows

    @property
    def labelled(self) -> bool:
        """Whether the batches have targets."""
        return self.targets is not None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """Stream every example once; see `Split.batches`."""
        rows = self.rows if seed is None else shuffler(seed).permutation(self.rows)
        generator = augmenter(seed) if augment else None
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            targets = None if self.targets is None else np.asarray(self.targets[chosen])
            yield Batch(self.read(chosen, generator), targets)

    def subset(self, indices: Rows) -> IndexedSplit:
        """Make a split of the examples at these positions, in this split's own order."""
        return IndexedSplit(self.read, self.targets, self.rows[np.unique(indices)])


def shuffler(seed: int) -> np.random.Generator:
    """Make the generator of the order; apart from the augmentation's, so that neither moves the other."""
    return np.random.default_rng([seed, 0])


def augmenter(seed: int | None) -> np.random.Generator:
    """Make the generator of the augmentation."""
    return np.random.default_rng([seed or 0, 1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of one data set.

    Attributes:
        train: what fine-tuning and calibration see.
        stop: the share of the training split kept aside for early stopping; None for none.
        validation: images the original was not trained on (`x_val`, `val/`); None where there are none.
        test: the test split.
        warnings: lines for the report.
        detections: the loader's function that decodes a detector's outputs into boxes; None without one.
    """

    train: Split
    stop: Split | None
    validation: Split | None
    test: Split
    warnings: tuple[str, ...]
    detections: UserFunction | None = None


@dataclass(frozen=True, eq=False)
class Deciding:
    """Which examples decide about a candidate and which report on it.

    Attributes:
        select: decides.
        report: reports.
        test: the whole test split.
        source: `x_val` or `half of the test split`.
        select_rows: positions of `select` in the test split; None where `x_val` decides.
        report_rows: positions of `report` in the test split.
    """

    select: Split
    report: Split
    test: Split
    source: str
    select_rows: Rows | None
    report_rows: Rows
