"""Training copy: a Cast to the type that a tensor already has becomes Identity.

The runtime's graph transformers take such a Cast out and fail on what is left.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, helper

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every Cast that changes nothing."""
    return rewritten(model, {"Cast": _cast})


def _cast(writer: Writer) -> None:
    source, target = writer.node.input[0], writer.node.output[0]
    if writer.dtype(source) != np.dtype(helper.tensor_dtype_to_np_dtype(writer.attribute("to", 1))):
        raise Kept("it changes the type")
    writer.add("Identity", [source], target)
