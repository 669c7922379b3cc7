"""Data sets as image folders: `train/<class>/*.png`, `test/<class>/*.png`, `val/<class>/*.png`.

Images are decoded batch by batch, and resized where they are not of the model's size. Classes are
numbered by their sorted names in `train`.
"""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxneutrino.config import DataConfig
from onnxneutrino.data_checks import shape_text
from onnxneutrino.data_images import Preprocess, preprocess
from onnxneutrino.data_values import IndexedSplit, Inputs, InputSpec, Rows
from onnxneutrino.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of the suffixes; others may start other programs
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class ImageReader:
    """Image files, decoded to `size` (height, width), grey or RGB, and preprocessed."""

    files: Sequence[Path]
    size: tuple[int, int]
    grey: bool
    prepare: Preprocess

    def __call__(self, rows: Rows, generator: np.random.Generator | None) -> Inputs:
        """Return the model's input for the files at `rows`."""
        raw = np.stack([read_image(self.files[row], self.size, self.grey) for row in rows])
        return self.prepare(raw, generator)


def open_folder(
    path: Path, config: DataConfig, spec: InputSpec, classes: int | None
) -> tuple[dict[str, IndexedSplit | None], tuple[str, ...]]:
    """Open the splits `train`, `val` (None where it is absent) and `test` of a folder, and the warnings.

    Raises:
        DataError: no `train` or `test`, no images, a class that `train` does not have, more classes than the
            model has outputs, images that cannot fit the input.
    """
    for name in ("train", "test"):
        if not (path / name).is_dir():
            raise DataError(f"{path}: has no folder '{name}'; needed are train/<class>/ and test/<class>/")
    names = sorted(_folders(path / "train"))
    if not names:
        raise DataError(f"{path / 'train'}: has no class folders; put the images into train/<class>/")
    if classes is not None and len(names) > classes:
        raise DataError(
            f"{path / 'train' / names[classes]}: label {classes} is out of range; "
            f"there are {len(names)} class folders, the model has {classes} classes"
        )
    warnings: tuple[str, ...] = ()
    if classes is not None and len(names) < classes:
        warnings = (f"{path}: {len(names)} class folders, the model has {classes} classes; they are numbered by name",)
    listed = {name: _listed(path / name, names) for name in ("train", "val", "test") if (path / name).is_dir()}
    first = listed["train"][0][0]
    size, grey = _geometry(first, config.layout, spec)
    if len(spec.example) == 3 and None in spec.example:
        _check_one_size([file for files, _ in listed.values() for file in files], spec)
    shape = size if grey else (*size, 3)
    prepare = preprocess(config, spec, shape, np.dtype(np.uint8), str(path))
    splits: dict[str, IndexedSplit | None] = {"val": None}
    for name, (files, labels) in listed.items():
        splits[name] = IndexedSplit(ImageReader(files, size, grey, prepare), labels, np.arange(len(files)))
    return splits, warnings


def read_image(file: Path, size: tuple[int, int], grey: bool) -> NDArray[np.uint8]:
    """Decode an image to `(H, W)` or `(H, W, 3)` uint8, resized (bilinear) where its size differs.

    Raises:
        DataError: a file that is no image, is damaged, or has more than 8 bits per channel.
    """
    with _opened(file) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{file}: has more than 8 bits per channel; convert it to 8 bits")
        pixels: Any = image.convert("L" if grey else "RGB")
        if (pixels.height, pixels.width) != size:
            pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(pixels, dtype=np.uint8)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image file, open; what is wrong with it becomes one line, and so do more pixels than Pillow finds safe."""
    if not os.path.isfile(file):
        raise DataError(f"{file}: is no file that can be read; replace or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file}: has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, OverflowError, struct.error) as error:
        raise DataError(f"{file}: cannot be read as an image; replace or remove it") from error


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _listed(path: Path, names: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """Image files and labels of one split, class by class."""
    unknown = sorted(set(_folders(path)) - set(names))
    if unknown:
        raise DataError(f"{path / unknown[0]}: is no class of train; put images of it there or remove it")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        folder = path / name
        if folder.is_dir():
            found = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
            files += sorted(found)
            labels += [label] * len(found)
    if not files:
        raise DataError(f"{path}: has no images in its class folders; every split needs some")
    return files, np.array(labels, dtype=np.int64)


def _check_one_size(files: Sequence[Path], spec: InputSpec) -> None:
    """Refuse images of several sizes for an input that takes any: what they should become is not for us to say."""
    known: dict[tuple[int, int], Path] = {}
    for file in files:
        known.setdefault(image_size(file), file)
        if len(known) > 1:
            (one, first), (other, second) = known.items()
            shape = "x".join("?" if size is None else str(size) for size in (1, *spec.example))
            raise DataError(
                f"{second}: has {shape_text(other)} pixels, {first.name} has {shape_text(one)}, and the size of the "
                f"input '{spec.name}' is free; fix it with --input-shape {spec.name}={shape} (a number for each ?)"
            )


def image_size(file: Path) -> tuple[int, int]:
    """Height and width, from the head of the file."""
    with _opened(file) as image:
        return image.height, image.width


def _geometry(first: Path, layout: str, spec: InputSpec) -> tuple[tuple[int, int], bool]:
    """Height and width to decode to, and whether grey; the first image gives what the input leaves open."""
    height, width = image_size(first)
    if len(spec.example) != 3:
        known = [axis for axis in spec.example if axis is not None]
        return (height, width), len(known) == len(spec.example) and int(np.prod(known)) == height * width
    channels, *size = spec.example if layout == "NCHW" else (spec.example[2], *spec.example[:2])
    return (size[0] or height, size[1] or width), channels == 1
