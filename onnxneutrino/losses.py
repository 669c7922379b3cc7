"""What a network learns in fine-tuning, as a loss in its own graph.

`classes`: cross entropy with the labels plus the teacher's softened probabilities (Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network"). `values`: squared error to the teacher's outputs. Beside either,
tensors within the graph can be learned from the teacher's (block reconstruction, Li et al. 2021, "BRECQ"), and others
taken from the teacher instead of being computed. `own`: a graph of the user's (`own_loss.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx.compose
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.graph import capped_ir, convert_opset, drop_unused, inferred, opset, real_inputs, replace_uses
from onnxneutrino.plan import Array

PREFIX = "onnxneutrino/"
OWN = f"{PREFIX}own/"  # before the names of a loss of the user's
TEACHER, LABELS = "teacher/", "labels"  # inputs of a loss of the user's, beside the outputs themselves


@dataclass(frozen=True)
class Loss:
    """What the fine-tuned model learns.

    Attributes:
        kind: `classes`: cross entropy with the labels plus the teacher's softened probabilities (Hinton et
            al. 2015); `values`: squared error to the teacher's outputs; `own`: the user's graph.
        outputs: tensors of the graph it is taken on: the logits, or all float outputs. Empty where no gradient
            reaches them.
        label_weight: share of the labels in `classes`, 0 to 1; 0 trains on the teacher alone.
        temperature: softens the teacher's and the student's logits.
        reconstructed: tensors learned from the teacher's by squared error.
        fed: tensors whose readers are given the teacher's: no gradient passes there.
        scales: factors of the squared errors, of `outputs` (of kind `values`) and then `reconstructed`; empty for
            ones.
        graph: of kind `own`, a serialized model: its inputs are some of `outputs`, the original's as
            `teacher/<output>`, and `labels`; its one output is a scalar.
    """

    kind: Literal["classes", "values", "own"]
    outputs: tuple[str, ...]
    label_weight: float = 0.3
    temperature: float = 3.0
    reconstructed: tuple[str, ...] = ()
    fed: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    graph: bytes = field(default=b"", repr=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the teacher must give, in this order."""
        return (*self.outputs, *self.reconstructed, *self.fed)

    @property
    def squared(self) -> tuple[str, ...]:
        """The tensors of which the squared error is taken."""
        return (*(self.outputs if self.kind == "values" else ()), *self.reconstructed)


def loss_inputs(loss: Loss, teacher: Sequence[NDArray[Any]], labels: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """Values of the inputs that `with_loss` adds, from the teacher's tensors and the labels."""
    values = dict(zip(loss.tensors, teacher, strict=True))
    given: dict[str, NDArray[Any]] = {
        f"{PREFIX}target{index}": np.asarray(values[name], np.float32) for index, name in enumerate(loss.squared)
    }
    given.update({f"{PREFIX}fed{index}": np.asarray(values[name]) for index, name in enumerate(loss.fed)})
    if loss.kind == "own":
        given.update({f"{OWN}{TEACHER}{name}": np.asarray(values[name]) for name in loss.outputs})
        return given if labels is None else {**given, f"{OWN}{LABELS}": labels}
    if loss.kind == "values" or not loss.outputs:
        return given
    logits = rows(teacher[0])
    weight = loss.label_weight if labels is not None else 0.0
    soft = softmax(logits / loss.temperature) * np.float32((1 - weight) * loss.temperature**2)
    hard = np.zeros_like(logits)
    if labels is not None:
        hard[np.arange(len(labels)), labels] = weight
    return {**given, f"{PREFIX}soft": soft, f"{PREFIX}hard": hard}


def teacher_loss(loss: Loss, teacher: Sequence[NDArray[Any]], given: Mapping[str, NDArray[Any]]) -> float:
    """The loss of the teacher itself: a student that computes the same has this one, and not 0.

    Of a loss of the user's it is not known, and taken as 0.

    Args:
        loss: what is learned.
        teacher: its tensors, in the order of `Loss.tensors`.
        given: values of `loss_inputs`.
    """
    if loss.kind != "classes" or not loss.outputs:
        return 0.0
    logits = rows(teacher[0])
    terms = given[f"{PREFIX}hard"] * log_softmax(logits) + given[f"{PREFIX}soft"] * log_softmax(
        logits / loss.temperature
    )
    return -float(np.sum(terms, dtype=np.float64)) / len(logits)


def rows(logits: NDArray[Any]) -> Array:
    """Logits `(N, C)` or `(N, C, 1, 1)` as float32 `(N, C)`."""
    return np.asarray(logits, np.float32).reshape(len(logits), -1)


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def with_loss(model: ModelProto, loss: Loss) -> tuple[ModelProto, list[str]]:
    """The model with the loss as its only output, and the names of its inputs in order.

    `classes`: `-(1/B) Σ [hard · log softmax(z) + soft · log softmax(z/T)]`, the weights in `hard` and `soft`.
    Squared errors: the mean over their tensors of `scale · mean((y - t)²)`. `own`: the nodes of the user's graph. All
    are added. What the loss does not depend on is dropped.

    Raises:
        TrainingError: the shape of a tensor that is learned or fed is unknown, or the user's graph has operators that
            the opset of the model lacks.
    """
    copy = capped_ir(model)
    graph = copy.graph
    kept = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in kept]
    del graph.input[:]
    graph.input.extend(inputs)
    batch = inputs[0].type.tensor_type.shape.dim[0].dim_value
    types = _types(model)
    nodes = []
    terms = []

    def constant(name: str, value: float) -> str:
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def add_input(name: str, like: str, kind: int = TensorProto.FLOAT, flat: bool = False) -> str:
        shape = types.get(like, (kind, [0]))[1]
        if not all(shape):
            raise TrainingError(f"the shape of tensor '{like}' is unknown, so that nothing can be learned there")
        shape = [shape[0], math.prod(shape[1:])] if flat else shape
        graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    for index, name in enumerate(loss.fed):
        replace_uses(graph, name, add_input(f"{PREFIX}fed{index}", name, types.get(name, (TensorProto.FLOAT,))[0]))
    if loss.kind == "classes" and loss.outputs:
        logits = f"{PREFIX}logits"
        nodes.append(helper.make_node("Flatten", [loss.outputs[0]], [logits], axis=1))
        cooled = constant(f"{PREFIX}inverse_temperature", 1.0 / loss.temperature)
        nodes.append(helper.make_node("Mul", [logits, cooled], [f"{PREFIX}cooled"]))
        for kind, source in (("hard", logits), ("soft", f"{PREFIX}cooled")):
            target = add_input(f"{PREFIX}{kind}", loss.outputs[0], flat=True)
            log, product, total, term = (f"{PREFIX}{kind}_{part}" for part in ("log", "product", "sum", "term"))
            nodes.append(helper.make_node("LogSoftmax", [source], [log], axis=-1))
            nodes.append(helper.make_node("Mul", [log, target], [product]))
            nodes.append(helper.make_node("ReduceSum", [product], [total], keepdims=0))
            nodes.append(helper.make_node("Mul", [total, constant(f"{PREFIX}{kind}_scale", -1.0 / batch)], [term]))
            terms.append(term)
    if loss.kind == "own":
        part = _own_graph(loss, opset(model))
        for value in real_inputs(part):
            name = value.name.removeprefix(OWN)
            if name == LABELS:
                value.type.tensor_type.shape.dim[0].dim_value = batch
                graph.input.append(value)
            else:
                taught = name not in loss.outputs
                source = add_input(value.name, name.removeprefix(TEACHER)) if taught else name
                replace_uses(part.graph, value.name, source)
        nodes.extend(part.graph.node)
        graph.initializer.extend(part.graph.initializer)
        terms.append(part.graph.output[0].name)
    scales = loss.scales or (1.0,) * len(loss.squared)
    for index, (output, scale) in enumerate(zip(loss.squared, scales, strict=True)):
        target = add_input(f"{PREFIX}target{index}", output)
        parts = ("difference", "square", "mean", "term")
        difference, square, average, term = (f"{PREFIX}{part}{index}" for part in parts)
        nodes.append(helper.make_node("Sub", [output, target], [difference]))
        nodes.append(helper.make_node("Mul", [difference, difference], [square]))
        nodes.append(helper.make_node("ReduceMean", [square], [average], keepdims=0))
        share = constant(f"{PREFIX}scale{index}", scale / len(loss.squared))
        nodes.append(helper.make_node("Mul", [average, share], [term]))
        terms.append(term)
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        nodes.append(helper.make_node("Add", [total, term], [f"{PREFIX}total{index}"]))
        total = f"{PREFIX}total{index}"
    nodes.append(helper.make_node("Identity", [total], [f"{PREFIX}loss"]))
    for index, node in enumerate(nodes):
        node.name = f"{PREFIX}loss_node{index}"
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(f"{PREFIX}loss", TensorProto.FLOAT, []))
    copy = drop_unused(copy)
    return copy, [value.name for value in copy.graph.input]


def _own_graph(loss: Loss, target: int | None) -> ModelProto:
    """The user's graph in the opset of the model, all its names behind the prefix."""
    part = ModelProto.FromString(loss.graph)
    try:
        part = part if target is None else convert_opset(part, target)
    except ModelError as error:
        raise TrainingError(f"the loss: {error}") from error
    return onnx.compose.add_prefix(part, OWN)


def _types(model: ModelProto) -> dict[str, tuple[int, list[int]]]:
    """Element type and shape of every tensor; 0 stands for a size that is not known."""
    graph = inferred(model).graph
    return {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
