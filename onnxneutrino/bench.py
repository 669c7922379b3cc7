"""What the search is made of: candidates, how far it may go, and the bench that makes, trains and measures them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onnxneutrino.allocate import Option
from onnxneutrino.metrics import Drop


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network that was tried.

    Attributes:
        name: for the report.
        network: its factors and arrays, known to the bench alone.
        choices: the option of every layer.
        cost: of the whole network, in the unit of the objective.
        divergence: on calibration inputs, from the outputs of what it was made of, the original or a trained network.
        drop: on the deciding images; None while not measured.
        trained: seconds of fine-tuning behind it, those of its predecessors included.
        stage: 1 or 2.
        seconds: wall time it took to make, train and measure.
        refused: by the user's own function, whatever its drop.
    """

    name: str
    network: Any
    choices: Mapping[str, Option]
    cost: float
    divergence: float
    drop: Drop | None = None
    trained: float = 0.0
    stage: int = 1
    seconds: float = 0.0
    refused: bool = False


class Bench(Protocol):
    """What the search needs to know about the network."""

    @property
    def full_cost(self) -> float:
        """Cost of the original network."""

    @property
    def least_cost(self) -> float:
        """Cost of the smallest network there is."""

    def propose(
        self, source: Candidate | None, cost: float, name: str, seconds: float = 0.0, swap: bool = False
    ) -> Candidate:
        """The refitted, untrained network of at most `cost`: see `proposals.propose`.

        From the original for None, else from the trained chains of `source`, forms frozen.
        """

    def measured(self, candidate: Candidate) -> Candidate:
        """With its drop on the deciding images."""

    def step_seconds(self, candidate: Candidate) -> float:
        """Wall time of one training step; infinite where it cannot be trained."""

    def trained(self, candidate: Candidate, seconds: float, name: str, hopeless: float = math.inf) -> Candidate | None:
        """Fine-tuned for `seconds`; None when training failed.

        Half of the time will do where the drop is above `hopeless` by then.
        """


@dataclass(frozen=True)
class Settings:
    """How far a search may go.

    Attributes:
        delta: largest drop, in the metric's units.
        z: one-sided normal quantile of the confidence.
        stage: 1 or 2, the last stage to run.
        time_limit: of the whole run, in seconds; fine-tunes get shares of it.
        train: False compares untrained plans only.
        dry_run: stop before the first training step.
        seed: of the annealing.
        goal: cost below which nothing is gained: 1 with hard targets.
        large_drop: with hard targets, the untrained drop above which a larger network is trained first.
        least_delta: what a smaller delta counts as where plans are looked at untrained.
    """

    delta: float
    z: float
    stage: int
    time_limit: float
    train: bool
    dry_run: bool
    seed: int
    goal: float = 0.0
    large_drop: float = math.inf
    least_delta: float = 0.1


Record = Callable[[Candidate], Candidate]
Tell = Callable[[Candidate, bool], bool | None]  # a measured candidate, and whether it is accepted; False refuses it


def accepted(candidate: Candidate, settings: Settings) -> bool:
    """`drop + z · standard error <= delta` on the deciding images (design 3.11), and the user does not refuse it."""
    return not candidate.refused and upper(candidate, settings) <= settings.delta


def upper(candidate: Candidate, settings: Settings) -> float:
    """Upper bound of the drop on the deciding images, `drop + z · standard error`; infinite while not measured."""
    drop = candidate.drop
    return math.inf if drop is None else drop.value + settings.z * drop.standard_error


def lost(candidate: Candidate) -> float:
    """The drop on the deciding images; infinite while not measured."""
    return math.inf if candidate.drop is None else candidate.drop.value


def drops_by_cost(candidates: Sequence[Candidate]) -> list[tuple[float, float]]:
    """Cost and drop of those that were measured."""
    return [(own.cost, own.drop.value) for own in candidates if own.drop is not None]


def recorder(settings: Settings, tell: Tell) -> tuple[list[Candidate], Record]:
    """A list of candidates, and what tells of a measured one and puts it at the list's end."""
    tried: list[Candidate] = []

    def record(candidate: Candidate) -> Candidate:
        if tell(candidate, accepted(candidate, settings)) is False:
            candidate = dataclasses.replace(candidate, refused=True)
        tried.append(candidate)
        return candidate

    return tried, record
