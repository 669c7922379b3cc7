"""Loaders of the corpus's odd data sets: JPEG bytes end to end in an `.npz`, and images that a model wants turned.

That of the detector also has the function that decodes its outputs, for `--metric map50` (see docs/howto-detectors.md).

The folder of the data is the environment variable CORPUS_DATA. Used as `--data benchmarks/corpus_loaders.py:NAME`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BATCH = 32
IMAGENET_TRAIN = 600
CAFFE_MEANS = (104.0, 117.0, 123.0)  # of blue, green, red
GREY = 114
YOLOX_SIZE, YOLOX_STRIDES = 416, (8, 16, 32)
VARIED = 7
SCALES, SHAPE = (0.6, 1.8), 0.4  # the second is the logarithm of the largest change of height by width
LIGHTS, TINTS, CONTRASTS, COLOURS = (0.75, 1.25), (0.85, 1.15), (0.7, 1.3), (0.3, 1.4)
LEAST_SCORE, MOST_OVERLAP, MOST_BOXES = 0.001, 0.65, 1000

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
            images = [self.prepare(self.decoded(number)) for number in numbers]
            targets = None if self.targets is None else self.targets[numbers.start : numbers.stop]
            yield {self.name: np.stack(images)}, targets

    def decoded(self, number: int) -> NDArray[np.uint8]:
        """One image, H×W×3, red first."""
        content = self.data[self.offsets[number] : self.offsets[number + 1]].tobytes()
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@dataclass(frozen=True, eq=False)
class Mosaics:
    """Batches of images N×C×H×W as they are, each followed by `VARIED` batches made of all images anew.

    Half of these are one image, the others four that meet at a random point (Bochkovskiy et al., YOLOv4, arXiv
    2004.10934), each of a random size, shape, light, contrast and colour, mirrored or not, and cut where it does not
    fit. No iteration is like another: of 1024 images that were always the same a network learned half by heart.
    """

    images: Images
    iterations: Iterator[int] = field(default_factory=itertools.count)

    def __iter__(self) -> Iterator[tuple[dict[str, NDArray[Any]], None]]:
        """Give `({input: images}, None)`."""
        drawn = np.random.default_rng(next(self.iterations))
        numbers = drawn.permutation(self.images.chosen)
        for start in range(0, len(numbers), BATCH):
            plain = [self.images.decoded(int(number)) for number in numbers[start : start + BATCH]]
            yield self._batch(plain)
            for _ in range(VARIED):
                yield self._batch([self._made(drawn) for _ in range(BATCH)])

    def _batch(self, images: Sequence[NDArray[np.uint8]]) -> tuple[dict[str, NDArray[Any]], None]:
        return {self.images.name: np.stack([self.images.prepare(image) for image in images])}, None

    def _made(self, drawn: np.random.Generator) -> NDArray[np.uint8]:
        square = np.full((YOLOX_SIZE, YOLOX_SIZE, 3), GREY, np.uint8)
        row, column = (
            drawn.integers(YOLOX_SIZE // 4, 3 * YOLOX_SIZE // 4, 2) if drawn.random() < 0.5 else (YOLOX_SIZE,) * 2
        )
        for rows, columns in itertools.product((slice(row), slice(row, None)), (slice(column), slice(column, None))):
            place = square[rows, columns]
            if place.size:
                image = self._varied(drawn)
                over = np.subtract(image.shape[:2], place.shape[:2])
                top, left = drawn.integers(0, np.maximum(over, 0) + 1)
                part = image[top : top + place.shape[0], left : left + place.shape[1]]
                top, left = drawn.integers(0, np.maximum(-over, 0) + 1)
                place[top : top + part.shape[0], left : left + part.shape[1]] = part
        return square

    def _varied(self, drawn: np.random.Generator) -> NDArray[np.uint8]:
        image = Image.fromarray(self.images.decoded(int(drawn.choice(self.images.chosen))))
        scale, shape = np.exp(drawn.uniform(*np.log(SCALES))), np.exp(drawn.uniform(-SHAPE, SHAPE) / 2)
        size = [max(round(side * own), 1) for side, own in zip(image.size, (scale * shape, scale / shape), strict=True)]
        image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32)[:, :: 1 if drawn.random() < 0.5 else -1]
        colour, contrast, light = drawn.uniform(*COLOURS), drawn.uniform(*CONTRASTS), drawn.uniform(*LIGHTS)
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = grey + colour * (pixels - grey)
        mean = pixels.mean()
        pixels = (mean + contrast * (pixels - mean)) * light * drawn.uniform(*TINTS, 3)
        found: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
        return found


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


def yolox() -> dict[str, Any]:
    """COCO images in a grey square of 416, blue first, 0 to 255, NCHW; boxes for the test images alone.

    The training images come as they are and changed: there are few, and without labels a network learns from any image.
    """
    own = _coco("images", _squared, None)
    stored = _stored("coco256_416.npz")
    boxes = _boxes(stored["val_boxes"], stored["val_sizes"])
    train, test = own["train"], own["test"]
    return {
        "train": Mosaics(train),
        "test": dataclasses.replace(test, targets=boxes),
        "detections": yolox_detections,
    }


def _squared(image: NDArray[np.uint8]) -> NDArray[Any]:
    square = np.full((YOLOX_SIZE, YOLOX_SIZE, 3), GREY, np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    return np.ascontiguousarray(square[:, :, ::-1].transpose(2, 0, 1)).astype(np.float32)


def _boxes(boxes: NDArray[Any], sizes: NDArray[Any]) -> NDArray[Any]:
    """`(images, most, 5)` rows `[class, x1, y1, x2, y2]` in pixels, filled up with class -1.

    Args:
        boxes: rows `[image, class, cx, cy, width, height]`, relative to the image.
        sizes: width and height of each image.
    """
    image = boxes[:, 0].astype(int)
    scale = sizes[image].astype(np.float32)
    centre, half = boxes[:, 2:4] * scale, boxes[:, 4:6] * scale / 2
    rows = np.hstack([boxes[:, 1:2], centre - half, centre + half])
    counts = np.bincount(image, minlength=len(sizes))
    found = np.full((len(sizes), counts.max(), 5), -1, np.float32)
    for number in range(len(sizes)):
        found[number, : counts[number]] = rows[image == number]
    return found


def yolox_detections(outputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Decode the raw outputs `(N, 3549, 85)` of YOLOX: cells of three grids, then suppression within each class.

    A cell gives its box's centre, in cells from its own corner, the logarithms of its size in cells, the probability of
    an object, and that of every class (Ge et al., YOLOX, arXiv 2107.08430).
    """
    sides = [YOLOX_SIZE // stride for stride in YOLOX_STRIDES]
    corner = np.concatenate([np.argwhere(np.ones((side, side)))[:, ::-1] for side in sides])  # x, y in cells
    stride = np.repeat(YOLOX_STRIDES, [side * side for side in sides])[:, None]
    raw = np.asarray(outputs[0], np.float64)
    centre, half = (raw[..., :2] + corner) * stride, np.exp(np.minimum(raw[..., 2:4], 20)) * stride / 2
    boxes = np.concatenate([centre - half, centre + half], axis=-1)
    scores = raw[..., 4:5] * raw[..., 5:]
    return [_suppressed(*pair) for pair in zip(boxes, scores, strict=True)]


def _suppressed(boxes: NDArray[Any], scores: NDArray[Any]) -> NDArray[Any]:
    """Of overlapping boxes of one class the best, rows `[x1, y1, x2, y2, score, class]`.

    Args:
        boxes: `(cells, 4)`.
        scores: `(cells, classes)`.
    """
    cell, label = np.nonzero(scores > LEAST_SCORE)
    score = scores[cell, label]
    order = np.argsort(-score, kind="stable")[:MOST_BOXES]
    cell, label, score = cell[order], label[order], score[order]
    rows = np.column_stack([boxes[cell], score, label])
    kept = []
    while len(rows):
        best, rows = rows[0], rows[1:]
        kept.append(best)
        rows = rows[(rows[:, 5] != best[5]) | (_overlaps(best, rows) <= MOST_OVERLAP)]
    return np.array(kept).reshape(-1, 6)


def _overlaps(box: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of a box with others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    both = np.maximum(high - low, 0).prod(axis=1)
    area = (others[:, 2:4] - others[:, :2]).prod(axis=1)
    found: NDArray[Any] = both / ((box[2:4] - box[:2]).prod() + area - both)
    return found


def mnist_turned() -> dict[str, list[tuple[NDArray[Any], NDArray[Any]]]]:
    """MNIST images transposed and flattened, 0 to 1."""
    own = _stored("mnist.npz")
    found = {}
    for part in ("train", "test"):
        images = own[f"x_{part}"].reshape(-1, 28, 28).transpose(0, 2, 1).reshape(-1, 784).astype(np.float32) / 255
        labels = own[f"y_{part}"].astype(np.int64)
        found[part] = [(images[i : i + 512], labels[i : i + 512]) for i in range(0, len(images), 512)]
    return found
