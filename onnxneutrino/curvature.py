"""How much each output of a layer matters: K-FAC's output factor (Martens and Grosse 2015).

For a layer's output `y` at one position, `G = E[g gᵀ]` with `g` the gradient of the loss with respect to `y` and
labels drawn from the model's own softmax; no true labels are needed. An error `e` in the output costs about
`½ eᵀ G e`. The gradient is read from a zero that is added to the output and counts as trainable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxneutrino.calibrate import Run
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.graph import TensorType, copied, tensor_types
from onnxneutrino.losses import Loss, rows, softmax
from onnxneutrino.plan import Array, Layer
from onnxneutrino.training_copy import training_copy
from onnxneutrino.weights import array

SUFFIX = "/onnxneutrino/zero"
LARGE = 1024


def output_curvature(
    model: ModelProto,
    batch: int,
    layers: Sequence[Layer],
    loss: Loss,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    teacher: Run,
    threads: int,
    seed: int,
    types: Mapping[str, TensorType] | None = None,
) -> dict[str, Array]:
    """`G`, `(O, O)`, of every layer of a classifier.

    Args:
        model: the original with a symbolic batch.
        batch: examples of one run.
        layers: whose outputs.
        loss: of kind `classes`; its weights and temperature do not matter.
        batches: inputs, each of exactly `batch` examples.
        teacher: gives the original's logits.
        threads: for the runtime.
        seed: of the drawn labels.
        types: of the inputs at batch 1, where the model leaves more than the batch free.

    Raises:
        TrainingError: the network cannot be differentiated.
    """
    copy = training_copy(model, batch, types)
    seen = tensor_types(copy, {})  # of fixed shapes, with the types noted that inference does not find
    shapes = {use.output: seen[use.output].shape for layer in layers for use in layer.uses}
    copy, weights = with_weights_fed(with_zeros(copy, shapes), {name + SUFFIX for name in shapes})
    sums = {layer.name: np.zeros((len(layer.bias), len(layer.bias))) for layer in layers}
    generator = np.random.default_rng(seed)
    hard = dataclasses.replace(loss, label_weight=1.0, temperature=1.0)
    count = 0
    with Trainer(copy, [name + SUFFIX for name in shapes], hard, threads) as trainer:
        for inputs in batches:
            logits = teacher(inputs)
            gradients = trainer.gradients(Example({**inputs, **weights}, logits, _draw(logits[0], generator)))
            count += len(logits[0])
            for name, use in ((layer.name, use) for layer in layers for use in layer.uses):
                # The loss is a mean over the batch; one example's own gradient is that many times as large.
                own = _by_output(use, gradients[use.output + SUFFIX]) * len(logits[0])
                sums[name] += own.T @ own
    return {name: np.asarray(total / max(count, 1), np.float32) for name, total in sums.items()}


def _draw(logits: NDArray[Any], generator: np.random.Generator) -> NDArray[np.int64]:
    """One label for each row, with the probabilities of its softmax."""
    cumulated = np.cumsum(softmax(rows(logits)), axis=-1)
    drawn = generator.random((len(logits), 1)) * cumulated[:, -1:]
    return np.asarray((cumulated < drawn).sum(axis=-1), np.int64)


def _by_output(layer: Layer, gradient: NDArray[Any]) -> Array:
    """Rows `(examples · positions, O)`."""
    last = gradient if layer.kind in ("gemm", "matmul", "map") else np.moveaxis(gradient, 1, -1)
    return np.asarray(last.reshape(-1, last.shape[-1]), np.float32)


def with_zeros(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> ModelProto:
    """A copy in which a zero initializer of its shape is added to each of these tensors."""
    copy = copied(model)
    nodes = []
    for node in copy.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in shapes:
                node.output[index] = f"{name}{SUFFIX}/before"
                nodes.append(
                    helper.make_node("Add", [node.output[index], name + SUFFIX], [name], name=f"{name}{SUFFIX}/add")
                )
    own = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(own)
    for name, shape in shapes.items():
        data = np.zeros(shape, np.float32).tobytes()
        copy.graph.initializer.append(helper.make_tensor(name + SUFFIX, TensorProto.FLOAT, shape, data, raw=True))
    del copy.graph.value_info[:]
    return copy


def with_weights_fed(model: ModelProto, kept: Collection[str]) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
    """A copy whose large float initializers, those in `kept` aside, are inputs, and their values.

    The training runtime builds its graphs through about eight copies of what a model holds: for a gradient or two
    it is much cheaper to hand the weights in.
    """
    copy = copied(model)
    weights: dict[str, NDArray[Any]] = {}
    listed = {value.name for value in copy.graph.input}
    left = []
    for tensor in copy.graph.initializer:
        if tensor.name in kept or tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LARGE:
            left.append(tensor)
            continue
        weights[tensor.name] = np.array(array(tensor))
        if tensor.name not in listed:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))
    own = [TensorProto.FromString(tensor.SerializeToString()) for tensor in left]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(own)
    return copy, weights
