"""A recipe in a folder: its data, its network with the first weights, and the file that describes the data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxneutrino.config import DataConfig
from onnxneutrino.data import IndexedSplit, InputSpec, open_data
from onnxneutrino.data_checks import check_labels
from onnxneutrino.data_folder import SUFFIXES, image_size
from onnxneutrino.errors import DataError, ModelError, OutputError, UsageError
from onnxneutrino.formats import format_bytes
from onnxneutrino.graph import check_writable, save
from onnxneutrino.zoo.builder import INPUT
from onnxneutrino.zoo.datasets import PIXEL
from onnxneutrino.zoo.download import TIMEOUT, checked_base, obtained, pending
from onnxneutrino.zoo.recipes import Recipe

MODEL, DESCRIPTION = "model.onnx", "model.toml"


@dataclass(frozen=True)
class Fetched:
    """What a folder holds now, and which of its files were there before and stayed."""

    recipe: str
    folder: str
    data: str
    classes: int
    input: tuple[int, int, int]
    kept: tuple[str, ...]


def fetch(
    recipe: Recipe,
    folder: Path,
    *,
    data: Path | None = None,
    url: str | None = None,
    size: int | None = None,
    seed: int = 0,
    timeout: float = TIMEOUT,
    tell: Callable[[str], None] = lambda detail: None,
) -> Fetched:
    """Write `model.onnx`, `model.toml` and, where none is given, the data into a folder.

    Args:
        recipe: what to write.
        folder: where; it is made if need be. What is whole there stays.
        data: an `.npz` file or image folder that is used where it lies, in place of a download.
        url: address of a folder with the official files, in place of the official one.
        size: height and width that images of a folder are brought to; None for those of the first one.
        seed: of the weights.
        timeout: seconds for a connection, and for each wait for more.
        tell: hears what is being done.

    Raises:
        UsageError: options that do not belong together.
        DataError: the data cannot be downloaded or does not fit.
        ModelError: another model is there, or the images are too small for the network.
        OutputError: the folder cannot be written.
    """
    if data is not None and url is not None:
        raise UsageError("--data and --url: give one of them; with --data nothing is downloaded")
    if data is None and not recipe.data.base:
        raise UsageError(f"{recipe.name}: takes your own images; name them with --data FOLDER or --data FILE.npz")
    if size is not None and recipe.data.image is not None:
        raise UsageError(f"--size: {recipe.name} has a size of its own; --size is for recipes of images")
    base = checked_base(url or recipe.data.base) if data is None else ""
    with _made(folder):
        check_writable(folder / MODEL)
        _check_own(folder / MODEL, recipe)
        if data is None:
            _load_data(recipe, base, folder, timeout, tell)
        path = str(data.expanduser().resolve()) if data is not None else recipe.data.archive
        config = DataConfig(
            path, folder, "NCHW", PIXEL, recipe.data.mean, recipe.data.std, recipe.data.augment, validation=0.0
        )
        image, classes = _signature(recipe, config, size)
        kept = tuple(name for name in (MODEL, DESCRIPTION) if (folder / name).exists())
        model = recipe.family.build(recipe.name, image, classes, seed=seed)
        if DESCRIPTION not in kept:
            with pending(folder / DESCRIPTION) as file:
                file.write(description(recipe, config).encode())
        if MODEL not in kept:
            save(model, folder / MODEL, external=False)
    return Fetched(recipe.name, str(folder), path, classes, image, kept)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which is gone again where nothing came of it."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror or error}; choose another place") from error
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it holds a file that came whole
                folder.rmdir()
        raise


def _check_own(path: Path, recipe: Recipe) -> None:
    """Refuse to go on beside a model that is not of this recipe."""
    if not path.exists():
        return
    try:
        name = onnx.load(path, load_external_data=False).graph.name
    except Exception:
        name = ""
    if name != recipe.name:
        raise ModelError(f"{path}: is there already and is called '{name}', not {recipe.name}; choose another folder")


def _load_data(recipe: Recipe, base: str, folder: Path, timeout: float, tell: Callable[[str], None]) -> None:
    """The `.npz` file of the data set: as it lies in the folder, else from the official files."""
    target = folder / recipe.data.archive
    if target.exists():
        return
    before = {file.name for file in recipe.data.files if (folder / file.name).exists()}
    for file in recipe.data.files:
        total = format_bytes(file.size_bytes)

        def progress(done: int, name: str = file.name, total: str = total) -> None:
            tell(f"{name}, {format_bytes(done)} of {total}")

        obtained(base, file, folder, progress, timeout)
    tell(f"writing {target.name}")
    (x_train, y_train), (x_test, y_test) = recipe.data.splits(folder)
    with pending(target) as archive:
        np.savez(archive, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    for file in recipe.data.files:
        if file.name not in before:
            (folder / file.name).unlink(missing_ok=True)


def _signature(recipe: Recipe, config: DataConfig, size: int | None) -> tuple[tuple[int, int, int], int]:
    """Image `(C, H, W)` and number of classes of the recipe, or those that the data has; the data is checked."""
    sizes: tuple[int | None, ...] = recipe.data.image or (None, *_image_sizes(config, size))
    spec = InputSpec(INPUT, (None, *sizes), np.dtype(np.float32))
    dataset = open_data(config, [spec], seed=0, classes=recipe.data.classes)
    splits = [split for split in (dataset.train, dataset.test) if isinstance(split, IndexedSplit)]
    targets = [split.targets for split in splits if split.targets is not None]
    if len(targets) < 2 or any(own[0].size != 1 for own in targets):
        raise DataError(f"{config.path}: needs a label for each image: y_train and y_test, or folders of classes")
    labels = np.concatenate([own.reshape(-1) for own in targets])
    classes = recipe.data.classes or (int(labels.max()) + 1 if labels.dtype.kind in "iu" else 2)
    check_labels(labels, max(classes, 2), f"{config.path}: the labels")
    if classes < 2:
        raise DataError(f"{config.path}: has one class alone; a classifier tells two or more apart")
    channels, height, width = next(dataset.train.batches(1)).inputs[INPUT].shape[1:]
    return (channels, height, width), classes


def _image_sizes(config: DataConfig, size: int | None) -> tuple[int | None, int | None]:
    """Height and width to ask of images: those given, or of the first one in a folder; None for those of an array."""
    if size is not None:
        return size, size
    train = config.base / config.path / "train"
    first = next((file for file in sorted(train.glob("*/*")) if file.suffix.lower() in SUFFIXES), None)
    return (None, None) if first is None else image_size(first)


def description(recipe: Recipe, config: DataConfig) -> str:
    """The TOML file beside the model."""
    return f"""# {recipe.name}: `onnxneutrino zoo train` on this folder, then `onnxneutrino compress` on the model.

[data]
path = {json.dumps(config.path, ensure_ascii=False)}
layout = "{config.layout}"
scale = {config.scale!r}
mean = {list(config.mean)}
std = {list(config.std)}
augment = {json.dumps(config.augment)}

[metric]
name = "top1"

[compress]
time-limit = "30m"
"""
