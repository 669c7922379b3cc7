"""What a network learns in fine-tuning, as a loss in its own graph.

`classes`: cross entropy with the labels plus the teacher's softened probabilities (Hinton et al. 2015,
"Distilling the Knowledge in a Neural Network"). `values`: squared error to the teacher's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxneutrino.graph import capped_ir, inferred
from onnxneutrino.plan import Array


@dataclass(frozen=True)
class Loss:
    """What the fine-tuned model learns.

    Attributes:
        kind: `classes`: cross entropy with the labels plus the teacher's softened probabilities (Hinton et
            al. 2015); `values`: squared error to the teacher's outputs.
        outputs: tensors of the graph it is taken on: the logits, or all float outputs.
        label_weight: share of the labels in `classes`, 0 to 1; 0 trains on the teacher alone.
        temperature: softens the teacher's and the student's logits.
    """

    kind: Literal["classes", "values"]
    outputs: tuple[str, ...]
    label_weight: float = 0.3
    temperature: float = 3.0


def loss_inputs(loss: Loss, teacher: Sequence[NDArray[Any]], labels: NDArray[Any] | None) -> dict[str, Array]:
    """Values of the inputs that `with_loss` adds, from the teacher's outputs and the labels."""
    if loss.kind == "values":
        return {f"onnxneutrino/target{index}": np.asarray(output, np.float32) for index, output in enumerate(teacher)}
    logits = np.asarray(teacher[0], np.float32)
    weight = loss.label_weight if labels is not None else 0.0
    soft = softmax(logits / loss.temperature) * np.float32((1 - weight) * loss.temperature**2)
    hard = np.zeros_like(logits)
    if labels is not None:
        hard[np.arange(len(labels)), labels] = weight
    return {"onnxneutrino/soft": soft, "onnxneutrino/hard": hard}


def softmax(logits: Array) -> Array:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def with_loss(model: ModelProto, loss: Loss) -> tuple[ModelProto, list[str]]:
    """The model with the loss as its only output, and the names of its inputs in order.

    `classes`: `-(1/B) Σ [hard · log softmax(z) + soft · log softmax(z/T)]`, the weights in `hard` and `soft`.
    `values`: `mean over outputs of mean((y - t)²)`, targets `t` and outputs divided by nothing: the caller
    scales the teacher's outputs if it wants to.
    """
    copy = capped_ir(model)
    graph = copy.graph
    kept = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in kept]
    del graph.input[:]
    graph.input.extend(inputs)
    batch = inputs[0].type.tensor_type.shape.dim[0].dim_value
    shapes = _shapes(model)
    nodes = []
    terms = []

    def constant(name: str, value: float) -> str:
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def add_input(name: str, shape: Sequence[int]) -> str:
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    if loss.kind == "classes":
        logits = loss.outputs[0]
        cooled = constant("onnxneutrino/inverse_temperature", 1.0 / loss.temperature)
        nodes.append(helper.make_node("Mul", [logits, cooled], ["onnxneutrino/cooled"]))
        for kind, source in (("hard", logits), ("soft", "onnxneutrino/cooled")):
            target = add_input(f"onnxneutrino/{kind}", shapes[logits])
            log, product, total = (f"onnxneutrino/{kind}_{part}" for part in ("log", "product", "sum"))
            nodes.append(helper.make_node("LogSoftmax", [source], [log], axis=-1))
            nodes.append(helper.make_node("Mul", [log, target], [product]))
            nodes.append(helper.make_node("ReduceSum", [product], [total], keepdims=0))
            terms.append(total)
        scale = -1.0 / batch
    else:
        for index, output in enumerate(loss.outputs):
            target = add_input(f"onnxneutrino/target{index}", shapes[output])
            difference, square, average = (f"onnxneutrino/{part}{index}" for part in ("difference", "square", "mean"))
            nodes.append(helper.make_node("Sub", [output, target], [difference]))
            nodes.append(helper.make_node("Mul", [difference, difference], [square]))
            nodes.append(helper.make_node("ReduceMean", [square], [average], keepdims=0))
            terms.append(average)
        scale = 1.0 / len(loss.outputs)
    total = terms[0]
    for index, term in enumerate(terms[1:]):
        nodes.append(helper.make_node("Add", [total, term], [f"onnxneutrino/total{index}"]))
        total = f"onnxneutrino/total{index}"
    nodes.append(helper.make_node("Mul", [total, constant("onnxneutrino/scale", scale)], ["onnxneutrino/loss"]))
    for index, node in enumerate(nodes):
        node.name = f"onnxneutrino/loss_node{index}"
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("onnxneutrino/loss", TensorProto.FLOAT, []))
    return copy, [value.name for value in graph.input]


def _shapes(model: ModelProto) -> dict[str, list[int]]:
    graph = inferred(model).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
