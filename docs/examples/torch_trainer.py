"""A training loop in PyTorch for `onnxneutrino compress in.onnx out.onnx --trainer torch_trainer.py:train`.

It runs the nodes of a candidate in PyTorch, trains what may change against the original and the labels, and gives the
candidate back with the new arrays. Adapt the constants, and `OPERATORS` where your network has others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

DATA, BATCH, RATE = "cifar10.npz", 64, 1e-3  # x_train: bytes, N x H x W x C
MEAN, STD = (0.4984, 0.5074, 0.5181), (0.2607, 0.2591, 0.2796)
HEAT, LABELS, WARMUP = 3.0, 0.3, 0.1  # softens both outputs; weight of the labels; share of the time


def _padded(own: dict[str, Any], x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    top, left, bottom, right = own.get("pads", [0] * 4)
    return functional.pad(x, (left, right, top, bottom), value=value)


def _conv(own: dict[str, Any], x: torch.Tensor, *arrays: torch.Tensor) -> torch.Tensor:
    bias = arrays[1] if len(arrays) > 1 else None
    strides, dilations = own.get("strides", 1), own.get("dilations", 1)
    return functional.conv2d(_padded(own, x), arrays[0], bias, strides, 0, dilations, own.get("group", 1))


OPERATORS: dict[str, Any] = {
    "Conv": _conv,
    "Gemm": lambda own, a, b, c: a @ (b.T if own.get("transB") else b) + c,
    "MatMul": lambda own, a, b: a @ b,
    "Add": lambda own, a, b: a + b,
    "Relu": lambda own, x: torch.relu(x),
    "Concat": lambda own, *parts: torch.cat(parts, own["axis"]),
    "Gather": lambda own, x, places: x.index_select(own.get("axis", 0), places),
    "Flatten": lambda own, x: x.flatten(own.get("axis", 1)),
    "Reshape": lambda own, x, shape: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]),
    "Transpose": lambda own, x: x.permute(own["perm"]),
    "MaxPool": lambda own, x: functional.max_pool2d(
        _padded(own, x, -math.inf), own["kernel_shape"], own.get("strides", 1)
    ),
}


def _output(model: onnx.ModelProto, arrays: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    values = {**arrays, next(own.name for own in model.graph.input if own.name not in arrays): x}
    for node in model.graph.node:
        own = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        values[node.output[0]] = OPERATORS[node.op_type](own, *(values[name] for name in node.input))
    return values[model.graph.output[0].name]


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    data, random = np.load(DATA), np.random.default_rng()
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    images, labels = data["x_train"], torch.from_numpy(data["y_train"]).long()
    while True:
        for chosen in random.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            x = np.pad((images[chosen] / np.float32(255) - mean) / std, ((0, 0), (4, 4), (4, 4), (0, 0)))
            top, left, step = random.integers(9), random.integers(9), random.choice([-1, 1])
            x = x[:, top : top + images.shape[1], left : left + images.shape[2]][:, :, ::step]
            yield torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), labels[chosen]


def train(candidate: str, original: str, seconds: float) -> onnx.ModelProto:
    """Train for so many seconds: AdamW, the learning rate a warm-up and a cosine over the time."""
    model, teacher = onnx.load(candidate), onnx.load(original)
    own, fixed = (
        {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.graph.initializer}
        for graph in (model, teacher)
    )
    names = next(entry.value for entry in model.metadata_props if entry.key == "onnxneutrino.trainable").split("\n")
    trained = {name: own[name].requires_grad_() for name in names}
    optimizer, start = torch.optim.AdamW(trained.values(), RATE, weight_decay=0.0), time.monotonic()
    for x, labels in _batches():
        share = (time.monotonic() - start) / seconds
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = RATE * min(share / WARMUP, 0.5 * (1 + math.cos(math.pi * share)))
        with torch.no_grad():
            wanted = functional.softmax(_output(teacher, fixed, x) / HEAT, dim=1)
        given = _output(model, own, x)
        soft, hard = functional.cross_entropy(given / HEAT, wanted), functional.cross_entropy(given, labels)
        optimizer.zero_grad()
        (HEAT**2 * soft + LABELS * hard).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    for entry in model.graph.initializer:
        if entry.name in trained:
            entry.CopyFrom(numpy_helper.from_array(trained[entry.name].detach().numpy(), entry.name))
    return model
