"""A fine-tune that goes on where the journal kept it.

It is run from its beginning: the steps up to there are not made again, their losses and looks are told once more, and
the clock gives once more what it gave. So whatever follows from these (schedule, number of steps, end) comes out as it
did, and nothing of it has to be kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.finetune import Arrays, Example, Trainer
from onnxneutrino.journal import Journal

NAME = "training"
BLANK = Example({}, (), None)  # a batch whose step is not made

Given = Mapping[str, NDArray[Any]]


class KeptTraining:
    """What `finetune.fine_tune` is given in the place of its trainer, its examples and what it calls."""

    def __init__(
        self,
        journal: Journal,
        look: Callable[[Given, int, float], bool],
        seen: MutableMapping[int, float],
        refresh: Callable[[Given], None],
    ) -> None:
        """Read what was kept.

        Args:
            journal: of the run.
            look: of `fine_tune`.
            seen: what `look` notes.
            refresh: of `fine_tune`.
        """
        self._journal, self._look, self._seen, self._refresh = journal, look, seen, refresh
        kept = journal.kept(NAME)
        self.state: NDArray[np.uint8] | None = None
        self._losses: list[float] = []
        self._answers: list[bool] = []
        self._student: Given | None = None
        if kept is not None:
            self.state, losses, answers, noted, self._student = kept
            self._losses, self._answers = list(losses), list(answers)
            seen.update(noted)
        self.made = len(self._losses)  # steps that are not made again
        self._step = self._asked = 0
        if self._student is not None:
            refresh(self._student)

    def on(self, trainer: Trainer) -> KeptTraining:
        """Train with `trainer`, which begins with `state`."""
        self._trainer = trainer
        self.batch = trainer.batch
        return self

    def examples(self, source: Iterator[Example]) -> Iterator[Example]:
        """The batches of all steps; `source` begins behind those that are not made again."""
        return itertools.chain(itertools.repeat(BLANK, self.made), source)

    def step(self, example: Example, rate: float) -> float:
        """See `Trainer.step`."""
        if self._step < self.made:
            self._step += 1
            if self._step == self.made:
                self._journal.resume(NAME)
            return self._losses[self._step - 1]
        self._losses.append(self._trainer.step(example, rate))
        self._step += 1
        self._journal.keep(
            NAME, lambda: (self._trainer.state(), self._losses, self._answers, self._seen, self._student)
        )
        return self._losses[-1]

    def arrays(self) -> Arrays:
        """See `Trainer.arrays`."""
        return self._trainer.arrays()

    def look(self, arrays: Given, step: int, share: float) -> bool:
        """Look, or say what was seen."""
        if self._asked == len(self._answers):
            self._answers.append(self._look(arrays, step, share))
        self._asked += 1
        return self._answers[self._asked - 1]

    def refresh(self, arrays: Given) -> None:
        """Refresh the student; it is the one that was kept while steps are not made again."""
        if self._step >= self.made:
            self._student = arrays
            self._refresh(arrays)
