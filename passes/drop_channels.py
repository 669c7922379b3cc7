"""Take groups of channels out of a graph: rows and columns of its constants, and what counts them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.channels import Channels
from onnxneutrino.graph import arrays, complete_inputs, copied, fresh_name, set_shape, used_names, with_arrays
from onnxneutrino.weights import initializer


def drop_channels(
    model: ModelProto,
    channels: Channels,
    removed: Collection[int],
    changed: Mapping[str, NDArray[Any]],
    biases: Mapping[str, NDArray[Any]],
) -> ModelProto:
    """A copy without the channels of some groups.

    Args:
        model: the graph in which the channels were found.
        channels: of it.
        removed: the groups that go.
        changed: constants with new values, still of their old shapes.
        biases: by the name of a Conv or Gemm, the bias `(O,)` of one that has none yet, O still the old number.
    """
    gone = np.zeros(channels.count, bool)
    gone[list(removed)] = True
    copy = copied(model)
    held, names = arrays(copy), used_names(copy)
    for node in copy.graph.node:
        if node.name in biases:
            bias = biases[node.name][~gone[channels.outputs[node.name]]].astype(held[node.input[1]].dtype)
            node.input[2:] = [fresh_name(names, f"{node.name}/onnxneutrino/bias")]
            copy.graph.initializer.append(initializer(bias, node.input[2]))
        for attribute in node.attribute:
            if node.name in channels.depthwise and attribute.name == "group":
                attribute.i = int((~gone[channels.depthwise[node.name]]).sum())
    values: dict[str, NDArray[Any]] = {name: np.asarray(array) for name, array in changed.items()}
    for own in channels.slices:
        kept = ~gone[own.groups]
        if not kept.all():
            values[own.constant] = np.compress(kept, values.get(own.constant, held[own.constant]), own.axis)
    for name, index, groups in channels.sizes:
        sizes = np.array(values.get(name, held[name]))
        sizes[index] = int((~gone[groups]).sum())
        values[name] = sizes
    del copy.graph.value_info[:]
    for value in copy.graph.input:  # below IR 4 initializers are inputs too
        if value.name in values:
            set_shape(value, values[value.name].shape)
    return complete_inputs(with_arrays(copy, values))
