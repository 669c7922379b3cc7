"""Run the normalizing passes one by one, put right what they should not touch, undo what changes an output.

Every pass is judged by the original's own outputs on real inputs; a pass that fails, or differs, or
(onnxslim) makes the file larger leaves no trace but a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxneutrino.graph import complete_inputs, copied, data_bytes, real_inputs
from onnxneutrino.passes import NORMALIZE, slim
from onnxneutrino.weights import LARGE_MODEL_BYTES, hidden

Tensor: TypeAlias = NDArray[np.generic]
Run: TypeAlias = Callable[[ModelProto, dict[str, Tensor]], list[Tensor]]

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
LISTED = 3
SLIM_NODES = 5000  # onnxslim takes 3 to 8 ms a node


def normalize(model: ModelProto, samples: Sequence[dict[str, Tensor]], run: Run) -> tuple[ModelProto, list[str]]:
    """Apply the normalizing passes in order.

    Args:
        model: a model that passed `check`.
        samples: inputs by name, on which the outputs are compared.
        run: computes a model's outputs for one sample.

    Returns:
        The simpler model, its inputs, outputs, opsets and metadata as they were, and lines for the report.

    Raises:
        NeutrinoError: the original itself cannot be run.
    """
    expected = [run(model, sample) for sample in samples]
    tolerance = HALF_TOLERANCE if _is_half(model) else TOLERANCE
    current, notes = copied(model), list[str]()
    large = data_bytes(model) >= LARGE_MODEL_BYTES
    for step in NORMALIZE:
        name = step.__module__.rpartition(".")[2]
        if large and step is slim.run:
            notes.append(f"slim skipped: it would copy {data_bytes(model) >> 20} MB of weights several times")
            continue
        if len(current.graph.node) > SLIM_NODES and step is slim.run:
            notes.append(f"slim skipped: it takes minutes on {len(current.graph.node)} nodes")
            continue
        try:
            candidate, done = step(copied(current))
            if not done and step is not slim.run:
                continue
            candidate = restored(model, candidate)
            onnx.checker.check_model(hidden(candidate))
            reason = _larger(current, candidate) if step is slim.run else None
            if reason is not None and not done:
                continue  # nothing was gained and nothing is lost: not worth a line
            reason = reason or _difference(candidate, samples, expected, run, tolerance)
        except (Exception, SystemExit) as error:  # a library may raise anything; the run goes on without it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason is not None:
            notes.append(f"{name} undone: {reason}")
            continue
        current = candidate
        notes += summarized(done)
    return current, notes


def _is_half(model: ModelProto) -> bool:
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer) or any(
        value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in real_inputs(model)
    )


def _larger(before: ModelProto, after: ModelProto) -> str | None:
    old, new = before.ByteSize(), after.ByteSize()
    return f"the model would grow from {old} to {new} bytes" if new > old else None


def _difference(
    candidate: ModelProto,
    samples: Sequence[dict[str, Tensor]],
    expected: Sequence[list[Tensor]],
    run: Run,
    tolerance: float,
) -> str | None:
    """Why the candidate's outputs are not the expected ones, or None."""
    for sample, wanted in zip(samples, expected, strict=True):
        found = run(candidate, sample)
        for value, before, after in zip(candidate.graph.output, wanted, found, strict=True):
            if before.shape != after.shape or before.dtype != after.dtype:
                return f"output '{value.name}' is {after.dtype} {after.shape}, was {before.dtype} {before.shape}"
            error = relative_error(before, after)
            if not error <= tolerance:
                return f"output '{value.name}' differs by {error:.1e} of its largest value"
    return None


def relative_error(before: Tensor, after: Tensor) -> float:
    """`max |after - before| / max |before|`; for anything but floats 0 if equal, else infinity.

    NaN and infinities must stand in the same places.
    """
    if before.dtype.kind != "f":
        return 0.0 if np.array_equal(before, after) else float("inf")
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], after[~finite], equal_nan=True):
        return float("inf")
    old, new = before[finite].astype(np.float64), after[finite].astype(np.float64)
    if not old.size:
        return 0.0
    largest = np.abs(old).max()
    return float(np.abs(new - old).max() / (largest if largest > 0 else 1.0))


def restored(original: ModelProto, candidate: ModelProto) -> ModelProto:
    """A copy of `candidate` with everything that is not its nodes and weights as in `original`.

    Inputs and outputs (names, types, dimensions), IR version, opsets, producer, domain, texts, metadata, and
    the types noted for tensors that still exist; for a node of the same name and operator its texts and
    metadata.
    """
    result = copied(candidate)
    graph = result.graph
    stored = {tensor.name for tensor in graph.initializer}
    was_stored = {tensor.name for tensor in original.graph.initializer}
    made = {name for node in graph.node for name in node.output}
    del graph.input[:], graph.output[:], graph.value_info[:]
    # An initializer that a pass removed leaves the inputs too; an input it made constant stays an input.
    graph.input.extend(value for value in original.graph.input if value.name in stored or value.name not in was_stored)
    graph.output.extend(original.graph.output)
    graph.value_info.extend(value for value in original.graph.value_info if value.name in made)
    _copy_texts(original.graph, graph)
    graph.name = original.graph.name
    before = {node.name: node for node in original.graph.node}
    for node in graph.node:
        if node.name in before and before[node.name].op_type == node.op_type:
            _copy_texts(before[node.name], node)
            node.domain = before[node.name].domain
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        if original.HasField(field):
            setattr(result, field, getattr(original, field))
        else:
            result.ClearField(field)
    _copy_texts(original, result)
    del result.opset_import[:]
    result.opset_import.extend(original.opset_import)
    return complete_inputs(result)


def _copy_texts(source: Any, target: Any) -> None:
    if source.HasField("doc_string"):
        target.doc_string = source.doc_string
    else:
        target.ClearField("doc_string")
    del target.metadata_props[:]
    target.metadata_props.extend(source.metadata_props)


def summarized(notes: Sequence[str]) -> list[str]:
    """One line for each kind of note: more than three that differ in node names only are counted.

    `Add a folded into Conv b`, ... becomes `19 Add folded into Conv`.
    """
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(_kind(note), []).append(note)
    return [
        line
        for kind, members in kinds.items()
        for line in ([f"{len(members)} {kind}"] if len(members) > LISTED else members)
    ]


def _kind(note: str) -> str:
    found = re.fullmatch(r"(\w+) \S+ (folded into \w+|dropped)(?: \S+)?", note)
    return f"{found[1]} {found[2]}" if found else note
