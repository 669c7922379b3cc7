"""Training copy: the branches of Where are expanded to its output's shape, whose gradient is right.

The training runtime's gradient of Where does not sum over the axes along which a branch was broadcast.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Where with a branch, not a stored number, of another shape than its output's."""
    return rewritten(model, {"Where": _rewrite})


def _rewrite(writer: Writer) -> None:
    condition, *branches = writer.node.input
    shapes = [writer.shape(name) for name in (condition, *branches)]
    shape = np.broadcast_shapes(*shapes)
    # A number of the graph's, as activations have, is asked for no gradient.
    kept = [own == shape or (not own and writer.is_constant(index)) for index, own in enumerate(shapes) if index]
    if all(kept):
        raise Kept("its branches have its output's shape")
    target = writer.store(shape, np.int64)
    whole = [
        name if stays else writer.add("Expand", [name, target]) for name, stays in zip(branches, kept, strict=True)
    ]
    writer.add("Where", [condition, *whole], writer.node.output[0])
