"""A loss of the user's: an onnxblock that a function returns, or an ONNX graph; both become one graph.

Its inputs are named: an output of the network by its own name, the original's as `teacher/<output>`, and `labels`. It
is run on a batch before anything is trained, the original as its own student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from onnxneutrino import finetune
from onnxneutrino.data_function import UserFunction, is_function, load_function
from onnxneutrino.differentiable import untrainable
from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.graph import RUNTIME_IR, copied, declared_shape, drop_unused, element_dtype, load, real_inputs
from onnxneutrino.losses import LABELS, TEACHER, Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.walk import reads

BATCH = "N"
GIVEN = "given/"
NO_LABELS = "the data has no targets, or --no-labels is given"


@dataclass(frozen=True, eq=False)
class OwnLoss:
    """What `--loss` names.

    Attributes:
        name: as the user wrote it.
        function: returns an onnxblock; None for a graph.
        graph: None for a function.
    """

    name: str
    function: UserFunction | None = None
    graph: ModelProto | None = None

    def wrong(self, what: str) -> TrainingError:
        """The one line for a loss that is not what it must be."""
        if self.function is None:
            return TrainingError(f"{self.name}: the loss {what}")
        error = self.function.wrong(f"gave a loss that {what}")
        assert isinstance(error, TrainingError)
        return error


def load_loss(reference: str) -> OwnLoss | None:
    """The loss that `--loss` names; None without one.

    Raises:
        TrainingError: a file or function that is missing or cannot be imported.
    """
    if is_function(reference):
        finetune.onnxblocks()  # so that the user's file can import them, too
        return OwnLoss(reference, load_function(reference, Path("."), TrainingError))
    if not reference:
        return None
    try:
        return OwnLoss(reference, graph=load(Path(reference)).model)
    except ModelError as error:
        raise TrainingError(f"loss {error}") from error


def prepared(own: OwnLoss, outputs: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None, threads: int = 1) -> Loss:
    """The loss as one checked graph.

    Args:
        own: what the user gave.
        outputs: the original's float outputs on a batch, by name.
        labels: the targets of the batch; None where there are none, or none are wanted.
        threads: for the runtime.

    Raises:
        TrainingError: the user's function failed, or what it gave is no loss of these outputs with right gradients.
    """
    graph = _built(own, outputs, labels) if own.function is not None else own.graph
    assert graph is not None
    graph = drop_unused(graph)
    known = [*outputs, *(TEACHER + name for name in outputs), *([] if labels is None else [LABELS])]
    used = {name for node in graph.graph.node for name in reads(node)}
    for index in reversed(range(len(graph.graph.input))):
        if graph.graph.input[index].name not in used:
            del graph.graph.input[index]
    read = [value.name for value in real_inputs(graph)]
    for name in read:
        if name == LABELS and labels is None:
            raise own.wrong(f"reads labels, and there are none: {NO_LABELS}")
        if name not in known:
            raise own.wrong(f"reads '{name}', which is not known; known are {', '.join(known)}")
    if not set(read) & set(outputs):
        raise own.wrong(f"reads no output of the network; its outputs are {', '.join(outputs)}")
    values = {**outputs, **{TEACHER + name: value for name, value in outputs.items()}}
    if LABELS in read and labels is not None:
        values[LABELS] = labels
        graph = _with_labels(own, graph, labels)
    _check_value(own, graph, {name: values[name] for name in read}, threads)
    faults = untrainable(graph, [name for name in read if name in outputs], [graph.graph.output[0].name])
    if faults:
        node, operator = faults[0]
        raise own.wrong(f"has node '{node}', and ONNX Runtime training has no right gradient for {operator}")
    learned = tuple(name for name in outputs if name in read or TEACHER + name in read)
    return Loss("own", learned, label_weight=float(LABELS in read), graph=graph.SerializeToString(deterministic=True))


def _built(own: OwnLoss, outputs: Mapping[str, NDArray[Any]], labels: NDArray[Any] | None) -> ModelProto:
    """The graph of the onnxblock that the function returns."""
    function = own.function
    assert function is not None
    onnxblock = finetune.onnxblocks()
    block = function()
    if not isinstance(block, onnxblock.Block):
        kind = type(block).__name__
        raise function.wrong(f"must return an onnxblock (onnxruntime.training.onnxblock.Block), not {kind}")
    inputs = [_input(prefix + name, value) for prefix in ("", TEACHER) for name, value in outputs.items()]
    if labels is not None:
        inputs.append(_input(LABELS, labels))
    # The runtime's blocks add an input of their own for a name that no node has.
    passing = [helper.make_node("Identity", [GIVEN + value.name], [value.name]) for value in inputs]
    for value in inputs:
        value.name = GIVEN + value.name
    graph = helper.make_graph(passing, "loss", inputs, [])
    opsets = [helper.make_opsetid("", finetune.MINIMUM_OPSET)]  # it is only ever converted up
    base = helper.make_model(graph, opset_imports=opsets, ir_version=RUNTIME_IR)
    names = list(outputs)
    with onnxblock.base(base) as built:
        try:
            given = block(names, [TEACHER + name for name in names], None if labels is None else LABELS)
        except Exception as error:
            hint = f"; labels is None: {NO_LABELS}" if labels is None else ""
            raise TrainingError(f"{function.failure(error)}{hint}") from error
        made: ModelProto = built.model
    if not isinstance(given, str):
        raise function.wrong(f"gave an onnxblock whose build must return the name of the loss, not {given!r}")
    del made.graph.node[: len(passing)]
    for value in made.graph.input:
        value.name = value.name.removeprefix(GIVEN)
    del made.graph.output[:]
    made.graph.output.append(helper.make_empty_tensor_value_info(given))
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return made


def _input(name: str, value: NDArray[Any]) -> ValueInfoProto:
    """A batch: floats as float32, whole numbers as int64, its first axis free."""
    kind = TensorProto.FLOAT if value.dtype.kind == "f" else TensorProto.INT64
    return helper.make_tensor_value_info(name, kind, [BATCH, *value.shape[1:]])


def _with_labels(own: OwnLoss, graph: ModelProto, labels: NDArray[Any]) -> ModelProto:
    """A copy whose input `labels` has the shape that the data's have."""
    copy = copied(graph)
    for value in real_inputs(copy):
        if value.name == LABELS:
            stated = declared_shape(value)
            fits = stated is None or (
                len(stated) == labels.ndim
                and all(not isinstance(a, int) or a == b for a, b in zip(stated[1:], labels.shape[1:], strict=True))
            )
            if not fits:
                raise own.wrong(f"takes labels of shape {list(stated or ())}; the data gives {list(labels.shape)}")
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(LABELS, kind, [BATCH, *labels.shape[1:]]))
    return copy


def _check_value(own: OwnLoss, graph: ModelProto, values: Mapping[str, NDArray[Any]], threads: int) -> None:
    """Run the loss on a batch: one finite float, without any axis."""
    ends = [value.name for value in graph.graph.output]
    if len(ends) != 1:
        raise own.wrong(f"has the outputs {', '.join(ends) or 'none'}; it must have one, a scalar")
    kinds = {value.name: element_dtype(value.type.tensor_type.elem_type) for value in real_inputs(graph)}
    given = {name: array.astype(kinds[name]) for name, array in values.items()}
    try:
        (value,) = Runner(graph, threads=threads)(given)
    except ModelError as error:
        raise own.wrong(f"cannot be computed on a batch: {error}") from error
    if value.shape != () or value.dtype != np.float32:
        raise own.wrong(f"is {value.dtype} of shape {list(value.shape)} on a batch; it must be one float32, a scalar")
    if not np.isfinite(value):
        raise own.wrong(f"is {value} on a batch, the original as its own student; it must be finite")
