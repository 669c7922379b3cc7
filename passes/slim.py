"""Fold constants and drop redundant Reshape, Transpose, Slice, Concat ... with onnxslim.

Its own Conv, Gemm and BatchNormalization fusions are off: they rename nodes and weights, and the folds here
say what they did. Tying equal weights is off too: a shared weight cannot be factorized.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter

import onnxslim
from onnx import ModelProto

from onnxneutrino.graph import copied, data_bytes, name_nodes

FUSIONS_OFF = [
    "FusionConvAdd",
    "FusionConvBN",
    "FusionConvMul",
    "FusionConvTransposeAdd",
    "FusionConvTransposeBN",
    "FusionConvTransposeMul",
    "FusionGelu",
    "FusionGemm",
    "FusionGemmAdd",
    "FusionGemmMul",
    "FusionReduce",
]

WORTH_A_LINE = 1024


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Run onnxslim on a copy; whatever it raises is the caller's to undo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slimmed = onnxslim.slim(copied(model), skip_fusion_patterns=FUSIONS_OFF, skip_optimizations=["weight_tying"])
    logging.getLogger("onnxslim").handlers.clear()
    # Node order and names are those of the library where it made a node; all must be unique again.
    name_nodes(slimmed.graph)
    before = Counter(node.op_type for node in model.graph.node)
    after = Counter(node.op_type for node in slimmed.graph.node)
    gone = before - after
    if not gone:
        saved = data_bytes(model) - data_bytes(slimmed)
        return slimmed, [f"onnxslim dropped {saved} bytes of constants"] if saved >= WORTH_A_LINE else []
    listed = ", ".join(f"{count} {op}" for op, count in sorted(gone.items(), key=lambda item: (-item[1], item[0])))
    return slimmed, [f"onnxslim removed {listed}"]
