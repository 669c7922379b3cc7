"""Training copy: Resize and Upsample become fixed products along each axis, which have gradients.

With `M` the matrix `[m, n]` of one axis (`onnxneutrino.resampling`), `y = M x` along that axis, axis after axis.
Nearest by a whole factor is Reshape, Concat, Reshape (692 224 columns twice took 0.7 ms, the gradient 1.0; an Expand
9.2 and 46); any other nearest is a Gather.

Upsample and Resize of opset 10 always mean `asymmetric` coordinates; ONNX's version converter makes them a Resize
with `half_pixel`, so this pass must see them first.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto

from onnxneutrino.resampling import Axis, Method, inside, matrix, nearest
from onnxneutrino.rewrite import Kept, Writer, rewritten

FIRST_WITH_COORDINATES = 11
MODES = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "cubic": "cubic"}


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Resize and Upsample whose input shape and sizes are fixed."""
    return rewritten(model, {"Resize": _resize, "Upsample": _resize})


def _resize(writer: Writer) -> None:
    method = _method(writer)
    axes = _axes(writer, writer.shape(writer.node.input[0]))
    tensor = writer.node.input[0]
    changed = [
        index
        for index, axis in enumerate(axes)
        if axis.length != axis.size or axis.scale != 1.0 or (axis.region != (0.0, 1.0))
    ]
    masks = {index: inside(axes[index], method) for index in changed}
    outside = any(not mask.all() for mask in masks.values())
    shape = [axis.size for axis in axes]
    for index in changed:
        tensor = _along(writer, tensor, shape, index, axes[index], method)
        shape[index] = axes[index].length
    if outside:
        tensor = _extrapolated(writer, tensor, shape, masks)
    writer.add("Identity", [tensor], writer.node.output[0])


def _method(writer: Writer) -> Method:
    mode = writer.attribute("mode", "nearest")
    if mode not in MODES:
        raise Kept(f"unknown mode {mode}")
    if writer.node.op_type == "Upsample" or writer.opset < FIRST_WITH_COORDINATES:
        return Method(MODES[mode], "asymmetric", "simple")
    return Method(
        MODES[mode],
        writer.attribute("coordinate_transformation_mode", "half_pixel"),
        writer.attribute("nearest_mode", "round_prefer_floor"),
        writer.attribute("cubic_coeff_a", -0.75),
        bool(writer.attribute("exclude_outside", 0)),
        bool(writer.attribute("antialias", 0)),
    )


def _axes(writer: Writer, shape: tuple[int, ...]) -> list[Axis]:
    rank = len(shape)
    chosen = [axis % rank for axis in writer.attribute("axes", range(rank))]
    region, scales, sizes = None, None, None
    if writer.node.op_type == "Upsample" or writer.opset < FIRST_WITH_COORDINATES:
        given = writer.attribute("scales", None)
        scales = writer.constant(1) if given is None else np.asarray(given, np.float32)
    else:
        region = writer.constant(1) if _crops(writer) else None
        scales = writer.constant(2)
        if scales is None or not scales.size:
            scales, sizes = None, _sizes(writer, chosen)
    if scales is not None:
        factors = [float(scale) for scale in scales.reshape(-1)]
        lengths = [math.floor(np.float32(factor) * shape[axis]) for factor, axis in zip(factors, chosen, strict=True)]
    elif sizes is not None:
        factors, lengths = _fitted(writer.attribute("keep_aspect_ratio_policy", "stretch"), sizes, shape, chosen)
    else:
        raise Kept("it has neither scales nor sizes")
    found = [Axis(size, size, 1.0) for size in shape]
    for place, axis in enumerate(chosen):
        if lengths[place] < 1 or shape[axis] < 1:
            raise Kept("an axis is empty")
        own = (0.0, 1.0)
        if region is not None and region.size:
            own = (float(region.reshape(-1)[place]), float(region.reshape(-1)[place + len(chosen)]))
        found[axis] = Axis(shape[axis], lengths[place], factors[place], own)
    return found


def _crops(writer: Writer) -> bool:
    return bool(writer.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize")


def _sizes(writer: Writer, chosen: list[int]) -> list[int]:
    try:
        sizes = writer.constant(3)
    except Kept:  # computed at run time: its result's shape may still be known
        if writer.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise
        shape = writer.shape(writer.node.output[0])
        return [shape[axis] for axis in chosen]
    if sizes is None:
        raise Kept("it has neither scales nor sizes")
    return [int(size) for size in sizes.reshape(-1)]


def _fitted(policy: str, sizes: list[int], shape: tuple[int, ...], chosen: list[int]) -> tuple[list[float], list[int]]:
    """Scales and output sizes of the chosen axes."""
    factors = [size / shape[axis] for size, axis in zip(sizes, chosen, strict=True)]
    if policy == "stretch":
        return factors, sizes
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [factor] * len(chosen), [math.floor(factor * shape[axis] + 0.5) for axis in chosen]


def _along(writer: Writer, tensor: str, shape: list[int], index: int, axis: Axis, method: Method) -> str:
    before, after = math.prod(shape[:index]), math.prod(shape[index + 1 :])
    result = [*shape[:index], axis.length, *shape[index + 1 :]]
    mask = inside(axis, method)
    if method.mode == "nearest" and mask.all():
        taken = nearest(axis, method)
        factor = axis.length // axis.size
        if np.array_equal(taken, np.arange(axis.size)):
            return tensor
        whole = axis.length == factor * axis.size and np.array_equal(taken, np.arange(axis.length) // factor)
        if not whole:
            return writer.add("Gather", [tensor, writer.store(taken, np.int64)], axis=index)
        flat = writer.reshape(tensor, [before * axis.size, after])
        return writer.reshape(writer.add("Concat", [flat] * factor, axis=1), result)
    own = matrix(axis, method) * mask[:, None]
    if after == 1:  # one large product instead of many small ones
        flat = writer.reshape(tensor, [before, axis.size])
        product = writer.add("MatMul", [flat, writer.store(own.T)])
    else:
        flat = writer.reshape(tensor, [before, axis.size, after])
        product = writer.add("MatMul", [writer.store(own), flat])
    return writer.reshape(product, result)


def _extrapolated(writer: Writer, tensor: str, shape: list[int], masks: dict[int, np.ndarray]) -> str:
    within = np.ones([1] * len(shape), np.bool_)
    for index, mask in masks.items():
        within = within & mask.reshape([-1 if axis == index else 1 for axis in range(len(shape))])
    value = writer.attribute("extrapolation_value", 0.0)
    return writer.add("Add", [tensor, writer.store(np.where(within, 0.0, value))])
