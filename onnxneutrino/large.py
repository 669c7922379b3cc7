"""What a model of gigabytes may keep: shares of the bytes of its layers' weights, and no more of anything.

Beside the weights themselves (mapped, so that all sessions share them) a run holds moments, the probe's targets,
fits and candidates; each of them is as large as the weights or larger where a model is small.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxneutrino import weights
from onnxneutrino.calibrate import ROWS_PER_DIMENSION
from onnxneutrino.plan import Layer
from onnxneutrino.probe import PROBE_IMAGES, REFIT_ROWS

MOMENTS_SHARE = 0.25
TARGETS_SHARE = 0.25
GROUP_BYTES = 2**26  # of weights that are trained at once: the training runtime makes about eight copies of them


def weight_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the layers' weights, single precision."""
    return sum(layer.weight.nbytes for layer in layers)


def is_large(layers: Sequence[Layer]) -> bool:
    """Whether what a run keeps about these layers has to be bounded."""
    return weight_bytes(layers) >= weights.LARGE_MODEL_BYTES


def calibration_rows(layers: Sequence[Layer]) -> float:
    """Rows per dimension of the moments: below one they are kept as rows, `4 · rows · D²` bytes of a layer."""
    squares = sum(4 * layer.patch**2 for layer in layers)
    share = MOMENTS_SHARE * weight_bytes(layers) / max(squares, 1)
    return share if is_large(layers) and share < 1 else ROWS_PER_DIMENSION


def probe_rows(layers: Sequence[Layer]) -> int:
    """Rows of the probe's targets, `4 · O` bytes each in every layer."""
    if not is_large(layers):
        return REFIT_ROWS
    each = sum(4 * len(layer.bias) for layer in layers)
    return int(min(max(TARGETS_SHARE * weight_bytes(layers) / each, PROBE_IMAGES[0]), REFIT_ROWS))


def notes(layers: Sequence[Layer], trained: bool) -> list[str]:
    """What is done otherwise for the sake of memory, for the report; nothing where the model is not large."""
    if not is_large(layers):
        return []
    rows = calibration_rows(layers)
    how = "; it is trained by reconstruction, a few blocks at a time" if trained else ""
    return [
        f"the layers hold {weight_bytes(layers) / 1e9:.1f} GB: calibrated on {rows:.2g} rows per dimension, "
        f"all layers and outputs count alike in the plans{how}"
    ]
