"""Measure the top-1 accuracy of ONNX files with nothing but numpy and onnxruntime.

For a virtual environment that holds the newest plain onnxruntime and no part of this project: what a compressed
model needs to run. Give the original and the outputs in one call to compare them on the same images.

    python benchmarks/plain_runtime.py MODEL.onnx [MORE.onnx ...] --data DATA.npz --layout NCHW \
        --scale 0.00392156862745098 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225

The preprocessing is `(x · scale - mean) / std`, as in the `[data]` table of the model's TOML file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


def top1(
    path: Path, images: NDArray[Any], labels: NDArray[Any], layout: str, preprocess: Sequence[Any], batch: int
) -> float:
    """Top-1 accuracy in percent of the model's first output; see `predicted` for the arguments."""
    return 100.0 * float((predicted(path, images, layout, preprocess, batch) == labels).sum()) / len(images)


def predicted(path: Path, images: NDArray[Any], layout: str, preprocess: Sequence[Any], batch: int) -> NDArray[Any]:
    """Class numbers `(N,)`, the largest of the model's first output.

    Args:
        path: an ONNX file with one input.
        images: `(N, H, W)` or `(N, H, W, C)`, raw values.
        layout: `NCHW` or `NHWC`, of the model's input.
        preprocess: scale, and mean and std as arrays that broadcast to `(N, H, W, C)`.
        batch: images a run; 1 where the model's batch is fixed.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}[entry.type]
    shape = [size if isinstance(size, int) and size > 0 else None for size in entry.shape]
    batch = shape[0] or batch
    scale, mean, std = preprocess
    found = []
    for start in range(0, len(images), batch):
        chosen = images[start : start + batch]
        count = len(chosen)
        if count < batch and shape[0]:
            # A fixed batch wants whole batches; the repeats are not counted.
            chosen = np.concatenate([chosen, np.repeat(chosen[-1:], batch - count, axis=0)])
        values = chosen[..., None] if chosen.ndim == 3 else chosen
        values = (values.astype(np.float32) * scale - mean) / std
        if layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        if None not in shape[1:]:
            values = values.reshape(len(values), *shape[1:])
        (scores, *_) = session.run(None, {entry.name: np.ascontiguousarray(values, dtype)})
        found.append(scores.reshape(len(values), -1).argmax(axis=1)[:count])
    return np.concatenate(found)


def main() -> None:
    """Print the runtime's version and one line for each model."""
    parser = argparse.ArgumentParser(description="Top-1 of ONNX files in a plain ONNX Runtime.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--data", type=Path, required=True, metavar="DATA.npz", help="holds x_test and y_test")
    parser.add_argument("--layout", choices=("NCHW", "NHWC"), default="NCHW")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--mean", type=float, nargs="+", default=[0.0])
    parser.add_argument("--std", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch", type=int, default=100)
    arguments = parser.parse_args()
    foreign = sorted({"onnx", "torch", "tensorflow", "onnxneutrino"} & sys.modules.keys())
    if foreign:
        sys.exit(f"this measurement is about plain onnxruntime, but {', '.join(foreign)} was imported")
    with np.load(arguments.data) as archive:
        images, labels = archive["x_test"], archive["y_test"]
    preprocess = (
        np.float32(arguments.scale),
        np.asarray(arguments.mean, np.float32),
        np.asarray(arguments.std, np.float32),
    )
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, {len(images)} test images")
    for path in arguments.models:
        start = time.perf_counter()
        value = top1(path, images, labels, arguments.layout, preprocess, arguments.batch)
        print(f"{path.name}: top-1 {value:.2f} %, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
