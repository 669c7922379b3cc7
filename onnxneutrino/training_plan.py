"""How a network is trained: as a whole where gradients are right everywhere, in blocks where they are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.blocks import Block, blocks, cut_at_faults, cut_between_layers
from onnxneutrino.differentiable import differentiated
from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.finetune import Example
from onnxneutrino.graph import TensorType
from onnxneutrino.graph import arrays as graph_arrays
from onnxneutrino.groups import as_inputs, cut_out, grouped, loss_of
from onnxneutrino.large import is_large
from onnxneutrino.losses import PREFIX, Loss, with_loss
from onnxneutrino.plan import Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.selfcheck import Verdict, gradient_check
from onnxneutrino.training_copy import check_training_copy, fed_types, training_copy

CHECKED_SHARE = 8
TINY = 1e-12


@dataclass(frozen=True)
class TrainingPlan:
    """What fine-tuning learns.

    Attributes:
        loss: with its cuts.
        blocks: which layers learn what.
        faulty: operators whose gradient the self-check found wrong.
        warnings: for the report.
    """

    loss: Loss
    blocks: tuple[Block, ...]
    faulty: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def plan_training(
    model: ModelProto,
    types: Mapping[str, TensorType],
    layers: Sequence[Layer],
    trainable: Sequence[str],
    loss: Loss,
    inputs: Mapping[str, NDArray[Any]],
    *,
    batch: int,
    reconstruct: bool,
    threads: int,
    labels: NDArray[Any] | None = None,
) -> TrainingPlan:
    """Find out where gradients end, and check those that are left.

    Args:
        model: the original with a free batch.
        types: of its tensors at batch 1.
        layers: the marked layers.
        trainable: other initializers that training may change.
        loss: what the whole network would learn.
        inputs: `batch` examples.
        batch: examples in a step.
        reconstruct: cut between layers too, and use no labels; a large model is always trained like that.
        threads: for the runtime.
        labels: of the examples, for a loss of the user's that reads them.

    Raises:
        TrainingError: there is no training copy, or nothing that can be trained; or a loss of the user's cannot be
            learned from end to end.
    """
    reconstruct = reconstruct or is_large(layers)
    if reconstruct and loss.kind == "own":
        raise TrainingError("a loss of your own needs a network that is trained as a whole; this one is too large")
    copy = training_copy(model, batch, types)
    check_training_copy(model, copy, inputs, threads)
    count = max(1, batch // CHECKED_SHARE)
    scope = _Scope(
        model=model,
        copy=copy,
        small=training_copy(model, count, types),
        layers=layers,
        weights=_floats(copy, [*(name for layer in layers for name in layer.initializers), *trainable]),
        loss=dataclasses.replace(loss, label_weight=0.0) if reconstruct else loss,
        inputs=inputs,
        few={name: array[:count] for name, array in inputs.items()} if count < batch else inputs,
        labels=None if labels is None or not loss.label_weight else labels[:count],
        reconstruct=reconstruct,
        threads=threads,
    )
    plan, fault = _attempt(scope, ())
    return plan if fault is None else _without_culprit(scope, plan, fault)


@dataclass(frozen=True, eq=False)
class _Scope:
    """What the attempts share; `small`, `few` and `labels` are copy, inputs and labels of the self-check."""

    model: ModelProto
    copy: ModelProto
    small: ModelProto
    layers: Sequence[Layer]
    weights: Sequence[str]
    loss: Loss
    inputs: Mapping[str, NDArray[Any]]
    few: Mapping[str, NDArray[Any]]
    labels: NDArray[Any] | None
    reconstruct: bool
    threads: int


def _attempt(scope: _Scope, faulty: tuple[str, ...]) -> tuple[TrainingPlan, str | None]:
    """The plan when `faulty` operators have no gradient, and what the self-check says about it."""
    copy, loss = scope.copy, scope.loss
    cut = cut_at_faults(copy, scope.weights, loss.outputs, faulty)
    if scope.reconstruct:
        cut = cut_between_layers(copy, cut, scope.weights, loss.outputs, [layer.input for layer in scope.layers])
    if not (cut.ends or cut.learned):
        kinds = ", ".join(sorted(set(cut.faults.values()))) or "nothing"
        raise TrainingError(f"no layer can be trained: there is no gradient behind {kinds}; use --trainer none")
    if loss.kind == "own" and (cut.fed or cut.learned):
        kinds = ", ".join(sorted(set(cut.faults.values())))
        raise TrainingError(
            f"a loss of your own cannot be learned from end to end: there is no gradient behind {kinds}"
        )
    ends = loss.outputs if loss.kind == "own" else cut.ends
    own = dataclasses.replace(loss, outputs=ends, reconstructed=cut.learned, fed=cut.fed)
    own = dataclasses.replace(own, scales=_scales(own, _teacher(scope, own, scope.inputs)))
    weights = set(scope.weights)
    groups = {layer.name: [name for name in layer.initializers if name in weights] for layer in scope.layers}
    found = blocks(copy, cut, groups)
    if scope.reconstruct:
        found = [dataclasses.replace(block, reconstructed=True) for block in found]
    trained = {name for block in found for name in block.layers}
    checked = [names for layer, names in groups.items() if layer in trained]
    example = Example(fed_types(scope.small, scope.few), _teacher(scope, own, scope.few), None)
    if own.kind == "own":
        example = dataclasses.replace(example, labels=scope.labels)
    if is_large(scope.layers):
        verdict = _check_in_parts(scope, own, found, checked, example)
    else:
        verdict = gradient_check(scope.small, checked, own, example, scope.threads)
    warnings = (f"gradients were not checked: {verdict.note}",) if verdict.note else ()
    return TrainingPlan(own, tuple(found), faulty, warnings), verdict.fault


def _check_in_parts(
    scope: _Scope, loss: Loss, found: Sequence[Block], layers: Sequence[Sequence[str]], example: Example
) -> Verdict:
    """What the self-check says about the first and the last block of a large model, each cut out of it."""
    values = {**example.inputs, **dict(zip(loss.tensors, example.teacher, strict=True))}
    parts = grouped(scope.small, found, loss, scope.weights, 0)
    verdict = Verdict(None, 0, 0.0)
    for part in dict.fromkeys((parts[0], parts[-1])):
        model = cut_out(scope.small, part, values)
        held = {tensor.name for tensor in model.graph.initializer}
        checked = [[name for name in names if name in held] for names in layers]
        own = loss_of(part, loss)
        few = Example(as_inputs(part, values), [values[name] for name in own.tensors], None)
        verdict = gradient_check(model, checked, own, few, scope.threads)
        if verdict.fault is not None:
            return verdict
    return verdict


def _without_culprit(scope: _Scope, plan: TrainingPlan, fault: str) -> TrainingPlan:
    """The plan without the one operator whose gradient is at fault."""
    graph, _ = with_loss(scope.copy, plan.loss)
    ends = [value.name for value in graph.graph.output]
    kinds = dict.fromkeys(node.op_type for node in differentiated(graph, scope.weights, ends))
    for kind in kinds:
        if any(own.op_type == kind and own.name.startswith(PREFIX) for own in graph.graph.node):
            continue  # the loss itself needs it
        try:
            tried, again = _attempt(scope, (kind,))
        except TrainingError:
            continue
        if again is None:
            warning = (
                f"ONNX Runtime training's gradient of {kind} is wrong in this model ({fault}): "
                "what stands before it learns by reconstruction"
            )
            return dataclasses.replace(tried, warnings=(*tried.warnings, warning))
    raise TrainingError(f"the gradient self-check failed: {fault}; use --trainer none, and please report the model")


def _teacher(scope: _Scope, loss: Loss, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    try:
        return Runner(scope.model, loss.tensors, threads=scope.threads)(inputs)
    except ModelError as error:
        raise TrainingError(f"no training in blocks: {error}; use --trainer none") from error


def _scales(loss: Loss, teacher: Sequence[NDArray[Any]]) -> tuple[float, ...]:
    """One over the variance of each tensor of which the squared error is taken."""
    values = dict(zip(loss.tensors, teacher, strict=True))
    return tuple(1.0 / max(float(np.var(np.asarray(values[name], np.float64))), TINY) for name in loss.squared)


def _floats(model: ModelProto, names: Sequence[str]) -> list[str]:
    held = graph_arrays(model)
    return [name for name in dict.fromkeys(names) if name in held and held[name].dtype == np.float32]
