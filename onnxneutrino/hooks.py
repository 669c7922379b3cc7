"""The user's functions that are called before a candidate is trained and after it was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxneutrino.bench import Candidate
from onnxneutrino.config import TrainConfig
from onnxneutrino.data_function import UserFunction, load_function
from onnxneutrino.errors import TrainingError


class Hooks:
    """The hooks of one run.

    A hook that fails at its first call ends the run; one that fails later is not called again.
    """

    def __init__(self, train: TrainConfig) -> None:
        """Load those that there are.

        Raises:
            TrainingError: a file or function that is missing or cannot be imported.
        """
        self.warnings: list[str] = []
        self._open = {own: load_function(own, Path("."), TrainingError) for own in (train.before, train.after) if own}
        self._worked: set[str] = set()
        self._train = train

    def before(self, candidate: Candidate, full_cost: float, model: Callable[[], ModelProto]) -> None:
        """Call `before(candidate, model)`, which returns nothing.

        Args:
            candidate: what will be trained.
            full_cost: of the original.
            model: makes its deployable graph.

        Raises:
            TrainingError: the first call failed.
        """
        self._called(self._train.before, described(candidate, full_cost, None), model, (type(None),), "None")

    def after(self, candidate: Candidate, full_cost: float, accepted: bool, model: Callable[[], ModelProto]) -> bool:
        """Call `after(candidate, model)`: whether it refuses the candidate, by returning False.

        Raises:
            TrainingError: the first call failed.
        """
        kinds = (bool, np.bool_, type(None))
        told = described(candidate, full_cost, accepted)
        answer = self._called(self._train.after, told, model, kinds, "True, False or None")
        return answer is not None and not answer

    def _called(
        self,
        reference: str,
        told: dict[str, Any],
        model: Callable[[], ModelProto],
        kinds: tuple[type, ...],
        expected: str,
    ) -> Any:
        function: UserFunction | None = self._open.get(reference)
        if function is None:
            return None
        try:
            answer = function(told, model())
            if not isinstance(answer, kinds):
                raise function.wrong(f"must return {expected}, not {type(answer).__name__}")
        except TrainingError as error:
            if reference not in self._worked:
                raise
            self.warnings.append(f"{error}; it was not called again")
            del self._open[reference]
            return None
        self._worked.add(reference)
        return answer


def described(candidate: Candidate, full_cost: float, accepted: bool | None) -> dict[str, Any]:
    """What hooks are told of a candidate, in plain values; None for what is not known yet.

    `cost` is in the unit of the objective, with hard targets the largest share of one; `ratio` is the original's cost
    over it; `trained` are the seconds of training behind it, those of its predecessors included.
    """
    drop = candidate.drop
    return {
        "name": candidate.name,
        "stage": candidate.stage,
        "cost": float(candidate.cost),
        "ratio": float(full_cost / candidate.cost),
        "trained": float(candidate.trained),
        "seconds": float(candidate.seconds),
        "drop": None if drop is None else float(drop.value),
        "standard_error": None if drop is None else float(drop.standard_error),
        "accepted": accepted,
    }
