from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxneutrino.config import DataConfig
from onnxneutrino.data import Batch, Dataset, InputSpec, Split, deciding, open_data
from onnxneutrino.errors import DataError

FLOAT = np.dtype(np.float32)
COLOUR = InputSpec("x", (None, 3, 8, 6), FLOAT)


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


# Folders


def folder(base: Path, splits: tuple[str, ...] = ("train", "test"), size: tuple[int, int] = (8, 6)) -> DataConfig:
    for split in splits:
        for label, name in enumerate(("cat", "ant")):
            (base / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(3):
                pixels = np.full((*size, 3), 10 * number + 100 * label, np.uint8)
                Image.fromarray(pixels).save(base / split / name / f"{number}.png")
            (base / split / name / "notes.txt").write_text("no image", encoding="utf-8")
    return DataConfig(path=base.name, base=base.parent, validation=0.0)


def test_folders_number_their_classes_by_name(tmp_path: Path) -> None:
    config = folder(tmp_path / "set", ("train", "test", "val"))
    data = opened(config, classes=2)
    batch = all_of(data.train)
    np.testing.assert_array_equal(np.asarray(batch.targets), [0, 0, 0, 1, 1, 1])
    assert batch.inputs["x"].shape == (6, 3, 8, 6)
    np.testing.assert_array_equal(batch.inputs["x"][:, 0, 0, 0], [100, 110, 120, 0, 10, 20])
    assert data.validation is not None
    assert deciding(data, 0).source == "x_val"
    np.testing.assert_array_equal(batch.inputs["x"], all_of(data.train).inputs["x"])
    assert not data.warnings
    assert "numbered by name" in opened(config, classes=5).warnings[0]


@pytest.mark.parametrize(
    ("shape", "layout", "result"),
    [
        ((None, 3, 4, 3), "NCHW", (3, 4, 3)),
        ((1, 4, 3, 1), "NHWC", (4, 3, 1)),
        ((None, 1, None, None), "NCHW", (1, 8, 6)),
        ((None, None, None, None), "NCHW", (3, 8, 6)),
        ((None, 48), "NCHW", (48,)),
        ((None, 144), "NCHW", (144,)),
    ],
)
def test_images_take_the_size_and_channels_of_the_model(
    tmp_path: Path, shape: tuple[int | None, ...], layout: str, result: tuple[int, ...]
) -> None:
    config = changed(folder(tmp_path / "set"), layout=layout)
    batch = all_of(opened(config, InputSpec("x", shape, FLOAT), classes=None).test)
    assert batch.inputs["x"].shape == (6, *result)
    assert batch.inputs["x"].reshape(6, -1)[0].tolist() == [100.0] * int(np.prod(result))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "set"
    config = folder(base, ("train",))
    assert "set: has no folder 'test'" in refused(config)
    (base / "test").mkdir()
    assert "test: has no images" in refused(config)
    folder(base)
    assert "label 1 is out of range; there are 2 class folders" in refused(config, classes=1)
    assert "do not fit the input 'x' of shape 2x8x6" in refused(config, InputSpec("x", (None, 2, 8, 6), FLOAT))
    (base / "test" / "dog").mkdir()
    assert "dog: is no class of train" in refused(config)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    assert "has no class folders" in refused(DataConfig(path="flat", base=tmp_path))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    base = tmp_path / "set"
    data = opened(folder(base), classes=2)
    (base / "test" / "cat" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"cat.1\.png: cannot be read as an image"):
        all_of(data.test)
    Image.fromarray(np.zeros((8, 6), np.uint16)).save(base / "test" / "cat" / "1.png")
    with pytest.raises(DataError, match=r"1\.png: has more than 8 bits per channel"):
        all_of(data.test)
    (base / "train" / "ant" / "0.png").write_bytes(b"")
    assert "0.png: cannot be read" in refused(folder_config(base), classes=2)


def folder_config(base: Path) -> DataConfig:
    return DataConfig(path=base.name, base=base.parent)


# Loaders

VECTOR = InputSpec("x", (None, 2), FLOAT)
LOADER = """
import numpy as np
class Stream:
    def __init__(self, sizes): self.sizes = sizes
    def __iter__(self):
        start = 0
        for size in self.sizes:
            rows = np.arange(start, start + size)
            yield np.stack([rows, -rows], axis=1).astype(float), rows % 4
            start += size
class Data:
    train = Stream([4, 1, 6, 9])
    test = list(Stream([3, 5, 2]))
def streams(): return Data()
"""
SAME = """
import numpy as np
def own():
    part = BATCHES
    return {"train": part, "test": part}
"""


def loader(base: Path, text: str, name: str = "own") -> DataConfig:
    (base / "loader.py").write_text(text, encoding="utf-8")
    return DataConfig(path=f"loader.py:{name}", base=base, validation=0.0)


def test_loaders_are_counted_and_cut_into_batches(tmp_path: Path) -> None:
    data = opened(loader(tmp_path, LOADER, "streams"), VECTOR)
    assert (len(data.train), len(data.test), data.train.labelled) == (20, 10, True)
    for split in (data.train, data.test):
        for size in (1, 3, 7, 100):
            batch = all_of(split, size)
            rows = np.arange(len(split))
            assert batch.inputs["x"].dtype == np.float32
            np.testing.assert_array_equal(batch.inputs["x"], np.stack([rows, -rows], axis=1))
            np.testing.assert_array_equal(np.asarray(batch.targets), rows % 4)


def test_loaders_are_split_and_shuffled_while_streaming(tmp_path: Path) -> None:
    data = opened(changed(loader(tmp_path, LOADER, "streams"), validation=0.25), VECTOR)
    assert data.stop is not None
    kept, stop = all_of(data.train).inputs["x"][:, 0], all_of(data.stop).inputs["x"][:, 0]
    assert (len(data.train), len(data.stop), len(stop)) == (15, 5, 5)
    assert sorted([*kept, *stop]) == list(range(20))
    part = data.train.subset(np.array([14, 2, 7]))
    np.testing.assert_array_equal(all_of(part).inputs["x"][:, 0], kept[[2, 7, 14]])
    roles = deciding(data, 0)
    assert roles.select_rows is not None
    np.testing.assert_array_equal(all_of(roles.select).inputs["x"][:, 0], roles.select_rows)
    for split in (data.train, data.test):
        shuffled = all_of(split, seed=1)
        np.testing.assert_array_equal(shuffled.inputs["x"], all_of(split, seed=1).inputs["x"])
        assert not np.array_equal(shuffled.inputs["x"], all_of(split).inputs["x"])
        assert sorted(shuffled.inputs["x"][:, 0]) == sorted(all_of(split).inputs["x"][:, 0])
        np.testing.assert_array_equal(np.asarray(shuffled.targets), shuffled.inputs["x"][:, 0] % 4)


def test_several_inputs_come_as_a_dict(tmp_path: Path) -> None:
    text = """
import numpy as np
def own():
    part = [({"a": np.ones((3, 2)), "b": np.arange(3)}, None)]
    return {"train": part, "test": part, "val": part}
"""
    specs = (InputSpec("a", (None, 2), FLOAT), InputSpec("b", (None,), np.dtype(np.int64)))
    data = opened(loader(tmp_path, text), *specs)
    batch = all_of(data.test)
    assert batch.inputs["a"].shape == (3, 2)
    assert batch.inputs["b"].dtype == np.int64
    assert batch.targets is None
    assert data.validation is not None
    assert not data.test.labelled


def test_a_training_split_that_moves_is_warned_about(tmp_path: Path) -> None:
    text = """
import numpy as np
class Noise:
    generator = np.random.default_rng(0)
    def __iter__(self): yield self.generator.random((4, 2)), None
fixed = [(np.ones((4, 2)), None)]
def own(): return {"train": Noise(), "test": fixed}
def bad(): return {"train": fixed, "test": Noise()}
"""
    config = changed(loader(tmp_path, text), scale=0.5)
    warnings = opened(config, VECTOR).warnings
    assert "train gives other examples at each iteration" in warnings[0]
    assert "scale, mean, std and augment are not applied" in warnings[1]
    assert "test gives other examples at each iteration" in refused(loader(tmp_path, text, "bad"), VECTOR)


def test_a_loader_that_runs_out_later_is_refused(tmp_path: Path) -> None:
    text = """
import numpy as np
class Once:
    runs = 0
    def __iter__(self):
        self.runs += 1
        return iter([(np.ones((2, 2)), None)] * (2 if self.runs == 1 else 1))
def own(): return {"train": Once(), "test": [(np.ones((2, 2)), None)]}
"""
    data = opened(loader(tmp_path, text), VECTOR)
    with pytest.raises(DataError, match="train: batch 1 had 2 examples, the second time nothing"):
        all_of(data.train)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return 3", "loader.py, line 3: own returned int; return an object or dict with train and test"),
        ("return {'train': good}", "loader.py, line 3: own returned no 'test'; return"),
        ("return {'train': (b for b in good), 'test': good}", "train is a generator, which can be iterated only once"),
        ("return {'train': 5, 'test': good}", "train is int; return an iterable"),
        ("return {'train': good, 'test': []}", "loader.py, line 3: test has no batches"),
        ("return {'train': good, 'test': good, 'detections': 5}", "line 3: own returned int as 'detections'; give a"),
        ("return {'train': good, 'test': [np.ones((2, 2))]}", "a batch is ndarray; give (inputs, targets)"),
        ("return {'train': good, 'test': [({'z': 1}, None)]}", "inputs are z; the model has x"),
        ("return {'train': good, 'test': [(np.ones((2, 3)), None)]}", "shape 3 do not fit the input 'x' of shape 2"),
        ("return {'train': good, 'test': [(['a'], None)]}", "dtype <U1 does not fit"),
        ("return {'train': good, 'test': [([[1, 2], [3]], None)]}", "input 'x': is not one array; pad"),
        ("return {'train': good, 'test': [(np.full((2, 2), np.nan), None)]}", "NaN or infinity in example 0"),
        ("return {'train': good, 'test': [(np.ones((2, 2)), [0])]}", "has 2 examples and targets of shape 1"),
        ("return {'train': good, 'test': [(np.ones((2, 2)), [0, 1]), *good]}", "some batches have targets and some"),
        ("return {'train': good, 'test': [(np.ones((2, 2)), [0, 1]), (np.ones((1, 2)), [7])]}", "label 7 at index 2"),
        ("return {'train': good, 'test': [(np.ones((0, 2)), None)]}", "make them equal, above 0"),
        ("raise ValueError('two\\nlines')", "loader.py, line 4: own failed with ValueError: two lines"),
        ("return {'train': good, 'test': map(1 / 0, [])}", "loader.py, line 4: own failed with ZeroDivisionError"),
        ("return {'train': Raising(), 'test': good}", "loader.py, line 6: own failed with KeyError: 'lost'"),
    ],
)
def test_wrong_loaders_are_refused(tmp_path: Path, body: str, part: str) -> None:
    text = f"import numpy as np\ngood = [(np.ones((2, 2)), None)]\ndef own():\n    {body}\n"
    text += "class Raising:\n    def __iter__(self): raise KeyError('lost')\n"
    message = refused(loader(tmp_path, text), VECTOR)
    assert "loader.py" in message
    assert part in message


def test_targets_of_a_loader_may_differ_in_shape(tmp_path: Path) -> None:
    """Boxes: a list of arrays, or padded in each batch to a length of its own."""
    text = """
import numpy as np
def boxes(*counts): return [np.full((count, 5), 1.0) for count in counts]
def own():
    x = np.ones((2, 2))
    ragged = [(x, boxes(3, 1)), (x, boxes(2, 2))]
    padded = [(x, np.stack(boxes(4, 4))), (x, np.stack(boxes(2, 2)))]
    return {"train": ragged, "test": padded, "detections": lambda outputs: outputs}
"""
    data = opened(loader(tmp_path, text), VECTOR, classes=None)
    for split, counts in ((data.train, [3, 1, 2, 2]), (data.test, [4, 4, 2, 2])):
        for size in (1, 3, 4):
            whole = [own for batch in split.batches(size) for own in np.asarray(batch.targets)]
            assert [len(own) for own in whole] == counts
    assert data.detections is not None
    assert data.detections([1]) == [1]
    text = text.replace("boxes(3, 1)", "[np.full((1, 5), np.nan), np.ones((2, 5))]")
    assert "train: targets: NaN or infinity in example 0" in refused(loader(tmp_path, text), VECTOR, classes=None)


def test_a_share_without_targets_is_not_set_aside(tmp_path: Path) -> None:
    """The metric of a labelled test split cannot be taken on it."""
    text = SAME.replace("BATCHES", "[(np.ones((8, 2)), None)]")
    text = text.replace('"test": part', '"test": [(np.ones((8, 2)), np.zeros(8, int))]')
    data = opened(changed(loader(tmp_path, text), validation=0.25), VECTOR)
    assert data.stop is None
    assert len(data.train) == 8


def test_loader_batches_of_the_other_layout_are_named(tmp_path: Path) -> None:
    text = SAME.replace("BATCHES", "[(np.ones((2, 8, 6, 3)), None)]")
    assert "transposed to NCHW it would fit" in refused(loader(tmp_path, text))
    text = text.replace("8, 6, 3", "3, 8, 6")
    spec = InputSpec("x", (None, 8, 6, 3), FLOAT)
    assert "transposed to NHWC it would fit" in refused(loader(tmp_path, text), spec)
    assert "give a dict with a, b" in refused(
        loader(tmp_path, text), InputSpec("a", (None, 2), FLOAT), InputSpec("b", (None, 2), FLOAT)
    )


def test_loaders_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    assert "absent.py: not found" in refused(DataConfig(path="absent.py:own", base=tmp_path))
    assert "has no function 'own'" in refused(loader(tmp_path, "def other(): pass"))


def test_batches_that_differ_in_shape_are_refused(tmp_path: Path) -> None:
    text = SAME.replace("BATCHES", "[(np.ones((1, n)), None) for n in (2, 3)]")
    data = opened(loader(tmp_path, text), InputSpec("x", (None, None), FLOAT))
    with pytest.raises(DataError, match="batches differ in shape"):
        all_of(data.test)


# Random


def test_random_inputs_have_the_signature_of_the_model() -> None:
    specs = (
        InputSpec("a", (None, 3, 4), FLOAT),
        InputSpec("b", (1,), np.dtype(np.int64)),
        InputSpec("c", (1, 5), np.dtype(np.uint8)),
        InputSpec("d", (1, 64), np.dtype(np.float16)),
    )
    config = DataConfig(path="random", validation=0.0)
    data = opened(config, *specs)
    assert (len(data.train), len(data.test), data.train.labelled) == (256, 256, False)
    assert "nothing about real data" in data.warnings[0]
    batch, other_size = all_of(data.train, 100), all_of(data.train, 13)
    for spec in specs:
        values = batch.inputs[spec.name]
        assert values.shape == (256, *spec.example)
        assert values.dtype == spec.dtype
        np.testing.assert_array_equal(values, other_size.inputs[spec.name])
        assert not np.array_equal(values, all_of(data.test).inputs[spec.name])
        assert not np.array_equal(values, all_of(opened(config, *specs, seed=1).train).inputs[spec.name])
    assert batch.inputs["a"].std() == pytest.approx(1, abs=0.05)
    assert batch.inputs["a"].mean() == pytest.approx(0, abs=0.05)
    assert set(batch.inputs["b"]) == {0, 1}
    assert batch.inputs["c"].max() > 200


def test_random_inputs_need_fixed_dimensions() -> None:
    config = DataConfig(path="random")
    assert "fix them with --input-shape" in refused(config, InputSpec("a", (None, None), FLOAT))
    assert "cannot be drawn" in refused(config, InputSpec("a", (None, 2), np.dtype(object)))
