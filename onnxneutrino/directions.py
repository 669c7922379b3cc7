"""The strong directions of what layers read, from one pass over a few batches.

Inputs of a layer are far from alike in all directions: after a ReLU most of their second moment lies along their mean,
and most of the rest along a few principal directions. The covariance `C` of the rows `x` that a layer multiplies its
weight with is seen through a random matrix alone: `S = C Ω`, and `C ≈ S (Ωᵀ S)⁻¹ Sᵀ` (Nyström; Tropp, Yurtsever, Udell
and Cevher 2017, Fixed-rank approximation of a positive-semidefinite matrix from streaming data, algorithm 3).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxneutrino.conv_geometry import windows
from onnxneutrino.graph import arrays, attribute_values, element_dtype, real_inputs
from onnxneutrino.plan import Array, Geometry
from onnxneutrino.runtime import Runner

RANK, SPARE = 32, 8
SAMPLED = 256  # rows of a layer from one batch
LEAST = 0.01  # of the mean variance


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions in which the rows that a weight multiplies vary most.

    Attributes:
        mean: of the rows `(D,)`, D in the order of the weight; zeros where no bias can make up for it.
        vectors: orthonormal columns `(D, k)`.
        scales: `(k,)`, below 1: with these all directions vary alike, as much as `level`.
        level: standard deviation of the rows in the strongest direction that is not among `vectors`.
        bias: name of the bias that is the layer's own; empty for none.
    """

    mean: Array
    vectors: Array
    scales: Array
    level: float
    bias: str = ""


class CovarianceSketch:
    """The product of the covariance of rows `(n, D)`, which arrive in chunks, with a random matrix."""

    def __init__(self, dimension: int, centred: bool) -> None:
        """Take the dimension, and whether the covariance is taken around the mean or around zero."""
        generator = np.random.default_rng(dimension)
        self._probes = np.linalg.qr(generator.standard_normal((dimension, min(RANK + SPARE, dimension))))[0]
        self._product = np.zeros_like(self._probes)
        self._total = np.zeros(dimension)
        self._squares = 0.0
        self._count = 0
        self._centred = centred

    def add(self, rows: NDArray[np.floating]) -> None:
        """Add rows `(n, D)`."""
        own = np.asarray(rows, np.float64)
        self._product += own.T @ (own @ self._probes)
        self._total += own.sum(axis=0)
        self._squares += float(np.vdot(own, own))
        self._count += len(own)

    def directions(self) -> Directions | None:
        """At most 32 directions; None where none stands out, or rows are not finite."""
        mean = self._total / max(self._count, 1) * self._centred
        product = self._product / max(self._count, 1) - np.outer(mean, mean @ self._probes)
        variance = (self._squares / max(self._count, 1) - mean @ mean) / len(mean)
        size = float(np.linalg.norm(product))
        if not (np.isfinite(size) and size > 0 and variance > 0):
            return None
        shift = np.sqrt(len(mean)) * np.finfo(np.float64).eps * size
        shifted = product + shift * self._probes
        core = self._probes.T @ shifted
        values, axes = np.linalg.eigh((core + core.T) / 2)
        used = values > np.finfo(np.float64).eps * values[-1]  # a square root of the inverse, where there is one
        vectors, sizes, _ = np.linalg.svd(shifted @ (axes[:, used] / np.sqrt(values[used])), full_matrices=False)
        found = np.maximum(sizes**2 - shift, 0)
        level = float(max(found[RANK] if len(found) > RANK else 0.0, LEAST * variance))
        strong = found[:RANK] > level
        if not strong.any():
            return None
        scales = np.sqrt(level / found[:RANK][strong])
        vectors = vectors[:, :RANK][:, strong]
        own_mean, own_vectors, own_scales = (np.asarray(own, np.float32) for own in (mean, vectors, scales))
        return Directions(own_mean, own_vectors, own_scales, math.sqrt(level))


def input_directions(
    model: ModelProto, names: Collection[str], batches: Iterable[Mapping[str, NDArray[np.generic]]], threads: int
) -> dict[str, Directions]:
    """Directions by the name of the weight: of every dense Conv, Gemm and MatMul that has one of its own.

    Args:
        model: a training copy.
        names: trainable initializers.
        batches: its inputs.
        threads: for the runtime.
    """
    layers = _layers(model, set(names))
    if not layers:
        return {}
    shapes = {name: np.shape(own) for name, own in arrays(model).items()}
    tensors = list(dict.fromkeys(node.input[0] for node, _ in layers))
    run = Runner(model, tensors, threads=threads)
    # A copy takes float32 where the model takes float16.
    kinds = {value.name: element_dtype(value.type.tensor_type.elem_type) for value in real_inputs(model)}
    sketches: dict[str, CovarianceSketch] = {}
    generator = np.random.default_rng(0)
    for batch in batches:
        given = {name: np.asarray(batch[name], kind) for name, kind in kinds.items()}
        values = dict(zip(tensors, run(given), strict=True))
        for node, bias in layers:
            rows = _rows(node, shapes[node.input[1]], values[node.input[0]], generator)
            sketch = sketches.setdefault(node.input[1], CovarianceSketch(rows.shape[1], bool(bias)))
            sketch.add(rows)
    found = {node.input[1]: (sketches[node.input[1]].directions(), bias) for node, bias in layers}
    return {name: dataclasses.replace(own, bias=bias) for name, (own, bias) in found.items() if own is not None}


def _layers(model: ModelProto, names: Collection[str]) -> list[tuple[NodeProto, str]]:
    """The nodes whose weight no other reads, each with its bias where that is its own and as long as its outputs."""
    uses = Counter(name for node in model.graph.node for name in node.input)
    own = {name for name in names if uses[name] == 1}
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in own or node.input[1] not in sizes:
            continue
        known, size = attribute_values(node), sizes[node.input[1]]
        if node.op_type == "Conv":
            fits = known.get("group", 1) == 1 and known.get("auto_pad", b"NOTSET") == b"NOTSET"
        elif node.op_type == "Gemm":
            fits = not known.get("transA", 0)
        else:
            fits = node.op_type == "MatMul" and len(size) == 2
        if not fits:
            continue
        outputs = size[0 if node.op_type == "Conv" or known.get("transB", 0) else 1]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in own else ""
        same = known.get("alpha", 1.0) == known.get("beta", 1.0) and int(np.prod(sizes.get(bias, [0]))) == outputs
        found.append((node, bias if same else ""))
    return found


def _rows(
    node: NodeProto, weight: tuple[int, ...], tensor: NDArray[np.generic], generator: np.random.Generator
) -> NDArray[np.floating]:
    """Up to 256 of the rows `(n, D)` that a layer multiplies its weight with."""
    if node.op_type != "Conv":
        rows = tensor.reshape(-1, tensor.shape[-1])
        return np.asarray(rows[generator.permutation(len(rows))[:SAMPLED]], np.float64)
    known, kernel = attribute_values(node), weight[2:]
    one = (1,) * len(kernel)
    strides, dilations = (tuple(known.get(name, one)) for name in ("strides", "dilations"))
    geometry = Geometry(kernel, strides, tuple(known.get("pads", 2 * (0,) * len(kernel))), dilations)
    positions = int(np.prod(geometry.output_size(*tensor.shape[2:])))
    each = max(1, SAMPLED // len(tensor))
    drawn = generator.integers(0, positions, (len(tensor), each))
    return np.asarray(windows(geometry, tensor, drawn), np.float64)
