"""Every operator of fixtures/operators/: lowered without a change, with the right gradient, or refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxneutrino.differentiable import untrainable
from onnxneutrino.finetune import Example
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent.parent / "fixtures" / "operators"
CASES = [
    case for path in sorted(FOLDER.glob("*.toml")) for case in tomllib.loads(path.read_text(encoding="utf-8"))["case"]
]
DIRECTIONS = 3
TOLERANCE = 1e-2


def with_zero(case: dict[str, Any]) -> ModelProto:
    """The case's graph with a zero, which is trained, added to its input."""
    model = parse_model(f'<ir_version: 10, opset_import: ["" : {case["opset"]}]> {case["graph"]}')
    graph = model.graph
    shape = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    graph.input[0].name = "given"
    graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "zero"))
    nodes = [helper.make_node("Add", ["given", "zero"], ["x"], "add"), *graph.node]
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{index}"
    own = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(own)
    return model


def given(model: ModelProto, case: dict[str, Any]) -> dict[str, np.ndarray]:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if case.get("zeros"):
        x *= 0
    return {"given": np.abs(x) + np.float32(0.5) if case.get("positive") else x}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['operator']}-{case.get('name', '')}-{case['opset']}")
def test_operator(case: dict[str, Any]) -> None:
    model = with_zero(case)
    inputs = given(model, case)
    copy = training_copy(model, len(inputs["given"]))
    (wanted,) = Runner(model)(inputs)
    np.testing.assert_allclose(Runner(copy)(inputs)[0], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    faults = untrainable(copy, ["zero"], ["y"])
    if case["expected"] == "refused":
        assert [operator for _, operator in faults] == [case["operator"]]
        return
    assert not faults
    target = wanted + np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)
    example = Example(inputs, [target], None)
    groups = [["zero"]] * DIRECTIONS
    for found in derivatives(model, copy, groups, Loss("values", ("y",)), example):
        assert found.error < TOLERANCE, found
