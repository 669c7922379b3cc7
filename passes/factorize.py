"""Factorize: replace layers by their chains of factors, and read trained factors back.

A Conv becomes Conv nodes; a Gemm or MatMul behind a map becomes Conv nodes and a Flatten. On matrices every
stage but the last is a MatMul, because a Gemm without C needs opset 11; the last is a Gemm, or a MatMul and
an Add. Plain protobuf edits: graphsurgeon drops metadata and takes initializers out of the graph's inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from onnxneutrino.errors import ModelError
from onnxneutrino.factors import Factors, Stage, stage_geometries
from onnxneutrino.graph import copied, reads, used_names
from onnxneutrino.plan import Geometry, Layer
from onnxneutrino.weights import initializer, is_mapped

# Below it every initializer must be listed as a graph input too.
FREE_INITIALIZERS_IR = 4


def factorize(model: ModelProto, layers: Sequence[Layer], factors: Mapping[str, Factors]) -> ModelProto:
    """Replace every layer named in `factors` by its chain, in a new model.

    The chain stands where the layer's node stood and writes the same tensor; where several places apply the
    layer's weight, a chain stands in each, and all read the same initializers. All other nodes, their order,
    names and metadata stay; initializers and nodes that only the replaced nodes needed are removed. Below
    IR 4 the new initializers are graph inputs too.

    Args:
        model: the model in which `layers` were found; it is not changed.
        layers: layers of the model, those named in `factors` among them.
        factors: factors by the name of the layer.

    Raises:
        ModelError: the node of a layer is not in the model, or the name of a new tensor or node is taken.
    """
    chosen = [layer for layer in layers if layer.name in factors]
    owners = {name: use for layer in chosen for use in layer.uses for name in use.nodes}
    chains = {
        use.nodes[0]: _chain(use, factors[layer.name], stage_names(layer, factors[layer.name]))
        for layer in chosen
        for use in layer.uses
    }
    weights = {name: value for layer in chosen for name, value in stage_arrays(layer, factors[layer.name]).items()}
    _check_names(model, owners, chains, weights)
    nodes: list[NodeProto] = []
    removed: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(chains.get(node.name, [] if node.name in owners else [node]))
        removed.extend([node] if node.name in owners else [])
    nodes, unused = _without_unused(nodes, removed, {value.name for value in model.graph.output})

    result = copied(model)
    graph, old = result.graph, model.graph
    _assign(graph.node, nodes)
    constants = {tensor.name for tensor in old.initializer}
    _assign(graph.initializer, [entry for entry in old.initializer if entry.name not in unused])
    _assign(graph.input, [entry for entry in old.input if entry.name not in unused & constants])
    _assign(graph.value_info, [entry for entry in old.value_info if entry.name not in unused])
    for name, value in weights.items():
        tensor = initializer(value, name)
        graph.initializer.append(tensor)
        if result.ir_version < FREE_INITIALIZERS_IR:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return result


def stage_names(layer: Layer, factors: Factors) -> tuple[str, ...]:
    """Names of the chain's initializers: the weight of each stage in their order, then the bias."""
    prefixes = [_stage(layer, factors, index) for index in range(len(factors.stages))]
    return (*(f"{prefix}/weight" for prefix in prefixes), f"{prefixes[-1]}/bias")


def stage_arrays(layer: Layer, factors: Factors) -> dict[str, NDArray[Any]]:
    """The chain's initializers by name, as the graph holds them.

    Returns:
        Weights `(O, I/groups, *kernel)` of Conv stages, `(O, I/groups, k)` of 1-D ones, `(I, O)` of MatMul and
        `(O, I)` of Gemm stages, and the bias `(O,)`; float16 where the layer's weight is, else float32.
    """
    dtype = np.float16 if layer.half else np.float32
    last = len(factors.stages) - 1
    values = [_as_stored(layer, stage, index == last) for index, stage in enumerate(factors.stages)]
    names = stage_names(layer, factors)
    return {
        name: np.ascontiguousarray(value, dtype) for name, value in zip(names, [*values, factors.bias], strict=True)
    }


def read_factors(layer: Layer, factors: Factors, arrays: Mapping[str, NDArray[Any]]) -> Factors:
    """Factors of the form and ranks of `factors` with the values in `arrays`: the inverse of `stage_arrays`.

    Args:
        layer: the layer.
        factors: factors as they were when the chain was written.
        arrays: values by the names of `stage_names`; others are ignored.

    Returns:
        Float32 factors whose error is not known (nan).
    """
    *names, bias = stage_names(layer, factors)
    stages = []
    for index, (name, stage) in enumerate(zip(names, factors.stages, strict=True)):
        value = arrays[name]
        if _is_matmul(layer, index == len(names) - 1):
            value = value.T
        # What lies in a file stays there, in the order of the graph.
        own = np.asarray(value, np.float32) if is_mapped(value) else np.array(value, np.float32, order="C")
        weight = own.reshape(stage.weight.shape)
        stages.append(replace(stage, weight=weight))
    return replace(factors, stages=tuple(stages), bias=np.array(arrays[bias], np.float32), error=float("nan"))


def last_stage(layer: Layer, factors: Factors) -> tuple[str, str]:
    """Names of the tensor that feeds the chain's last stage and of the layer's output, in one of its places."""
    last = len(factors.stages) - 1
    return (_output(layer, factors, last - 1) if last else layer.input), layer.output


def _stage(layer: Layer, factors: Factors, index: int) -> str:
    return f"{layer.name}/{factors.form}.{index}"


def _output(layer: Layer, factors: Factors, index: int) -> str:
    return f"{_stage(layer, factors, index)}/output"


def _is_matmul(layer: Layer, last: bool) -> bool:
    return layer.kind == "matmul" or (layer.kind == "gemm" and not last)


def _as_stored(layer: Layer, stage: Stage, last: bool) -> NDArray[Any]:
    if layer.kind in ("gemm", "matmul"):
        matrix = stage.weight.reshape(stage.weight.shape[:2])
        return matrix.T if _is_matmul(layer, last) else matrix
    return stage.weight.reshape(stage.weight.shape[:3]) if layer.kind == "conv1d" else stage.weight


def _chain(layer: Layer, factors: Factors, names: Sequence[str]) -> list[NodeProto]:
    """The nodes of the chain, in the order in which they run, on the initializers `names`."""
    *weights, bias = names
    geometries = stage_geometries(factors.stages, layer.geometry)
    last = len(weights) - 1
    nodes = []
    source = layer.input
    for index, (weight, stage, geometry) in enumerate(zip(weights, factors.stages, geometries, strict=True)):
        name = _stage(layer, factors, index)
        follows = layer.kind in ("map", "matmul") or index < last
        target = _output(layer, factors, index) if follows else layer.output
        added = [bias] if index == last else []
        if _is_matmul(layer, index == last):
            nodes.append(helper.make_node("MatMul", [source, weight], [target], name))
        elif layer.kind == "gemm":
            nodes.append(helper.make_node("Gemm", [source, weight, *added], [target], name, transB=1))
        else:
            attributes = _conv_attributes(geometry, stage.groups, layer.kind == "conv1d")
            nodes.append(helper.make_node("Conv", [source, weight, *added], [target], name, **attributes))
        source = target
    name = _stage(layer, factors, last)
    if layer.kind == "matmul":
        nodes.append(helper.make_node("Add", [source, bias], [layer.output], f"{name}/add"))
    if layer.kind == "map":
        nodes.append(helper.make_node("Flatten", [source], [layer.output], f"{name}/flatten", axis=1))
    return nodes


def _conv_attributes(geometry: Geometry, groups: int, one_axis: bool) -> dict[str, Any]:
    axes = slice(0, 1 if one_axis else None)
    margins = geometry.margins[axes]
    return {
        "kernel_shape": geometry.kernel[axes],
        "strides": geometry.strides[axes],
        "pads": [begin for begin, _ in margins] + [end for _, end in margins],
        "dilations": geometry.dilations[axes],
        "group": groups,
    }


def _check_names(
    model: ModelProto,
    owners: Mapping[str, Layer],
    chains: Mapping[str, Sequence[NodeProto]],
    weights: Iterable[str],
) -> None:
    missing = owners.keys() - {node.name for node in model.graph.node}
    if missing:
        raise ModelError(f"node '{min(missing)}' is not in the model: find the layers of this model")
    kept = {layer.output for layer in owners.values()}
    made = [name for chain in chains.values() for node in chain for name in (node.name, *node.output)]
    clash = ({*made, *weights} - kept) & used_names(model)
    if clash:
        raise ModelError(f"the name '{min(clash)}' is taken in the model: rename that node or tensor")


def _without_unused(
    nodes: Sequence[NodeProto], removed: Sequence[NodeProto], outputs: Iterable[str]
) -> tuple[list[NodeProto], set[str]]:
    """Remove from `nodes` what only the `removed` nodes needed.

    Returns:
        The nodes that stay, and the names of tensors that are gone or that nothing needs any more.
    """
    uses = Counter(name for node in nodes for name in reads(node))
    uses.update(outputs)
    makers = {name: node for node in nodes for name in node.output}
    unused = {name for node in removed for name in node.output} - makers.keys()
    pending = [name for node in removed for name in reads(node)]
    while pending:
        name = pending.pop()
        maker = makers.get(name)
        made = [name] if maker is None else list(maker.output)
        if name in unused or any(uses[output] for output in made):
            continue
        unused.update(made)
        if maker is not None:
            uses.subtract(reads(maker))
            pending.extend(reads(maker))
    return [node for node in nodes if not node.output or not unused.issuperset(node.output)], unused


def _assign(field: Any, entries: Sequence[Any]) -> None:
    del field[:]
    field.extend(entries)
