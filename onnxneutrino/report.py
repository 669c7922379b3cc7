"""What a run found, as data: the six metrics before and after, every layer, every candidate; and its JSON.

Numbers are data here, in full precision; `formats.py` turns them into words, `console.py` shows them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from onnxneutrino.errors import UsageError
from onnxneutrino.json_values import MismatchError, decode, plain
from onnxneutrino.plan import Choice, Frozen

REFUSED = "refused by "  # in the note of a candidate, before the user's function
# The metric that each objective makes small, and each hard target bounds.
COST_FIELDS = {"params": "params", "macs": "macs", "size": "size_bytes"}
COST_FIELDS |= {"memory": "memory_bytes", "latency": "latency_ms"}


@dataclass(frozen=True)
class SixMetrics:
    """The six metrics of one model.

    Attributes:
        metric: the user's metric on the test split, in its own units; None where it was not measured.
        params: elements of all float constants.
        size_bytes: bytes on disk, external data included.
        macs: multiply-accumulates at batch 1.
        memory_bytes: constants and the largest sum of live activations, at batch 1.
        latency_ms: median wall time at batch 1 on this machine; NaN where it was not measured.
    """

    metric: float | None
    params: int
    size_bytes: int
    macs: int
    memory_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Enhancement:
    """What was gained: `original / compressed` for each cost, the drop (positive: worse) for the metric.

    Attributes:
        drop: of the metric, in its own units; None where it was not measured.
        params: ratio of the elements of all float constants.
        size_bytes: ratio of the bytes on disk.
        macs: ratio of the multiply-accumulates.
        memory_bytes: ratio of constants and the largest sum of live activations.
        latency_ms: ratio of the wall times; NaN where they were not measured.
    """

    drop: float | None
    params: float
    size_bytes: float
    macs: float
    memory_bytes: float
    latency_ms: float


@dataclass(frozen=True)
class Interval:
    """A drop (positive: worse) and its 95 % interval, paired over the examples, in the metric's units.

    Attributes:
        value: the drop.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerRow:
    """What became of one Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        name: of the node.
        op: its ONNX operator.
        weight_shape: as the weight stands in the graph.
        form: of the chain of factors; None where the layer is still one node.
        ranks: `(r,)`, or `(r1, r2)` for `tucker2`; empty without a form.
        params_before: elements of weight and bias.
        params_after: elements of all factors and the bias.
        macs_before: multiply-accumulates at batch 1.
        macs_after: those of the chain.
        reason: why it is frozen; None for a layer that is factorized, or could have been but was not.
        narrowed_shape: of the weight after channels were removed; None where none of its own were.
    """

    name: str
    op: str
    weight_shape: tuple[int, ...]
    form: str | None
    ranks: tuple[int, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    reason: str | None
    narrowed_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CandidateRow:
    """One plan that was tried.

    Attributes:
        name: how messages call it.
        plan: form and ranks by the name of each factorized layer.
        cost: in the units of the objective; with hard targets the largest share of one that is used.
        metric: on the images that decide; None where it was not measured.
        drop: there, positive when worse; None where it was not measured.
        trained: whether it was fine-tuned.
        seconds: wall time that it took to make, train and measure.
        accepted: whether the drop is within delta; None where the candidate was not judged.
        note: what else there is to say; empty for nothing.
    """

    name: str
    plan: Mapping[str, Choice]
    cost: float
    metric: float | None
    drop: float | None
    trained: bool
    seconds: float
    accepted: bool | None
    note: str = ""


@dataclass(frozen=True)
class SensitivityPoint:
    """One layer factorized alone: the relative error of its output, and how far the network's outputs diverge."""

    error: float
    divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """How much the outputs suffer for one layer's error.

    Attributes:
        layer: its name.
        points: measured, by rising error.
    """

    layer: str
    points: tuple[SensitivityPoint, ...]


@dataclass(frozen=True)
class CurvePoint:
    """One point of a fine-tune's curve.

    Attributes:
        step: steps done.
        loss: mean since the point before.
        metric: where it was looked at there; None elsewhere.
    """

    step: int
    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class Training:
    """One fine-tune, as it was fixed from the clock and can be repeated.

    Attributes:
        name: of the candidate that was trained.
        steps: of the optimizer; 0 where it was trained elsewhere.
        batch_size: examples of one step.
        threads: how many computed.
        learning_rate: its peak; NaN where it was trained elsewhere.
        curve: loss and metric along the way.
        floor: what the metric of the curve's points must reach, delta below the original on the same images.
    """

    name: str
    steps: int
    batch_size: int
    threads: int
    learning_rate: float
    curve: tuple[CurvePoint, ...] = ()
    floor: float | None = None


@dataclass(frozen=True)
class Confusion:
    """How often the original said one class where the compressed network said another, or the same."""

    original: int
    compressed: int
    count: int


@dataclass(frozen=True)
class Agreement:
    """Original and compressed network on the same test examples.

    Attributes:
        examples: how many were compared, the first of the test split.
        value: the metric `agreement`, in percent.
        both_right: examples that both classify rightly; None without labels, and so for the next three.
        only_original: that only the original does.
        only_compressed: that only the compressed network does.
        both_wrong: that neither does.
        classes: of a classifier; None for other networks.
        confusions: pairs of classes that occur, the most frequent first.
    """

    examples: int
    value: float
    both_right: int | None = None
    only_original: int | None = None
    only_compressed: int | None = None
    both_wrong: int | None = None
    classes: int | None = None
    confusions: tuple[Confusion, ...] = ()


@dataclass(frozen=True)
class TrainedBlock:
    """Layers that are trained together.

    Attributes:
        layers: their names.
        how: `end to end` (the loss at the outputs) or `reconstruction` (of the original's tensors).
        learns: the original's tensors that a reconstruction learns.
        ended_by: operators without a right gradient that stand behind.
    """

    layers: tuple[str, ...]
    how: str
    learns: tuple[str, ...]
    ended_by: tuple[str, ...]


@dataclass(frozen=True)
class DecidingImages:
    """The images that decide whether a candidate is accepted: where they come from and how many they are."""

    source: str
    count: int


@dataclass(frozen=True)
class TargetRow:
    """One hard target, in elements, multiply-accumulates, bytes or milliseconds.

    Attributes:
        name: of the cost, as in `objective`.
        limit: the most that was allowed.
        least: what the smallest plan would have, estimated; None where the original meets all targets.
    """

    name: str
    limit: float
    least: float | None


@dataclass(frozen=True)
class Report:
    """One run; every cost and metric that it states was computed or measured on the written models.

    Attributes:
        model: file name of the model.
        data: the data's path, as it was given.
        metric_name: the user's metric.
        original: six metrics of the model as it was given.
        stage1: after exploration; None where the run did not get there.
        stage2: after annealing; None for `--stage 1`.
        enhancement: original against the written model.
        drop: on the whole test split, positive when worse.
        drop_interval: the same with its interval.
        drop_select: on the images that decide.
        drop_report: on the images that only report.
        delta: the largest drop allowed, in the metric's units; None where hard targets were given without one.
        objective: the cost that was to become smaller.
        compressed: whether the written model is smaller than the normalized original.
        deciding: the images that decide.
        targets: hard targets that were given.
        layers: every Conv, ConvTranspose, Gemm and MatMul of the normalized graph.
        normalization: what it changed, in words.
        candidates: every plan that was tried, in turn.
        training: every fine-tune, in turn.
        blocks: layers that are trained together.
        seconds: wall time by phase.
        seed: of every random draw.
        sensitivities: of every marked layer that was measured.
        agreement: of original and written model on test examples.
        command: that was given; empty from Python.
        settings: the options of the command, by name; JSON values, so lists and no tuples.
        versions: of Python and the libraries in use, by name.
        machine: system, processor and cores, in words.
        warnings: what the user should know about the run.
        sha256: of the written model; its external data's name has their own digest in it.
        clock: every reading of time that decided something, in seconds (`--replay`).
        run: digest of options, versions, model and data (`--resume`).
    """

    model: str
    data: str
    metric_name: str
    original: SixMetrics
    delta: float | None
    objective: str
    compressed: bool
    stage1: SixMetrics | None = None
    stage2: SixMetrics | None = None
    enhancement: Enhancement | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    drop_select: Interval | None = None
    drop_report: Interval | None = None
    deciding: DecidingImages | None = None
    targets: tuple[TargetRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    normalization: tuple[str, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    agreement: Agreement | None = None
    candidates: tuple[CandidateRow, ...] = ()
    training: tuple[Training, ...] = ()
    blocks: tuple[TrainedBlock, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    warnings: tuple[str, ...] = ()
    sha256: str = ""
    clock: tuple[float, ...] = ()
    run: str = ""

    @property
    def written(self) -> SixMetrics:
        """The six metrics of the model that was written."""
        return self.stage2 or self.stage1 or self.original

    def missed(self) -> tuple[TargetRow, ...]:
        """The hard targets that the written model does not meet."""
        return tuple(row for row in self.targets if getattr(self.written, COST_FIELDS[row.name]) > row.limit)

    def to_json(self) -> str:
        """Write as JSON: keys in the order of the fields, floats in full, null for NaN and infinity."""
        return json.dumps(plain(dataclasses.asdict(self)), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "report") -> Report:
        """Read what `to_json` wrote; null becomes NaN where a number must stand.

        Args:
            text: the JSON.
            source: the file's name, for the message.

        Raises:
            UsageError: not JSON, or not such a report; names the key.
        """
        try:
            return cast(Report, decode(cls, json.loads(text), "report"))
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, or 5000 brackets, too
            raise UsageError(f"{source}: is not JSON ({error}); give a report that compress wrote") from error
        except MismatchError as error:
            raise UsageError(f"{source}: {error}; give a report that this version wrote") from None


def enhancement(original: SixMetrics, compressed: SixMetrics, drop: float | None) -> Enhancement:
    """Compute `original / compressed` for each of the five costs; NaN where the divisor is zero."""
    ratios = {name: ratio(getattr(original, name), getattr(compressed, name)) for name in COST_FIELDS.values()}
    return Enhancement(drop=drop, **ratios)


def ratio(before: float, after: float) -> float:
    """Divide `before / after`; NaN where `after` is zero."""
    return before / after if after else math.nan


def by_reason(layers: Iterable[LayerRow | Frozen]) -> dict[str, list[str]]:
    """Names of frozen layers by the reason why; layers without one are left out."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason is not None:
            found.setdefault(layer.reason, []).append(layer.name)
    return found
