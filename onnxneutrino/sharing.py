"""Layers that apply one weight in several places (twin branches, detection heads, unrolled loops) as one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from onnxneutrino.plan import Frozen, Layer


def joined(found: Sequence[Layer | Frozen], readers: Callable[[str], int]) -> list[Layer | Frozen]:
    """Make of layers that share a weight one layer, where the first of them stands.

    All that reads the weight has to be among them, or it would have to be stored beside its factors, and they have
    to be of one kind with one bias, for a chain holds one. Strides, pads and dilations may differ.

    Args:
        found: layers in the order of the graph, each for itself.
        readers: counts the nodes that read an initializer.
    """
    groups: dict[str, list[Layer]] = {}
    for entry in found:
        if isinstance(entry, Layer):
            groups.setdefault(entry.initializers[0], []).append(entry)
    obstacles = {name: _obstacle(group, readers(name)) for name, group in groups.items()}
    result: list[Layer | Frozen] = []
    for entry in found:
        if isinstance(entry, Frozen):
            result.append(entry)
            continue
        first, *others = groups[entry.initializers[0]]
        reason = obstacles[entry.initializers[0]]
        if reason is not None:
            result.append(Frozen(entry.name, entry.op, entry.weight_shape, entry.params, reason))
        elif entry is first:
            same = tuple(replace(other, weight=first.weight, bias=first.bias) for other in others)
            result.append(replace(first, others=same) if same else first)
    return result


def _obstacle(group: Sequence[Layer], readers: int) -> str | None:
    """Why the layers of one weight cannot be rewritten together."""
    first, *others = group
    if len(group) < readers:
        return f"weight shared by {readers} nodes, not all of which can be factorized"
    if any(other.kind != first.kind or not np.array_equal(other.weight, first.weight) for other in others):
        return f"weight shared by {readers} nodes that apply it in different ways"
    if any(other.initializers != first.initializers or not np.array_equal(other.bias, first.bias) for other in others):
        return f"weight shared by {readers} nodes with different biases"
    return None
