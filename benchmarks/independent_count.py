"""Count the params and MACs of an ONNX file from what a run of it shows, without the package's own code.

The model runs once in ONNX Runtime on zeros with every intermediate tensor as an output; MACs come from the
shapes of the arrays that were really there, params from a walk over the graph. Nodes inside the bodies of If,
Loop and Scan give params but no MACs, since their tensors cannot be made outputs.

    python benchmarks/independent_count.py MODEL [--input-shape NAME=1x3x64x64 ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")


def count(path: Path, input_shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Count (params, MACs) of the model in `path` at batch 1.

    Args:
        path: the ONNX file.
        input_shapes: shape by input name, where a dimension other than the first is free.

    Raises:
        SystemExit: a free dimension without a shape.
    """
    model = onnx.load(path)
    seen = _walk(model.graph)
    return sum(seen.values()), sum(observed_macs(model, input_shapes).values())


def _walk(graph: onnx.GraphProto, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Elements of every float constant that is read on the way back from the outputs, by place and name."""
    makers = {name: node for node in graph.node for name in node.output if name}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    waiting = [value.name for value in graph.output]
    done: set[str] = set()
    counted: dict[tuple[str, ...], int] = {}
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        key = (*place, name)
        if name in stored:
            array = numpy_helper.to_array(stored[name])
            counted[key] = array.size if array.dtype.name in FLOAT_NAMES else 0
        elif name in makers:
            node = makers[name]
            waiting.extend(node.input)
            for attribute in node.attribute:
                if node.op_type == "Constant":
                    counted[key] = _constant_size(attribute)
                bodies = [attribute.g] if attribute.HasField("g") else attribute.graphs
                for index, body in enumerate(bodies):
                    counted.update(_walk(body, (*place, node.output[0], f"{attribute.name} {index}")))
                    # Whatever a body mentions may come from out here; names of its own lead nowhere.
                    waiting.extend(_mentioned(body))
    return counted


def _constant_size(attribute: onnx.AttributeProto) -> int:
    if attribute.name == "value":
        array = numpy_helper.to_array(attribute.t)
        return array.size if array.dtype.name in FLOAT_NAMES else 0
    return {"value_float": 1, "value_floats": len(attribute.floats)}.get(attribute.name, 0)


def _mentioned(graph: onnx.GraphProto) -> list[str]:
    names = [value.name for value in graph.output]
    for node in graph.node:
        names.extend(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names.extend(_mentioned(attribute.g))
    return names


def observed_macs(model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """MACs by the name of each node's first output; the model is changed."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    feeds = {value.name: _zeros(value, input_shapes) for value in graph.input if value.name not in constants}
    outputs = {value.name for value in graph.output}
    made = [name for node in graph.node for name in node.output if name]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in outputs)
    model.ir_version = min(model.ir_version, 10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    arrays: dict[str, Any] = {
        **constants,
        **feeds,
        **dict(zip(names, session.run(names, feeds), strict=True)),
    }
    return {node.output[0]: _node_macs(node, arrays) for node in graph.node}


def _zeros(value: onnx.ValueInfoProto, input_shapes: Mapping[str, Sequence[int]]) -> Any:
    kind = value.type.tensor_type
    shape = list(input_shapes.get(value.name, [d.dim_value for d in kind.shape.dim]))
    if shape and value.name not in input_shapes:
        shape[0] = 1
    if any(size < 1 for size in shape):
        sys.exit(f"input {value.name} has free dimensions; give --input-shape {value.name}=1x3x64x64")
    return np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _node_macs(node: onnx.NodeProto, arrays: Mapping[str, Any]) -> int:
    """Use a weight once at every output position of a Conv, at every input position of a ConvTranspose."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    left, right, out = arrays[node.input[0]], arrays[node.input[1]], arrays[node.output[0]]
    if node.op_type in ("Conv", "ConvTranspose"):
        positions = out if node.op_type == "Conv" else left
        return int(right.size * positions.shape[0] * np.prod(positions.shape[2:], dtype=np.int64))
    # A product of matrices: every element of the result sums over the inner dimension.
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return int(out.size * (left.shape[0] if transposed else left.shape[-1]))


def main() -> None:
    """Print one line: the model, its params and its MACs."""
    parser = argparse.ArgumentParser(description="Count params and MACs of an ONNX file by running it.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--input-shape", action="append", default=[], metavar="NAME=1x3x64x64")
    arguments = parser.parse_args()
    pairs = (text.rsplit("=", 1) for text in arguments.input_shape)
    shapes = {name: [int(size) for size in dims.split("x")] for name, dims in pairs}
    params, macs = count(arguments.model, shapes)
    print(f"{arguments.model.name}: params {params} macs {macs}")


if __name__ == "__main__":
    main()
