"""Factorize: replace layers by their chains of factors, and read trained factors back.

A Conv becomes Conv nodes; a Gemm or MatMul behind a map becomes Conv nodes and a Flatten. On matrices a stage
without bias is a MatMul, because a Gemm without C needs opset 11; one with bias is a Gemm, or a MatMul and an Add.
Behind a chain whose inner channels are outputs themselves, Concat and Gather put all outputs in their order.
Plain protobuf edits: graphsurgeon drops metadata and takes initializers out of the graph's inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from onnxneutrino.errors import ModelError
from onnxneutrino.factor_interpolative import parts_of, with_parts
from onnxneutrino.factors import Factors, Stage, stage_geometries
from onnxneutrino.graph import copied, reads, used_names
from onnxneutrino.plan import Array, Geometry, Layer
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
    chains = {use.nodes[0]: _chain(use, factors[layer.name], layer) for layer in chosen for use in layer.uses}
    weights = {name: value for layer in chosen for name, value in stage_arrays(layer, factors[layer.name]).items()}
    weights.update({_order(layer): _places(factors[layer.name]) for layer in chosen if factors[layer.name].direct})
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
    """Names of the chain's initializers: of each stage in their order the weight and, where it has one, the bias."""
    return tuple(name for stage in _written(layer, factors) for name in stage.names)


def stage_arrays(layer: Layer, factors: Factors) -> dict[str, NDArray[Any]]:
    """The chain's initializers by name, as the graph holds them.

    Returns:
        Weights `(O, I/groups, *kernel)` of Conv stages, `(O, I/groups, k)` of 1-D ones, `(I, O)` of MatMul and
        `(O, I)` of Gemm stages, and the bias `(O,)`; float16 where the layer's weight is, else float32.
    """
    dtype = np.float16 if layer.half else np.float32
    found: dict[str, NDArray[Any]] = {}
    for stage in _written(layer, factors):
        values = [_as_stored(layer, stage), *([] if stage.bias is None else [stage.bias])]
        found.update(zip(stage.names, (np.ascontiguousarray(value, dtype) for value in values), strict=True))
    return found


def read_factors(layer: Layer, factors: Factors, arrays: Mapping[str, NDArray[Any]]) -> Factors:
    """Factors of the form and ranks of `factors` with the values in `arrays`: the inverse of `stage_arrays`.

    Args:
        layer: the layer.
        factors: factors as they were when the chain was written.
        arrays: values by the names of `stage_names`; others are ignored.

    Returns:
        Float32 factors whose error is not known (nan).
    """
    stages: list[Stage] = []
    biases: list[Array] = []
    for stage in _written(layer, factors):
        value = arrays[stage.names[0]]
        if _is_matmul(layer, stage):
            value = value.T
        # What lies in a file stays there, in the order of the graph.
        own = np.asarray(value, np.float32) if is_mapped(value) else np.array(value, np.float32, order="C")
        stages.append(replace(stage.stage, weight=own.reshape(stage.stage.weight.shape)))
        biases.extend(np.array(arrays[name], np.float32) for name in stage.names[1:])
    if factors.direct:
        return with_parts(factors, stages, biases)
    return replace(factors, stages=tuple(stages), bias=biases[-1], error=float("nan"))


def last_stage(layer: Layer, factors: Factors) -> tuple[str, str]:
    """Names of the tensor that feeds the chain's last stage and of the layer's output, in one of its places."""
    before = len(factors.stages) - 2
    return (_output(_stage(layer, factors, before)) if before >= 0 else layer.input), layer.output


@dataclass(frozen=True)
class _Written:
    """A stage as the graph holds it, with the names of its node, its initializers and what it gives."""

    name: str
    stage: Stage
    bias: NDArray[Any] | None

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.name}/weight", *([] if self.bias is None else [f"{self.name}/bias"]))

    @property
    def output(self) -> str:
        return _output(self.name)


def _stage(layer: Layer, factors: Factors, index: int) -> str:
    return f"{layer.name}/{factors.form}.{index}"


def _output(stage: str) -> str:
    return f"{stage}/output"


def _written(layer: Layer, factors: Factors) -> list[_Written]:
    last = len(factors.stages) - 1
    parts = (
        parts_of(factors)
        if factors.direct
        else [(stage, factors.bias if index == last else None) for index, stage in enumerate(factors.stages)]
    )
    return [_Written(_stage(layer, factors, index), *part) for index, part in enumerate(parts)]


def _is_matmul(layer: Layer, stage: _Written) -> bool:
    return layer.kind == "matmul" or (layer.kind == "gemm" and stage.bias is None)


def _as_stored(layer: Layer, written: _Written) -> NDArray[Any]:
    weight = written.stage.weight
    if layer.kind in ("gemm", "matmul"):
        matrix = weight.reshape(weight.shape[:2])
        return matrix.T if _is_matmul(layer, written) else matrix
    return weight.reshape(weight.shape[:3]) if layer.kind == "conv1d" else weight


def _chain(layer: Layer, factors: Factors, owner: Layer) -> list[NodeProto]:
    """The nodes of the chain on the initializers of `owner`, in the order in which they run."""
    stages = _written(owner, factors)
    geometries = stage_geometries([written.stage for written in stages], layer.geometry)
    nodes: list[NodeProto] = []
    names = [replace(written, name=_stage(layer, factors, index)) for index, written in enumerate(stages)]
    given = layer.input
    for written, own, geometry in zip(stages, names, geometries, strict=True):
        nodes.extend(_stage_nodes(layer, written, own, given, geometry))
        given = own.output
    if factors.direct:
        nodes.extend(_ordered(layer, [own.output for own in names], _order(owner)))
        given = nodes[-1].output[0]
    if layer.kind == "map":
        nodes.append(helper.make_node("Flatten", [given], [layer.output], f"{names[-1].name}/flatten", axis=1))
    else:
        nodes[-1].output[0] = layer.output
    return nodes


def _stage_nodes(layer: Layer, written: _Written, own: _Written, given: str, geometry: Geometry) -> list[NodeProto]:
    """The node of one stage, or two, on the initializers of `written`, named as `own`."""
    if _is_matmul(layer, written):
        weight, *bias = written.names
        if not bias:
            return [helper.make_node("MatMul", [given, weight], [own.output], own.name)]
        product = f"{own.name}/product"
        return [
            helper.make_node("MatMul", [given, weight], [product], own.name),
            helper.make_node("Add", [product, *bias], [own.output], f"{own.name}/add"),
        ]
    inputs = [given, *written.names]
    if layer.kind == "gemm":
        return [helper.make_node("Gemm", inputs, [own.output], own.name, transB=1)]
    attributes = _conv_attributes(geometry, written.stage.groups, layer.kind == "conv1d")
    return [helper.make_node("Conv", inputs, [own.output], own.name, **attributes)]


def _ordered(layer: Layer, parts: Sequence[str], order: str) -> list[NodeProto]:
    """Nodes that put inner channels and the others in the order of the layer's outputs."""
    axis = -1 if layer.kind == "matmul" else 1
    joined, target = f"{layer.name}/interpolative.all", f"{layer.name}/interpolative.output"
    return [
        helper.make_node("Concat", parts, [joined], joined, axis=axis),
        helper.make_node("Gather", [joined, order], [target], target, axis=axis),
    ]


def _order(layer: Layer) -> str:
    return f"{layer.name}/interpolative.order"


def _places(factors: Factors) -> NDArray[np.int64]:
    """Where each output stands behind the inner channels and the others."""
    return np.argsort([*factors.direct, *factors.others]).astype(np.int64)


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
