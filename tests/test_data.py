from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxneutrino import data_npz
from onnxneutrino.config import DataConfig
from onnxneutrino.data import Batch, Dataset, InputSpec, Split, deciding, open_data
from onnxneutrino.data_checks import fitted_shape
from onnxneutrino.data_images import augmented
from onnxneutrino.errors import DataError

FLOAT = np.dtype(np.float32)
COLOUR = InputSpec("x", (None, 3, 8, 6), FLOAT)
GREY = InputSpec("x", (None, 1, 8, 6), FLOAT)


def images(count: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (count, 8, 6, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def arrays(count: int = 20, channels: int = 3) -> dict[str, Any]:
    return {
        "x_train": images(count, channels),
        "y_train": np.arange(count) % 4,
        "x_test": images(10, channels, seed=1),
        "y_test": np.arange(10) % 4,
    }


def npz(folder: Path, content: dict[str, Any], compressed: bool = False) -> DataConfig:
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    save(folder / "data.npz", **content)
    return DataConfig(path="data.npz", base=folder)


def opened(config: DataConfig, *inputs: InputSpec, classes: int | None = 4, seed: int = 0) -> Dataset:
    return open_data(config, inputs or (COLOUR,), seed=seed, classes=classes)


def changed(config: DataConfig, **values: Any) -> DataConfig:
    return DataConfig(**{**vars(config), **values})


def all_of(split: Split, size: int = 7, **options: Any) -> Batch:
    batches = list(split.batches(size, **options))
    assert all(len(batch) == size for batch in batches[:-1])
    targets = [batch.targets for batch in batches if batch.targets is not None]
    inputs = {name: np.concatenate([b.inputs[name] for b in batches]) for name in batches[0].inputs}
    return Batch(inputs, np.concatenate(targets) if targets else None)


def refused(config: DataConfig, *inputs: InputSpec, classes: int | None = 4) -> str:
    with pytest.raises(DataError) as caught:
        opened(config, *inputs, classes=classes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# .npz


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_preprocessing_is_the_formula(tmp_path: Path, compressed: bool, layout: str) -> None:
    content = arrays()
    config = changed(
        npz(tmp_path, content, compressed), layout=layout, scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
    )
    shape = (None, 3, 8, 6) if layout == "NCHW" else (None, 8, 6, 3)
    batch = all_of(opened(config, InputSpec("x", shape, FLOAT)).test)
    raw = content["x_test"].astype(np.float64)
    expected = (raw / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.25, 0.3])
    if layout == "NCHW":
        expected = np.transpose(expected, (0, 3, 1, 2))
    assert batch.inputs["x"].dtype == np.float32
    assert batch.inputs["x"].flags.c_contiguous
    np.testing.assert_allclose(batch.inputs["x"], expected, atol=2e-6)
    assert batch.targets is not None
    np.testing.assert_array_equal(batch.targets, content["y_test"])


def test_large_uncompressed_arrays_are_mapped_and_stay_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_npz, "COPIED_BYTES", 0)
    content = {**arrays(), "x_test": np.asfortranarray(images(10, seed=1))}
    reader: Any = vars(opened(npz(tmp_path, content)).test)["read"]
    assert isinstance(reader.array, np.memmap)
    assert reader.array.dtype == np.uint8
    np.testing.assert_array_equal(reader.array, content["x_test"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int64])
def test_the_input_gets_its_own_type(tmp_path: Path, dtype: type) -> None:
    content = arrays()
    batch = all_of(opened(npz(tmp_path, content), InputSpec("x", (1, 3, 8, 6), np.dtype(dtype))).test)
    assert batch.inputs["x"].dtype == dtype
    np.testing.assert_array_equal(batch.inputs["x"], content["x_test"].transpose(0, 3, 1, 2))


def test_double_precision_is_kept(tmp_path: Path) -> None:
    content = {"x_train": np.full((4, 2, 2), 1 / 3), "x_test": np.full((4, 2, 2), 1 / 3)}
    spec = InputSpec("x", (None, 1, 2, 2), np.dtype(np.float64))
    assert all_of(opened(npz(tmp_path, content), spec).test).inputs["x"].ravel()[0] == 1 / 3


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ((48, 1), (48, 1)),
        ((48,), (48,)),
        ((None,), (48,)),
        ((1, 8, 6), (1, 8, 6)),
        ((1, None, None), (1, 8, 6)),
        ((8, 6), (8, 6)),
        ((8, 6, 1), (8, 6, 1)),
        ((None, 12), (4, 12)),
    ],
)
def test_grey_arrays_take_the_shape_of_the_input(
    tmp_path: Path, axes: tuple[int | None, ...], shape: tuple[int, ...]
) -> None:
    content = arrays(channels=1)
    content["x_test"] = content["x_test"][..., 0]  # N×H×W is grey too
    batch = all_of(opened(npz(tmp_path, content), InputSpec("x", (1, *axes), FLOAT)).test)
    assert batch.inputs["x"].shape == (10, *shape)
    np.testing.assert_array_equal(batch.inputs["x"].reshape(10, 48), content["x_test"].reshape(10, 48))


def test_colour_is_laid_out_before_it_is_flattened(tmp_path: Path) -> None:
    content = arrays()
    batch = all_of(opened(npz(tmp_path, content), InputSpec("x", (None, 144), FLOAT)).test)
    expected = content["x_test"].transpose(0, 3, 1, 2).reshape(10, 144)
    np.testing.assert_array_equal(batch.inputs["x"], expected)


def test_tables_have_one_mean_per_column(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((10, 3))
    config = changed(npz(tmp_path, {"x_train": table, "x_test": table}), mean=(1.0, 2.0, 3.0), std=(2.0,))
    batch = all_of(opened(config, InputSpec("x", (None, 3), FLOAT)).test)
    np.testing.assert_allclose(batch.inputs["x"], (table - [1, 2, 3]) / 2, atol=1e-6)
    assert batch.targets is None


def test_shapes_that_fit() -> None:
    assert fitted_shape((3, 8, 6), (3, None, None)) == (3, 8, 6)
    assert fitted_shape((1, 28, 28), (28, 28, 1)) == (28, 28, 1)
    assert fitted_shape((1, 28, 28), (784, 1)) == (784, 1)
    assert fitted_shape((1, 28, 28), (None, 7)) == (112, 7)
    assert fitted_shape((3, 32, 32), (32, 32, 3)) is None
    assert fitted_shape((1, 28, 28), (None, 9)) is None
    assert fitted_shape((1, 28, 28), (None, None)) is None


# Order, seeds, subsets


def test_a_split_can_be_iterated_again_and_shuffled_by_seed(tmp_path: Path) -> None:
    train = opened(changed(npz(tmp_path, arrays()), validation=0.0)).train
    first, again = all_of(train), all_of(train)
    assert len(train) == len(first) == 20
    assert train.labelled
    np.testing.assert_array_equal(first.inputs["x"], again.inputs["x"])
    shuffled, same, other = all_of(train, seed=1), all_of(train, size=3, seed=1), all_of(train, seed=2)
    np.testing.assert_array_equal(shuffled.inputs["x"], same.inputs["x"])
    assert not np.array_equal(shuffled.inputs["x"], first.inputs["x"])
    assert not np.array_equal(shuffled.inputs["x"], other.inputs["x"])
    # A shuffle is a permutation, and the labels move with the images.
    order = [int(np.argmax((first.inputs["x"] == row).all(axis=(1, 2, 3)))) for row in shuffled.inputs["x"]]
    assert sorted(order) == list(range(20))
    assert first.targets is not None
    assert shuffled.targets is not None
    np.testing.assert_array_equal(shuffled.targets, first.targets[order])


def test_the_stopping_share_is_apart_from_the_training_split(tmp_path: Path) -> None:
    content = arrays()
    content["x_train"] = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 8, 6, 3))
    config = changed(npz(tmp_path, content), validation=0.25)
    data = opened(config)
    assert data.stop is not None
    kept, stop = (set(all_of(s).inputs["x"][:, 0, 0, 0].astype(int)) for s in (data.train, data.stop))
    assert len(stop) == 5
    assert kept | stop == set(range(20))
    assert not kept & stop
    other = opened(config, seed=1).stop
    assert other is not None
    assert set(all_of(other).inputs["x"][:, 0, 0, 0].astype(int)) != stop
    assert opened(changed(config, validation=0.0)).stop is None


def test_halves_of_the_test_split_decide_and_report(tmp_path: Path) -> None:
    data = opened(npz(tmp_path, arrays()))
    roles = deciding(data, seed=3)
    assert roles.source == "half of the test split"
    assert roles.select_rows is not None
    assert sorted([*roles.select_rows, *roles.report_rows]) == list(range(10))
    everything = all_of(data.test).inputs["x"]
    np.testing.assert_array_equal(all_of(roles.select).inputs["x"], everything[roles.select_rows])
    np.testing.assert_array_equal(all_of(roles.report).inputs["x"], everything[roles.report_rows])
    np.testing.assert_array_equal(roles.select_rows, deciding(data, seed=3).select_rows)
    assert any(not np.array_equal(roles.select_rows, np.asarray(deciding(data, seed).select_rows)) for seed in (4, 5))


@pytest.mark.parametrize("validation", [0.1, "file"])
def test_held_out_images_decide(tmp_path: Path, validation: float | str) -> None:
    content = {**arrays(), "x_val": images(6, seed=2), "y_val": np.zeros(6, np.int64)}
    data = opened(changed(npz(tmp_path, content), validation=validation))
    roles = deciding(data, seed=0)
    assert (roles.source, roles.select_rows, len(roles.select), len(roles.report)) == ("x_val", None, 6, 10)
    np.testing.assert_array_equal(roles.report_rows, np.arange(10))
    assert (data.stop is None) == (validation == "file")


# Augmentation


def test_cropping_and_flipping_agree_with_a_loop() -> None:
    raw = images(50)
    names = ("crop4", "hflip")
    result = augmented(raw, names, np.random.default_rng(5))
    generator = np.random.default_rng(5)
    top, left = generator.integers(0, 9, (2, 50))
    mirrored = generator.random(50) < 0.5
    assert 5 < mirrored.sum() < 45
    for index in range(50):
        expected = np.zeros_like(raw[index])
        for row in range(8):
            for column in range(6):
                source = column if not mirrored[index] else 5 - column
                y, x = row + top[index] - 4, source + left[index] - 4
                if 0 <= y < 8 and 0 <= x < 6:
                    expected[row, column] = raw[index, y, x]
        np.testing.assert_array_equal(result[index], expected)


def test_augmentation_is_drawn_from_the_seed_and_only_when_asked(tmp_path: Path) -> None:
    config = changed(npz(tmp_path, arrays()), augment=("crop4", "hflip"), validation=0.0, mean=(9.0,), std=(2.0,))
    train = opened(config).train
    plain = all_of(train)
    augmented_once = all_of(train, augment=True)
    np.testing.assert_array_equal(augmented_once.inputs["x"], all_of(train, augment=True).inputs["x"])
    assert not np.array_equal(augmented_once.inputs["x"], plain.inputs["x"])
    assert not np.array_equal(augmented_once.inputs["x"], all_of(train, seed=0, augment=True).inputs["x"])
    # The border is black before normalization: (0 - 9) / 2 after it.
    assert augmented_once.inputs["x"].min() == -4.5
    moved, shuffled = all_of(train, seed=4, augment=True), all_of(train, seed=4)
    assert moved.targets is not None
    assert shuffled.targets is not None
    np.testing.assert_array_equal(moved.targets, shuffled.targets)


# Refusals of .npz


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x_test": None}, ["has no array 'x_test'", "x_train, y_train"]),
        ({"x_train": np.empty((0, 8, 6, 3))}, ["x_train: has no examples"]),
        ({"y_train": np.arange(19)}, ["x_train has 20 examples, y_train 19 entries"]),
        ({"y_test": np.array(3)}, ["y_test a scalar"]),
        ({"y_test": np.full(10, 4)}, ["y_test: label 4 at index 0 is out of range", "4 classes"]),
        ({"y_train": np.arange(20) % 4 - (np.arange(20) == 8)}, ["y_train: label -1 at index 8"]),
        ({"y_test": np.zeros(10)}, ["y_test: labels have dtype float64", "needs integers"]),
        ({"y_test": np.eye(4, dtype=np.int64)[np.zeros(10, int)]}, ["y_test: labels are one-hot", "argmax"]),
        ({"x_test": images(10)[:, :, :5]}, ["x_test: examples of shape 8x5x3", "'x' of shape 3x8x6"]),
        ({"x_test": images(10).transpose(0, 3, 1, 2)}, ["3x8x6", "arrays seem to be NxCxHxW"]),
        ({"x_test": images(10).astype(str)}, ["x_test: dtype <U3 does not fit the input 'x' of type float32"]),
        ({"x_test": images(10) + 1j}, ["x_test: dtype complex128 does not fit"]),
        ({"x_test": np.where(images(10) == images(10)[3, 2, 1, 0], np.nan, 1.0)}, ["x_test: NaN or infinity"]),
        ({"x_val": images(2)}, ["the held-out one (val) has none"]),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    content = {key: array for key, array in {**arrays(), **change}.items() if array is not None}
    message = refused(npz(tmp_path, content))
    assert "data.npz" in message
    for part in parts:
        assert part in message


def test_the_first_bad_example_is_named(tmp_path: Path) -> None:
    values = images(10).astype(np.float32)
    values[6, 0, 0, 0] = np.inf
    assert "NaN or infinity in example 6" in refused(npz(tmp_path, {**arrays(), "x_test": values}))


@pytest.mark.parametrize(
    ("values", "spec", "part"),
    [
        ({"layout": "NHWC"}, COLOUR, 'layout = "NCHW" would fit'),
        ({}, InputSpec("x", (None, 8, 6, 3), FLOAT), 'layout = "NHWC" would fit'),
        ({}, GREY, "examples of shape 8x6x3, 3x8x6 as NCHW, do not fit the input 'x' of shape 1x8x6"),
        ({"mean": (0.5, 0.5)}, COLOUR, "mean has 2 values for 3 channels; give 1 or 3"),
        ({"std": (0.5,) * 4}, COLOUR, "std has 4 values for 3 channels"),
        ({"scale": 0.5}, InputSpec("x", (None, 3, 8, 6), np.dtype(np.uint8)), "remove scale, mean and std"),
        ({}, InputSpec("x", (None, 3, 8, 6), np.dtype(np.int8)), "does not fit the input 'x' of type int8"),
        ({"validation": "file"}, COLOUR, "validation = 'file', but there is no x_val"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tmp_path: Path, values: dict[str, Any], spec: InputSpec, part: str
) -> None:
    assert part in refused(changed(npz(tmp_path, arrays()), **values), spec)


def test_floats_do_not_become_integers(tmp_path: Path) -> None:
    content = {**arrays(), "x_test": images(10).astype(np.float32)}
    spec = InputSpec("x", (None, 3, 8, 6), np.dtype(np.uint8))
    assert "dtype float32 does not fit the input 'x' of type uint8" in refused(npz(tmp_path, content), spec)


def test_augmentation_needs_images(tmp_path: Path) -> None:
    config = changed(npz(tmp_path, {"x_train": np.ones((4, 9)), "x_test": np.ones((4, 9))}), augment=("hflip",))
    assert "augment needs arrays of shape NxHxW[xC]" in refused(config, InputSpec("x", (None, 9), FLOAT))


def test_labels_of_maps_may_be_ignored(tmp_path: Path) -> None:
    maps = np.full((10, 8, 6), 255, np.uint8)
    maps[:, 0] = 3
    data = opened(npz(tmp_path, {**arrays(), "y_test": maps}))
    np.testing.assert_array_equal(np.asarray(all_of(data.test).targets), maps)
    maps[7, 1, 1] = 4
    assert "label 4 at index 7" in refused(npz(tmp_path, {**arrays(), "y_test": maps}))


def test_labels_in_a_column_are_taken_and_unchecked_ones_kept(tmp_path: Path) -> None:
    content = {**arrays(), "y_test": (np.arange(10) % 4)[:, None]}
    targets = all_of(opened(npz(tmp_path, content)).test).targets
    assert targets is not None
    np.testing.assert_array_equal(targets, np.arange(10) % 4)
    values = np.linspace(0, 1, 10)
    content = {**arrays(), "y_test": values}
    targets = all_of(opened(npz(tmp_path, content), classes=None).test).targets
    np.testing.assert_array_equal(np.asarray(targets), values)
    values[2] = np.nan
    assert "y_test: NaN or infinity in example 2" in refused(npz(tmp_path, content), classes=None)


@pytest.mark.parametrize("compressed", [False, True])
def test_pickles_are_never_loaded(tmp_path: Path, compressed: bool) -> None:
    ragged = np.empty(10, dtype=object)
    config = npz(tmp_path, {**arrays(), "x_test": ragged}, compressed)
    assert "data.npz: array 'x_test' is pickled" in refused(config)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    config = npz(tmp_path, arrays(), compressed=True)
    path = tmp_path / "data.npz"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x_train.npy")
    at = info.header_offset + 200
    path.write_bytes(whole[:at] + bytes(40) + whole[at + 40 :])
    assert "data.npz" in refused(config)
    path.write_bytes(b"x,y\n1,2\n")
    assert "is not an .npz file" in refused(config)
    path.unlink()
    assert "data.npz: not found" in refused(config)
    assert "no data is given; describe it in the TOML file" in refused(DataConfig())
    assert "the model has 2 (x, x)" in refused(npz(tmp_path, arrays()), COLOUR, COLOUR)
    with pytest.raises(DataError, match="the model has no inputs"):
        open_data(config, (), seed=0, classes=4)


def test_one_test_example_has_no_halves(tmp_path: Path) -> None:
    data = opened(npz(tmp_path, {"x_train": images(1), "x_test": images(1)}))
    assert (len(data.train), data.stop) == (1, None)
    with pytest.raises(DataError, match="needs 2 or more"):
        deciding(data, seed=0)
