"""Open the user's data: `.npz`, image folder, loader function or random inputs; split it; who decides.

Two shares are set aside. Of the training split, `validation` (a share) stops a fine-tune early; a network
has memorised its training images, so it judges no drop. What decides is `x_val` (or `val/`), else one half
of the test split, and the other half reports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxneutrino.config import DataConfig
from onnxneutrino.data_folder import open_folder
from onnxneutrino.data_function import UserFunction, is_function, load_function
from onnxneutrino.data_loader import open_loader
from onnxneutrino.data_npz import open_npz
from onnxneutrino.data_values import Batch, Dataset, Deciding, IndexedSplit, Inputs, InputSpec, Rows, Split
from onnxneutrino.errors import DataError

__all__ = ["Batch", "Dataset", "Deciding", "IndexedSplit", "InputSpec", "Inputs", "Split", "deciding", "open_data"]

RANDOM_EXAMPLES = 256
_STOP, _HALVES, _RANDOM = 1, 2, 3  # one stream of random numbers for each use of the seed


def open_data(
    config: DataConfig,
    inputs: Sequence[InputSpec],
    *,
    seed: int,
    classes: int | None,
    examples: int = RANDOM_EXAMPLES,
) -> Dataset:
    """Open the data that `config` describes for a model with these inputs.

    Args:
        config: path, preprocessing and validation share.
        inputs: the model's inputs that are no initializers.
        seed: draws the share for early stopping, and random data.
        classes: size of the model's last output axis for classifiers, so that labels out of range are
            refused; None for no check.
        examples: of each split, where they are drawn at random.

    Raises:
        DataError: no data, or data that does not fit the model; one line with file and array.
    """
    splits, detections, warnings = _splits(config, inputs, seed, classes, examples)
    train, test, validation = splits["train"], splits["test"], splits.get("val")
    assert train is not None
    assert test is not None
    if validation is not None and test.labelled and not validation.labelled:
        raise DataError(f"{config.path}: the test split has targets, the held-out one (val) has none; add y_val")
    if config.validation == "file":
        if validation is None:
            raise DataError(
                f"{config.path}: validation = 'file', but there is no x_val or val/; add it or give a share"
            )
        return Dataset(train, None, validation, test, warnings, detections)
    count = round(float(config.validation) * len(train))
    if config.validation and len(train) > 1:
        count = min(max(count, 1), len(train) - 1)
    if not count or train.labelled != test.labelled:  # where the test has targets, a share without cannot be judged
        return Dataset(train, None, validation, test, warnings, detections)
    order = np.random.default_rng([seed, _STOP]).permutation(len(train))
    return Dataset(train.subset(order[count:]), train.subset(order[:count]), validation, test, warnings, detections)


def deciding(dataset: Dataset, seed: int, name: str = "the data") -> Deciding:
    """Choose who decides: `x_val`, with the whole test split reporting, else halves of the test split.

    The halves are drawn once with the seed; with an odd number of examples the reporting half is larger.
    `name` is what a message calls the data.

    Raises:
        DataError: a test split of one example, which has no halves.
    """
    test = dataset.test
    if dataset.validation is not None:
        return Deciding(dataset.validation, test, test, "x_val", None, np.arange(len(test)))
    if len(test) < 2:
        raise DataError(
            f"{name}: the test split has 1 example; one half decides and one reports, so it needs 2 or more"
        )
    order = np.random.default_rng([seed, _HALVES]).permutation(len(test))
    select, report = np.sort(order[: len(test) // 2]), np.sort(order[len(test) // 2 :])
    return Deciding(test.subset(select), test.subset(report), test, "half of the test split", select, report)


def _splits(
    config: DataConfig, inputs: Sequence[InputSpec], seed: int, classes: int | None, examples: int
) -> tuple[Mapping[str, Split | None], UserFunction | None, tuple[str, ...]]:
    if not config.path:
        raise DataError(
            "no data is given; describe it in the TOML file beside the model (in.toml for in.onnx) or with --data"
        )
    if not inputs:
        raise DataError("the model has no inputs to feed; every value it needs is in the file")
    if config.path == "random":
        return _random(inputs, seed, examples)
    if is_function(config.path):
        function = load_function(config.path, config.base, DataError)
        splits, detections, warnings = open_loader(function, inputs, classes)
        if config.scale != 1.0 or config.mean or config.std or config.augment:
            ignored = "scale, mean, std and augment are not applied to a loader's batches"
            warnings = (*warnings, f"{function.path}: {ignored}")
        return splits, detections, warnings
    path = config.base / os.path.expanduser(config.path)  # `Path.expanduser` raises where there is no such user
    if not os.path.exists(path):
        raise DataError(f"{path}: not found; data is an .npz file, a folder, file.py:function or random")
    if len(inputs) > 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(
            f"{path}: feeds one input, the model has {len(inputs)} ({names}); use a loader, file.py:function"
        )
    if path.is_dir():
        folder, warnings = open_folder(path, config, inputs[0], classes)
        return folder, None, warnings
    if not path.is_file():
        raise DataError(f"{path}: is a device or pipe; data is an .npz file, a folder, file.py:function or random")
    return open_npz(path, config, inputs[0], classes), None, ()


@dataclass(frozen=True, eq=False)
class _RandomReader:
    """Inputs drawn row by row, so that none is kept: row `r` is the same whatever batch it is in."""

    inputs: tuple[InputSpec, ...]
    shapes: tuple[tuple[int, ...], ...]
    key: tuple[int, ...]

    def __call__(self, rows: Rows, generator: np.random.Generator | None) -> Inputs:
        """Return standard normal floats, bytes for 8-bit inputs, zeros and ones for other integers."""
        del generator
        drawn: Inputs = {}
        for number, (spec, shape) in enumerate(zip(self.inputs, self.shapes, strict=True)):
            array = np.empty((len(rows), *shape), spec.dtype)
            for position, row in enumerate(rows):
                rng = np.random.default_rng([*self.key, number, int(row)])
                if spec.dtype.kind == "f":
                    array[position] = rng.standard_normal(shape, np.float32)
                else:
                    array[position] = rng.integers(0, 256 if spec.dtype == np.uint8 else 2, shape)
            drawn[spec.name] = array
        return drawn


def _random(
    inputs: Sequence[InputSpec], seed: int, examples: int
) -> tuple[Mapping[str, IndexedSplit], None, tuple[str, ...]]:
    shapes = []
    for spec in inputs:
        shape = tuple(size for size in spec.example if size is not None)
        if len(shape) < len(spec.example):
            raise DataError(f"input '{spec.name}' has free dimensions; fix them with --input-shape for random data")
        if spec.dtype.kind not in "fiub":
            raise DataError(f"input '{spec.name}' of type {spec.dtype} cannot be drawn; use a loader, file.py:function")
        shapes.append(shape)
    rows = np.arange(examples)
    splits = {
        name: IndexedSplit(_RandomReader(tuple(inputs), tuple(shapes), (seed, _RANDOM, key)), None, rows)
        for key, name in enumerate(("train", "test"))
    }
    return splits, None, ("random inputs were used: the results say nothing about real data",)
