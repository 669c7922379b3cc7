"""Gradients of the training artifacts against central differences of the same loss.

A direction `d` follows the gradient half way and is random for the rest, so that a gradient of the wrong size, the
wrong direction or of zero is seen alike. The gradient is right where `gᵀd = (L(w + εd) - L(w - εd)) / 2ε` for one of
a few steps `ε`: too small a step drowns in single precision, too large a one passes kinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from onnxneutrino.finetune import Arrays, Example, Trainer, consumed
from onnxneutrino.graph import arrays, element_dtype
from onnxneutrino.losses import Loss, loss_inputs, with_loss
from onnxneutrino.runtime import Runner
from onnxneutrino.weights import array

# By how much a step moves the loss, relative, by the gradient that is checked; the likeliest to do comes first.
MOVES = (1e-3, 1e-4, 1e-2, 3e-5, 3e-2)
LEAST_LOSS = 1e-3  # a smaller one is taken for this: of a loss of zero every share is zero
ENOUGH = 5e-3  # an error with which no other step is tried
FARTHEST = 3e-2  # of the arrays, relative
NOISE = 2e-5  # relative; a hundred times that of a loss in single precision

LossAt = Callable[[Mapping[str, np.ndarray]], float]


@dataclass(frozen=True)
class Derivative:
    """One directional derivative.

    Attributes:
        names: the arrays that moved.
        analytic: from the training artifacts.
        numeric: the central difference that is nearest to it.
        scale: what an error is measured against: the larger of the two, or the noise of the difference.
    """

    names: tuple[str, ...]
    analytic: float
    numeric: float
    scale: float

    @property
    def error(self) -> float:
        """Difference of the two, relative."""
        return abs(self.analytic - self.numeric) / self.scale


def derivatives(
    reference: ModelProto,
    copy: ModelProto,
    groups: Iterable[Sequence[str]],
    loss: Loss,
    example: Example,
    *,
    threads: int = 1,
    seed: int = 0,
) -> list[Derivative]:
    """One derivative for each group of float initializers.

    Args:
        reference: the graph whose loss is differenced; any opset.
        copy: the training copy whose artifacts give the gradient; it holds the same initializers.
        groups: names of initializers that move together.
        loss: what is differentiated.
        example: one batch of the copy's size.
        threads: for the runtime.
        seed: of the random part of the directions.

    Raises:
        TrainingError: the artifacts cannot be made.
    """
    wanted = [list(group) for group in groups]
    names = list(dict.fromkeys(name for group in wanted for name in group))
    with Trainer(copy, names, loss, threads) as trainer:
        gradients = trainer.gradients(example)
    held = {name: value for name, value in arrays(reference).items() if name in gradients}
    loss_at = loss_function(reference, list(held), loss, example, threads)
    generator = np.random.default_rng(seed)
    found = []
    for group in wanted:
        moved = [name for name in group if name in held]
        if moved:
            found.append(_derivative(moved, gradients, held, loss_at, generator))
    return found


def _derivative(
    names: Sequence[str],
    gradients: Arrays,
    held: Mapping[str, np.ndarray],
    loss_at: LossAt,
    generator: np.random.Generator,
) -> Derivative:
    direction = {name: generator.standard_normal(held[name].shape) for name in names}
    own = {name: np.asarray(gradients[name], np.float64) for name in names}
    length, size = _norm(direction), _norm(own)
    if size > 0:
        mixed = {name: direction[name] / length + own[name] / size for name in names}
        if _norm(mixed) > 0:  # the two halves of a direction in one dimension may cancel
            direction = mixed
        length = _norm(direction)
    direction = {name: value / length for name, value in direction.items()}
    analytic = float(sum(np.sum(own[name] * direction[name]) for name in names))
    start = {name: np.asarray(held[name], np.float64) for name in names}
    # Arrays of zeros are as large as ones would be.
    farthest = FARTHEST * (_norm(start) or float(np.sqrt(sum(value.size for value in start.values()))))
    here = abs(loss_at(start))
    best: Derivative | None = None
    for move in MOVES:
        change = farthest * move / max(MOVES)
        if analytic:
            change = min(change, move * max(here, LEAST_LOSS) / abs(analytic))
        ahead, behind = (
            loss_at({name: start[name] + sign * change * direction[name] for name in names}) for sign in (1, -1)
        )
        numeric = (ahead - behind) / (2 * change)
        noise = NOISE * max(abs(ahead), abs(behind), LEAST_LOSS) / change
        tried = Derivative(tuple(names), analytic, numeric, max(abs(analytic), abs(numeric), noise, 1e-30))
        best = tried if best is None or tried.error < best.error else best
        if best.error <= ENOUGH:
            break
    assert best is not None
    return best


def _norm(values: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in values.values())))


def loss_function(model: ModelProto, names: Sequence[str], loss: Loss, example: Example, threads: int) -> LossAt:
    """The loss of one batch as a function of these initializers; those it is not given keep their values."""
    graph_model, feeds = with_loss(model, loss)
    graph = graph_model.graph
    kinds = {value.name: element_dtype(value.type.tensor_type.elem_type) for value in graph.input}
    moved = set(consumed(graph_model, names))
    start = {tensor.name: array(tensor) for tensor in graph.initializer if tensor.name in moved}
    left = [tensor for tensor in graph.initializer if tensor.name not in moved]
    graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in graph.initializer
        if tensor.name in moved
    )
    kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in left]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    runner = Runner(graph_model, threads=threads)
    values = {**example.inputs, **loss_inputs(loss, example.teacher, example.labels)}
    fixed = {name: np.asarray(values[name], kinds[name]) for name in feeds}

    def loss_at(own: Mapping[str, np.ndarray]) -> float:
        given = {name: np.asarray(own.get(name, start[name]), start[name].dtype) for name in start}
        return float(np.asarray(runner({**fixed, **given})[0]).reshape(-1)[0])

    return loss_at
