"""The operators of drawn graphs: each step adds one with attributes of its own, or does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from graphs_drawn import Draft
from hypothesis import strategies as st

FLOAT = 1


def window(d: Draft, dilated: bool, padded: bool = True) -> dict[str, Any]:
    """Kernel, stride, pads and dilations of a convolution or a pool, no larger than the padded map."""
    space = d.space
    kernel = [d.size(1, min(3, size)) for size in space]
    dilations = [d.size(1, 2) if dilated and d.flag() else 1 for _ in space]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": d.each(1, 2, len(space))}
    mode = d.pick("pads", "none", "SAME_UPPER", "SAME_LOWER", "VALID") if padded else "none"
    if mode == "pads":
        most = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)] * 2
        found["pads"] = [d.size(0, min(2, size)) for size in most]
    elif mode != "none":
        found["auto_pad"] = mode
    if max(dilations) > 1:
        d.need(not mode.startswith("SAME"))  # the runtime has no dilated SAME
        found["dilations"] = dilations
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = found.get("pads", [0] * 2 * len(space))
    rooms = (size + pads[axis] + pads[axis + len(space)] for axis, size in enumerate(space))
    d.need(mode.startswith("SAME") or all(room >= size for room, size in zip(rooms, reach, strict=True)))
    return found


def conv(d: Draft) -> None:
    own = window(d, dilated=True)
    channels = d.shape[1]
    group = d.pick(*(g for g in (1, 2, 3, channels) if channels % g == 0))
    outputs = group * d.size(1, 4 if group == 1 else 2)
    fan = channels // group * int(np.prod(own["kernel_shape"]))
    inputs = [d.weight(outputs, channels // group, *own["kernel_shape"], scale=fan**-0.5)]
    if d.flag():
        inputs.append(d.weight(outputs, scale=0.3))
    d.add("Conv", *inputs, group=group, **own)


def conv_transpose(d: Draft) -> None:
    own = window(d, dilated=True, padded=False)
    channels, rank = d.shape[1], len(d.space)
    group = d.pick(*(g for g in (1, 2, channels) if channels % g == 0))
    per = d.size(1, 3)
    inputs = [d.weight(channels, per, *own["kernel_shape"], scale=0.5)]
    if d.flag():
        inputs.append(d.weight(group * per, scale=0.3))
    if d.flag():
        own["pads"] = [d.size(0, min(1, size - 1)) for size in own["kernel_shape"] * 2]
    elif d.flag():
        own["auto_pad"] = d.pick("SAME_UPPER", "SAME_LOWER", "VALID")
    if d.flag() and "auto_pad" not in own:
        own["output_padding"] = [d.size(0, stride - 1) for stride in own["strides"]]
    d.need(len(own["kernel_shape"]) == rank)
    d.add("ConvTranspose", *inputs, group=group, **own)


def dense(d: Draft) -> None:
    if len(d.shape) != 2:
        d.add("Flatten", axis=1)
    inputs, outputs = d.shape[1], d.size(1, 6)
    transposed = int(d.flag())
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    terms = [d.weight(*shape, scale=inputs**-0.5)]
    if d.flag():
        terms.append(d.weight(*d.pick((outputs,), (1, outputs), (1,)), scale=0.3))
    scales = {"alpha": d.pick(1.0, 0.5, -1.5), "beta": d.pick(1.0, 2.0)} if d.flag() else {}
    d.add("Gemm", *terms, transB=transposed, **scales)


def matmul(d: Draft) -> None:
    inputs, outputs = d.shape[-1], d.size(1, 6)
    d.add("MatMul", d.weight(inputs, outputs, scale=inputs**-0.5))
    if d.flag():
        d.add("Add", d.weight(outputs, scale=0.3))


def batch_normalization(d: Draft) -> None:
    count = d.shape[1]
    tensors = [d.weight(count, scale=0.3, shift=1), d.weight(count, scale=0.3), d.weight(count, scale=0.3)]
    variance = d.store(d.random.uniform(0.5, 1.5, count), np.float32)
    d.add("BatchNormalization", *tensors, variance, epsilon=d.pick(1e-5, 1e-2))


def instance_normalization(d: Draft) -> None:
    d.need(int(np.prod(d.space)) > 2)
    tensors = d.weight(d.shape[1], shift=1), d.weight(d.shape[1])
    d.add("InstanceNormalization", *tensors, epsilon=d.pick(1e-5, 1e-2))


def group_normalization(d: Draft) -> None:
    d.need(d.opset >= 18)
    channels = d.shape[1]
    groups = d.pick(*(g for g in (1, 2, 3) if channels % g == 0))
    d.need(channels // groups * int(np.prod(d.space)) > 2)
    count = channels if d.opset >= 21 else groups
    d.add("GroupNormalization", d.weight(count, shift=1), d.weight(count), num_groups=groups, epsilon=1e-3)


def layer_normalization(d: Draft) -> None:
    d.need(d.opset >= 17)
    axis = d.size(1, len(d.shape) - 1)
    shape = d.shape[axis:]
    d.need(int(np.prod(shape)) > 2)
    bias = (d.weight(*shape),) if d.flag() else ()
    own = axis - len(d.shape) if d.flag() else axis
    d.add("LayerNormalization", d.weight(*shape, shift=1), *bias, axis=own, epsilon=1e-3)


def other_normalization(d: Draft) -> None:
    kind = d.pick("LRN", "LpNormalization", "MeanVarianceNormalization")
    if kind == "LRN":
        d.need(len(d.space) == 2)
        d.add("LRN", size=d.pick(1, 2, 3, 5), alpha=d.pick(0.1, 1.0), beta=d.pick(0.75, 0.5), bias=d.pick(1.0, 2.0))
    elif kind == "LpNormalization":
        d.add("LpNormalization", axis=d.pick(1, -1), p=d.pick(1, 2))
    else:
        d.need(len(d.space) == 2 and int(np.prod(d.space)) > 2)
        d.add("MeanVarianceNormalization", axes=[2, 3])


# fmt: off
ACTIVATIONS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("Relu", 13, {}), ("Sigmoid", 13, {}), ("Tanh", 13, {}), ("LeakyRelu", 13, {}), ("LeakyRelu", 13, {"alpha": 0.3}),
    ("Elu", 13, {}), ("Elu", 13, {"alpha": 0.4}), ("Selu", 13, {}), ("Celu", 13, {"alpha": 0.5}), ("Softplus", 13, {}),
    ("Softsign", 13, {}), ("HardSigmoid", 13, {}), ("HardSigmoid", 13, {"alpha": 0.3, "beta": 0.4}),
    ("HardSwish", 14, {}), ("Mish", 18, {}), ("Gelu", 20, {}), ("Gelu", 20, {"approximate": "tanh"}),
    ("ThresholdedRelu", 13, {"alpha": 0.3}), ("Shrink", 13, {"lambd": 0.2}),
    ("Shrink", 13, {"lambd": 0.2, "bias": 0.2}), ("Abs", 13, {}), ("Neg", 13, {}), ("Erf", 13, {}), ("Sin", 13, {}),
    ("Cos", 13, {}), ("Exp", 13, {}), ("Sinh", 13, {}), ("Cosh", 13, {}), ("Identity", 13, {}), ("Dropout", 13, {}),
)
# fmt: on


def activation(d: Draft) -> None:
    operator, _, attributes = d.pick(*(entry for entry in ACTIVATIONS if entry[1] <= d.opset))
    d.add(operator, **attributes)


def bounded(d: Draft) -> None:
    """Clip with either bound, PRelu with a slope of each shape, Softmax along any axis."""
    kind = d.pick("Clip", "PRelu", "Softmax", "LogSoftmax")
    if kind == "Clip":
        low, high = d.pick((True, True), (True, False), (False, True))
        d.add("Clip", d.store(-0.4, np.float32) if low else "", *([d.store(0.6, np.float32)] if high else []))
    elif kind == "PRelu":
        rest = (1,) * (len(d.shape) - 2)
        d.add("PRelu", d.weight(*d.pick((1,), (d.shape[1], *rest), (1, *rest)), scale=0.3))
    else:
        d.add(kind, axis=d.pick(-1, 1))


def powers(d: Draft) -> None:
    """Functions of a positive number."""
    d.add("Softplus")
    d.add("Add", d.store(0.3, np.float32))
    operator = d.pick("Log", "Sqrt", "Reciprocal", "Pow")
    d.add(operator, *([d.store(d.pick(2.0, 0.5, 3.0, -1.0), np.float32)] if operator == "Pow" else []))


def ceil(d: Draft, own: dict[str, Any]) -> int:
    """`ceil_mode` where the last window cannot start behind the data: the runtime's output is not defined there."""
    reach = [(k - 1) * step + 1 for k, step in zip(own["kernel_shape"], own.get("dilations", [1] * 3), strict=False)]
    after = own.get("pads", [0] * 6)[-len(reach) :]
    safe = all(size >= stride + end for size, stride, end in zip(reach, own["strides"], after, strict=True))
    return int(safe and d.flag())


def behind_pad(d: Draft) -> bool:
    """The runtime joins a Pad to the pool behind it, and then refuses pads as large as the kernel."""
    return bool(d.nodes) and d.nodes[-1].op_type == "Pad"


def max_pool(d: Draft) -> None:
    d.need(not behind_pad(d))
    own = window(d, dilated=True)
    d.add("MaxPool", ceil_mode=ceil(d, own), **own)


def average_pool(d: Draft) -> None:
    d.need(not behind_pad(d))
    own = window(d, dilated=d.opset >= 19)
    d.add("AveragePool", ceil_mode=ceil(d, own), count_include_pad=int(d.flag()), **own)


def lp_pool(d: Draft) -> None:
    own = window(d, dilated=d.opset >= 18)
    d.add("LpPool", p=d.pick(1, 2, 3), **own, **({"ceil_mode": ceil(d, own)} if d.opset >= 18 else {}))


def global_pool(d: Draft) -> None:
    d.need(len(d.space) > 0)
    operator = d.pick("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    d.add(operator, **({"p": d.pick(1, 2)} if operator == "GlobalLpPool" else {}))


def concat(d: Draft) -> None:
    axis = d.size(1, len(d.shape) - 1)
    own = [size for index, size in enumerate(d.shape) if index != axis]
    fits = d.earlier(lambda s: len(s) == len(d.shape) and [n for i, n in enumerate(s) if i != axis] == own)
    others = [d.pick(*fits) for _ in range(d.size(1, 2))]
    d.add("Concat", *others, axis=axis - len(d.shape) if d.flag() else axis)


def residual(d: Draft) -> None:
    """Arithmetic with an earlier tensor of the same shape, or of one that broadcasts, on either side."""
    shape = d.shape
    fits = d.earlier(
        lambda s: len(s) <= len(shape) and all(a in (1, b) for a, b in zip(s[::-1], shape[::-1], strict=False))
    )
    other = d.pick(*fits)
    pair = (other, d.value) if d.flag() else (d.value, other)
    operator = d.pick("Add", "Add", "Mul", "Sub", "Max", "Min", "Sum", "Mean", "Where")
    if operator == "Where":
        d.need(d.shapes[other] == shape)
        mask = d.store(d.random.standard_normal(shape) > 0, np.bool_)
        d.join("Where", mask, *pair)
    else:
        d.join(operator, *pair)


def affine(d: Draft) -> None:
    """Arithmetic with a constant that broadcasts."""
    channels = (d.shape[1],) + (1,) * (len(d.shape) - 2)
    shape = d.pick((), (1,), channels, (1, *channels), d.shape[1:], d.shape[-1:])
    operator = d.pick("Add", "Mul", "Sub", "Div", "Max", "Min")
    constant = d.store(d.random.uniform(0.5, 1.5, shape) * d.pick(1, -1), np.float32)
    pair = (constant, d.value) if d.flag() and operator != "Div" else (d.value, constant)
    d.join(operator, *pair)


def resize(d: Draft) -> None:
    space = d.space
    mode = d.pick("nearest", "linear", "cubic")
    d.need(mode != "cubic" or len(space) == 2)
    shifts = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
    own: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": d.pick(*shifts)}
    if mode == "nearest":
        own["nearest_mode"] = d.pick("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    if mode == "cubic":
        own |= {"cubic_coeff_a": d.pick(-0.75, -0.5), "exclude_outside": int(d.flag())}
    if d.opset >= 18 and mode != "nearest" and d.flag():
        own["antialias"] = 1
    if d.flag():
        scales = [1.0, 1.0, *(d.pick(1.0, 2.0, 1.5, 3.0, 0.5) for _ in space)]
        d.add("Resize", "", d.store(scales, np.float32), **own)
    else:
        d.add("Resize", "", "", d.store([*d.shape[:2], *(d.size(1, 9) for _ in space)]), **own)


def pad(d: Draft) -> None:
    space = d.space
    mode = d.pick("constant", "reflect", "edge", *(["wrap"] if d.opset >= 19 else []))
    sides = [d.size(-1 if mode == "constant" else 0, min(2, size - 1)) for size in space * 2]
    pads = [0, 0, *sides[: len(space)], 0, 0, *sides[len(space) :]]
    value = [d.store(0.5, np.float32)] if mode == "constant" and d.flag() else []
    d.add("Pad", d.store(pads), *value, mode=mode)


def blocks(d: Draft) -> None:
    space = d.space
    d.need(len(space) == 2)
    if d.flag():
        d.need(d.shape[1] % 4 == 0)
        d.add("DepthToSpace", blocksize=2, mode=d.pick("DCR", "CRD"))
    else:
        d.need(space[0] % 2 == space[1] % 2 == 0)
        d.add("SpaceToDepth", blocksize=2)


def reduction(d: Draft) -> None:
    operator = d.pick(
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp"),
        *("ReduceSumSquare", "ReduceProd"),
    )
    axes = d.pick(*([axis] for axis in range(1, len(d.shape))), list(range(2, len(d.shape))) or [1])
    axes = [axis - len(d.shape) for axis in axes] if d.flag() else axes
    keepdims = int(d.flag() or len(d.shape) - len(axes) < 2)
    if d.opset >= 18 or operator == "ReduceSum":
        d.add(operator, d.store(axes), keepdims=keepdims)
    else:
        d.add(operator, axes=axes, keepdims=keepdims)


def layout(d: Draft) -> None:
    """What moves elements and computes nothing."""
    kind = d.pick("Slice", "Transpose", "Split", "Reshape", "Unsqueeze", "Squeeze", "Gather", "Expand", "Tile")
    axis = d.size(1, len(d.shape) - 1)
    size = d.shape[axis]
    if kind == "Slice":
        start, step = d.size(0, size - 1), d.pick(1, 2)
        d.add("Slice", d.store([start]), d.store([size]), d.store([axis]), d.store([step]))
    elif kind == "Transpose":
        d.need(len(d.shape) > 2)  # the runtime's Gemm swallows one that moves nothing, and transposes
        d.add("Transpose", perm=[0, *d.draw(st.permutations(range(1, len(d.shape))))])
    elif kind == "Split":
        d.need(size >= 2)
        first = d.size(1, size - 1)
        d.add("Split", d.store([first, size - first]), axis=axis, outputs=2)
    elif kind == "Reshape":
        d.need(len(d.shape) > 2)
        d.add("Reshape", d.store(d.pick([0, -1], [0, 0, -1], [d.shape[0], d.shape[1], -1])))
    elif kind == "Unsqueeze":
        d.need(len(d.shape) < 4)
        d.add("Unsqueeze", d.store([axis]))
    elif kind == "Squeeze":
        d.need(size == 1 and len(d.shape) > 2)
        d.add("Squeeze", d.store([axis]))
    elif kind == "Gather":
        d.add("Gather", d.store(d.random.integers(0, size, d.size(1, 4))), axis=axis)
    elif kind == "Expand":
        d.need(size == 1)
        d.add("Expand", d.store([3 if index == axis else 1 for index in range(len(d.shape))]))
    else:
        d.add("Tile", d.store([2 if index == axis else 1 for index in range(len(d.shape))]))


Step = Callable[[Draft], None]
LINEAR: tuple[Step, ...] = (conv, conv, dense, matmul)
OTHERS: tuple[Step, ...] = (
    conv_transpose,
    batch_normalization,
    instance_normalization,
    group_normalization,
    layer_normalization,
    other_normalization,
    activation,
    activation,
    bounded,
    powers,
    max_pool,
    average_pool,
    lp_pool,
    global_pool,
    concat,
    residual,
    affine,
    resize,
    pad,
    blocks,
    reduction,
    layout,
)
STEPS: tuple[Step, ...] = (*LINEAR, *LINEAR, *OTHERS)
