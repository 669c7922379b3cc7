"""From a file and the user's wishes to what every command needs: graph, types, data, metric, original's score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import cost, metrics
from onnxneutrino.config import Config
from onnxneutrino.data import RANDOM_EXAMPLES, Dataset, IndexedSplit, Inputs, InputSpec, Split, open_data
from onnxneutrino.errors import DataError, ModelError
from onnxneutrino.graph import (
    TensorType,
    batch_axes,
    check,
    declared_shape,
    element_dtype,
    fixed_shapes,
    real_inputs,
    tensor_types,
)
from onnxneutrino.losses import Loss
from onnxneutrino.passes import free_batch
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Frozen
from onnxneutrino.runtime import Runner, check_ends, observed_types
from onnxneutrino.soundness import size_fault

CLASSIFIERS = ("top1", "top5", "f1", "agreement")
DEFAULT_METRIC, UNLABELLED_METRIC = "top1", "agreement"
BATCH_BYTES = 64 << 20
EVALUATION_BATCH = 128
RANDOM_MACS, FEWEST_RANDOM = 2 * 10**11, 16
TRAINING_BATCH = 64
TRAINING_BYTES = 1 << 30
FREED_TOLERANCE = 1e-3
CHANCE_FACTOR = 1.5
REARRANGING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True, eq=False)
class Opened:
    """A checked model with its tensor types at batch 1.

    Attributes:
        model: as it was given.
        name: how messages call it.
        shapes: of its inputs at batch 1.
        types: of all tensors of the main graph.
    """

    model: ModelProto
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, TensorType]


def open_model(model: ModelProto, name: str, config: Config) -> Opened:
    """Check a model and find its tensor types.

    Raises:
        ModelError: the checker refuses it, a weight is not finite, or a free dimension is not fixed.
    """
    check(model, name)
    wanted = {value.name for value in real_inputs(model)}
    for given in config.input_shape:
        if given not in wanted:
            raise ModelError(f"{name}: has no input '{given}'; its inputs are {', '.join(sorted(wanted))}")
    try:
        shapes = fixed_shapes(model, config.input_shape)
    except ModelError as error:
        sizes = data_shapes(model, config)
        if sizes is None:
            raise ModelError(f"{name}: {error}") from error
        shapes = sizes
    axes = batch_axes(model)
    for value in real_inputs(model):
        axis = axes[value.name]
        size = None if axis is None else (declared_shape(value) or ())[axis]
        if isinstance(size, int) and size != 1:
            raise ModelError(
                f"{name}: input '{value.name}' has a fixed batch of {size}; export it with batch 1 or a free batch"
            )
    known = tensor_types(model, shapes)
    fault = size_fault(model, known)
    if fault is not None:
        raise ModelError(f"{name}: {fault}")
    try:
        check_ends(model, shapes)
        types = observed_types(model, known, shapes)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    return Opened(model, name, shapes, types)


def data_shapes(model: ModelProto, config: Config) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the inputs at batch 1 where the data gives the sizes that the model leaves free.

    None where it does not: no data or random data, `--input-shape` is used, an input without a shape or whose
    first axis is not the batch, or examples of more than one size.

    Raises:
        DataError: see `open_data`.
    """
    values = real_inputs(model)
    axes = batch_axes(model)
    if not config.data.path or config.data.path == "random" or config.input_shape:
        return None
    specs = []
    for value in values:
        shape = declared_shape(value)
        if not shape or axes[value.name] != 0:
            return None
        sizes = tuple(entry if isinstance(entry, int) else None for entry in shape[1:])
        specs.append(InputSpec(value.name, (None, *sizes), element_dtype(value.type.tensor_type.elem_type)))
    dataset = open_data(config.data, specs, seed=config.seed, classes=None)
    found: dict[str, tuple[int, ...]] = {}
    for split in (dataset.train, dataset.test):
        # Arrays and folders have one size; batches of a loader may differ.
        drawn = split.batches(1)
        for batch in islice(drawn, 1) if isinstance(split, IndexedSplit) else drawn:
            own = {name: (1, *array.shape[1:]) for name, array in batch.inputs.items()}
            if own != (found or own):
                return None
            found = own
    return found


def without_layers(name: str, frozen: Sequence[Frozen]) -> ModelError:
    """The refusal of a model in which nothing can be factorized."""
    reasons = sorted({layer.reason for layer in frozen}) or ["it has no Conv, Gemm or MatMul"]
    return ModelError(f"{name}: no layer can be factorized: {'; '.join(reasons)}")


def check_main_graph(opened: Opened) -> None:
    """Refuse, before any data are read, a model without a layer outside the bodies of If, Loop and Scan.

    Raises:
        ModelError: gives the reasons.
    """
    found = find_layers(opened.model, opened.types)
    inside = [own for own in found if isinstance(own, Frozen) and own.reason.startswith("inside the body")]
    if len(inside) == len(found):
        raise without_layers(opened.name, inside)


def types_of(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorType]:
    """Types of all tensors at batch 1: inferred, the rest seen by running once."""
    return observed_types(model, tensor_types(model, shapes), shapes)


def input_specs(opened: Opened) -> list[InputSpec]:
    """What the data must feed: free axes are None, or as `--input-shape` fixes them."""
    specs = []
    axes = batch_axes(opened.model)
    for value in real_inputs(opened.model):
        shape: list[int | None] = list(opened.shapes[value.name])
        if axes[value.name] is not None and shape:
            shape[0] = None
        dtype = element_dtype(value.type.tensor_type.elem_type)
        specs.append(InputSpec(value.name, tuple(shape), dtype))
    return specs


def class_count(opened: Opened, metric: metrics.Metric) -> int | None:
    """Classes of a classifier with a `(N, C)` output, for checking labels; None for others."""
    output = opened.types.get(opened.model.graph.output[0].name)
    if metric.name not in CLASSIFIERS or output is None or not _is_scores(output):
        return None
    return output.shape[1]


def _is_scores(output: TensorType) -> bool:
    """Whether a tensor is `(N, C)`, or `(N, C, 1, 1)` as fully convolutional classifiers give it."""
    return len(output.shape) >= 2 and output.shape[1] > 1 and math.prod(output.shape[2:]) == 1


def choose_loss(model: ModelProto, types: Mapping[str, TensorType], config: Config) -> Loss:
    """Distillation on the logits for classifiers, on all float outputs else.

    A classifier has a metric of classes and a first output `(N, C)` or `(N, C, 1, 1)`; when that is a Softmax, its
    input is used. An output that puts others together is learned part by part, for they may differ in unit: of a
    detector's boxes and scores the boxes would have nearly all of the squared error.
    """
    first = model.graph.output[0].name
    output = types.get(first)
    if config.metric in CLASSIFIERS and output is not None and _is_scores(output):
        producer = next((node for node in model.graph.node if first in node.output), None)
        logits = producer.input[0] if producer is not None and producer.op_type == "Softmax" else first
        return Loss("classes", (logits,))
    floats = float_outputs(model, types)
    if not floats:
        raise ModelError(f"output '{first}': no output is float32 or float16, so there is nothing to learn from")
    return Loss("values", tuple(dict.fromkeys(part for name in floats for part in _parts(model, types, name))))


def _parts(model: ModelProto, types: Mapping[str, TensorType], output: str) -> list[str]:
    """The tensors that an output is concatenated from, its own order and shape aside; itself where it is not."""
    producers = {name: node for node in model.graph.node for name in node.output}

    def leaves(name: str) -> list[str]:
        node = producers.get(name)
        if node is None or node.op_type not in ("Concat", *REARRANGING):
            return [name]
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        return [leaf for source in sources for leaf in leaves(source)]

    found = leaves(output)
    learned = [producers.get(name) for name in found]
    if len(found) < 2 or any(node is None or node.op_type == "Constant" for node in learned):
        return [output]
    return found if all(name in types and types[name].dtype == types[output].dtype for name in found) else [output]


def float_outputs(model: ModelProto, types: Mapping[str, TensorType]) -> tuple[str, ...]:
    """The outputs that something can be learned from."""
    names = [value.name for value in model.graph.output]
    return tuple(name for name in names if name in types and types[name].dtype in (np.float32, np.float16))


def free(model: ModelProto, samples: Sequence[Inputs], threads: int) -> tuple[ModelProto, bool]:
    """A copy that runs any batch size, and whether that worked: a batch of samples must equal single runs."""
    axes = batch_axes(model)
    shapes = {value.name: declared_shape(value) or () for value in real_inputs(model)}
    fixed = any(axis is not None and isinstance(shapes[name][axis], int) for name, axis in axes.items())
    if not fixed or len(samples) < 2:
        return model, not fixed
    freed, _ = free_batch.run(model)
    together = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    single = Runner(model, threads=threads)
    try:
        joint = Runner(freed, threads=threads)(together)
    except ModelError:
        return model, False
    for index, output in enumerate(joint):
        wanted = np.concatenate([np.atleast_1d(single(sample)[index]) for sample in samples])
        if output.shape != wanted.shape:
            return model, False
        scale = float(np.max(np.abs(wanted.astype(np.float64)), initial=0.0))
        if not np.max(np.abs(output.astype(np.float64) - wanted), initial=0.0) <= FREED_TOLERANCE * max(scale, 1e-6):
            return model, False
    return freed, True


def first_examples(split: Split, count: int) -> list[Inputs]:
    """The first `count` examples of a split, each a batch of one."""
    found: list[Inputs] = []
    for batch in split.batches(1):
        found.append(batch.inputs)
        if len(found) == count:
            break
    return found


def evaluation_batch(opened: Opened) -> int:
    """Examples of an inference run: 128, fewer where the largest activation would exceed 64 MB."""
    made = [opened.types[name] for node in opened.model.graph.node for name in node.output if name in opened.types]
    largest = max((math.prod(own.shape) * own.dtype.itemsize for own in made), default=1)
    return int(min(max(BATCH_BYTES // max(largest, 1), 1), EVALUATION_BATCH))


def training_batch(model: ModelProto, types: Mapping[str, TensorType]) -> int:
    """Examples of a training step: 64, fewer where all activations together would exceed 1 GB."""
    made = {name for node in model.graph.node for name in node.output} & types.keys()
    one = sum(math.prod(types[name].shape) * types[name].dtype.itemsize for name in made)
    return int(min(max(TRAINING_BYTES // max(one, 1), 1), TRAINING_BATCH))


def evaluate(
    model: ModelProto | Path,
    split: Split,
    metric: metrics.Metric,
    batch: int,
    threads: int,
    reference: ModelProto | None,
) -> NDArray[Any]:
    """Metric statistics of every example of a split.

    Args:
        model: what to run.
        split: on what.
        metric: whose statistics.
        batch: examples of a run.
        threads: for the runtime.
        reference: the original, for metrics that compare with its outputs.
    """
    runner = Runner(model, threads=threads)
    original = Runner(reference, threads=threads) if metric.needs_reference and reference is not None else None
    rows = []
    for drawn in split.batches(batch):
        outputs = runner(drawn.inputs)
        beside = original(drawn.inputs) if original is not None else None
        rows.append(metrics.statistics(metric, outputs, drawn.targets, beside))
    return np.concatenate(rows)


def open_dataset(opened: Opened, metric: metrics.Metric, config: Config) -> Dataset:
    """The user's data; a metric that needs targets must find them.

    Raises:
        DataError: see `open_data`; or the test split has no targets for this metric.
    """
    dataset = _open(opened, metric, config)
    check_targets(dataset, metric, config)
    return dataset


def _open(opened: Opened, metric: metrics.Metric, config: Config) -> Dataset:
    """The data; of random inputs no more than 2e11 multiply-accumulates run through, but 16 at least."""
    one = max(cost.macs(opened.model, opened.types), 1)
    examples = min(max(RANDOM_MACS // one, FEWEST_RANDOM), RANDOM_EXAMPLES)
    specs, classes = input_specs(opened), class_count(opened, metric)
    return open_data(config.data, specs, seed=config.seed, classes=classes, examples=examples)


def check_targets(dataset: Dataset, metric: metrics.Metric, config: Config) -> None:
    """Refuse a test split without the targets that the metric needs."""
    if metric.needs_targets and config.data.path == "random":
        raise DataError(f"random inputs have no targets for {metric.name}; use --metric agreement or mse")
    if metric.needs_targets and not dataset.test.labelled:
        raise DataError(
            f"{config.data.path}: the test split has no targets for {metric.name}; add y_test, or use "
            "--metric agreement"
        )


def settled(opened: Opened, config: Config) -> tuple[Config, metrics.Metric, Dataset]:
    """The metric that is asked for and its data; without one top1, or agreement for data without targets.

    Returns:
        The configuration with the metric's name in it, the metric (a detector's reads its boxes with the loader's
        function `detections`), the data.

    Raises:
        NeutrinoError: the metric is not known or cannot be computed, or see `open_data`.
    """
    if config.metric:
        metric = metrics.resolve(config.metric, config.metric_base)
        dataset = open_dataset(opened, metric, config)
        return config, dataclasses.replace(metric, detections=dataset.detections), dataset
    metric = metrics.resolve(DEFAULT_METRIC, config.metric_base)
    dataset = _open(opened, metric, config)
    if not (dataset.train.labelled or dataset.test.labelled):
        metric = metrics.resolve(UNLABELLED_METRIC, config.metric_base)
    check_targets(dataset, metric, config)
    return dataclasses.replace(config, metric=metric.name), metric, dataset


def check_not_chance(value: float, metric: metrics.Metric, opened: Opened, config: Config) -> None:
    """Refuse a run whose original scores like guessing.

    Raises:
        DataError: names the usual suspects.
    """
    classes = class_count(opened, metric)
    chance = metrics.chance(metric, classes) if classes is not None else None
    if chance is not None and value <= CHANCE_FACTOR * chance:
        raise DataError(
            f"{opened.name}: {metric.name} on the test split is {value:.2f}, chance level is {chance:.2f}; check "
            f"layout ({config.data.layout}), scale ({config.data.scale:g}), mean and std of the data"
        )
