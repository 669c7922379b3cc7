"""Loaders of the corpus's odd data sets: JPEG bytes end to end in an `.npz`, and images that a model wants turned.

The folder of the data is the environment variable CORPUS_DATA. Used as `--data benchmarks/corpus_loaders.py:NAME`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BATCH = 32
IMAGENET_TRAIN = 600
CAFFE_MEANS = (104.0, 117.0, 123.0)  # of blue, green, red
GREY = 114

Prepare = Callable[[NDArray[np.uint8]], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Images:
    """Batches of decoded images; can be iterated again."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    chosen: range
    name: str
    prepare: Prepare
    targets: NDArray[Any] | None

    def __iter__(self) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[Any] | None]]:
        """Give `({input: images}, targets)`."""
        for start in range(self.chosen.start, self.chosen.stop, BATCH):
            numbers = range(start, min(start + BATCH, self.chosen.stop))
            images = [self.prepare(self._decoded(number)) for number in numbers]
            targets = None if self.targets is None else self.targets[numbers.start : numbers.stop]
            yield {self.name: np.stack(images)}, targets

    def _decoded(self, number: int) -> NDArray[np.uint8]:
        content = self.data[self.offsets[number] : self.offsets[number + 1]].tobytes()
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _stored(name: str) -> dict[str, NDArray[Any]]:
    with np.load(Path(os.environ["CORPUS_DATA"]) / name) as stored:
        return {key: stored[key] for key in stored.files}


def _imagenet(name: str, prepare: Prepare) -> dict[str, Images]:
    own = _stored("imagenet_sample1000_224_jpeg.npz")
    parts = {"train": range(IMAGENET_TRAIN), "test": range(IMAGENET_TRAIN, len(own["y"]))}
    return {part: Images(own["jpeg"], own["offsets"], rows, name, prepare, own["y"]) for part, rows in parts.items()}


def squeezenet() -> dict[str, Images]:
    """ImageNet images, blue first, less Caffe's means, float16, NCHW."""

    def prepare(image: NDArray[np.uint8]) -> NDArray[Any]:
        turned = image[:, :, ::-1].astype(np.float32) - np.array(CAFFE_MEANS, np.float32)
        return np.ascontiguousarray(turned.transpose(2, 0, 1)).astype(np.float16)

    return _imagenet("data_0", prepare)


def mobilenet() -> dict[str, Images]:
    """ImageNet images from -1 to 1, NHWC."""
    return _imagenet("input_2", lambda image: image.astype(np.float32) / 127.5 - 1)


def _coco(name: str, prepare: Prepare, targets: str | None) -> dict[str, Images]:
    own = _stored("coco256_416.npz")
    found = {}
    for part, prefix in (("train", "train"), ("test", "val")):
        labels = None if targets is None else own[f"{prefix}_{targets}"].astype(np.int64)
        count = len(own[f"{prefix}_sizes"])
        images = own[f"{prefix}_jpeg"], own[f"{prefix}_offsets"]
        found[part] = Images(*images, range(count), name, prepare, labels)
    return found


def visual_wake_words() -> dict[str, Images]:
    """COCO images at 96×96 from 0 to 1, NHWC; 1 where there is a person."""

    def prepare(image: NDArray[np.uint8]) -> NDArray[Any]:
        small = Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32) / 255

    return _coco("input_1", prepare, "person")


def yolox() -> dict[str, Images]:
    """COCO images in a grey square of 416, blue first, 0 to 255, NCHW; no targets."""

    def prepare(image: NDArray[np.uint8]) -> NDArray[Any]:
        square = np.full((416, 416, 3), GREY, np.uint8)
        square[: image.shape[0], : image.shape[1]] = image
        return np.ascontiguousarray(square[:, :, ::-1].transpose(2, 0, 1)).astype(np.float32)

    return _coco("images", prepare, None)


def mnist_turned() -> dict[str, list[tuple[NDArray[Any], NDArray[Any]]]]:
    """MNIST images transposed and flattened, 0 to 1."""
    own = _stored("mnist.npz")
    found = {}
    for part in ("train", "test"):
        images = own[f"x_{part}"].reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784).astype(np.float32) / 255
        labels = own[f"y_{part}"].astype(np.int64)
        found[part] = [(images[i : i + 512], labels[i : i + 512]) for i in range(0, len(images), 512)]
    return found
