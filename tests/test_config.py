from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxneutrino.config import OBJECTIVES, Config, DataConfig, available_cores, load_config, toml_path
from onnxneutrino.config_checks import parse_duration
from onnxneutrino.errors import UsageError

FULL = """
[data]
path = "cifar10.npz"
layout = "NHWC"
scale = 0.5
mean = [0.49, 0.48, 0.45]
std = 0.25
augment = ["crop4", "hflip"]
validation = 0.2
[metric]
name = "f1"
[compress]
delta = 2
time-limit = "15m"
exclude = "head.*"
labels = false
threads = 3
input-shape = { images = [1, 3, 64, 64] }
"""


def written(folder: Path, text: str) -> Path:
    (folder / "in.toml").write_text(text, encoding="utf-8")
    return folder / "in.onnx"


def test_the_toml_file_lies_beside_the_model() -> None:
    assert toml_path(Path("a/b.c.onnx")) == Path("a/b.c.toml")


def test_reads_every_table(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, FULL), {})
    assert config == Config(
        data=DataConfig(
            path="cifar10.npz",
            base=tmp_path,
            layout="NHWC",
            scale=0.5,
            mean=(0.49, 0.48, 0.45),
            std=(0.25,),
            augment=("crop4", "hflip"),
            validation=0.2,
        ),
        metric="f1",
        metric_base=tmp_path,
        delta=2.0,
        time_limit=900.0,
        exclude=("head.*",),
        labels=False,
        threads=3,
        input_shape={"images": (1, 3, 64, 64)},
    )


@pytest.mark.parametrize("model", [None, Path("absent/in.onnx")])
def test_without_a_file_the_defaults_hold(model: Path | None) -> None:
    assert load_config(model, {}) == Config(threads=available_cores())


def test_overrides_win_and_none_is_skipped(tmp_path: Path) -> None:
    overrides = {"delta": 0.5, "scale": 2.0, "metric": None, "data": Path("other.npz"), "validation": "0.3"}
    config = load_config(written(tmp_path, FULL), overrides)
    assert (config.delta, config.data.scale, config.metric, config.data.validation) == (0.5, 2.0, "f1", 0.3)
    # What the command line names is relative to the working directory, not to the TOML file.
    assert (config.data.path, config.data.base) == ("other.npz", Path("."))
    assert config.metric_base == tmp_path
    assert load_config(written(tmp_path, FULL), {"metric": "m.py:f"}).metric_base == Path(".")


def test_held_out_images_can_decide() -> None:
    assert load_config(None, {"validation": "file"}).data.validation == "file"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[data\n", "cannot be read as TOML"),
        ("path = 'x'", "unknown entry 'path'"),
        ("[training]\nrate = 1", "unknown entry 'training'"),
        ("[data]\npaht = 'x'", "unknown key 'paht' in [data]"),
        ("[data]\nbase = 'x'", "unknown key 'base' in [data]"),
        ("[metric]\nname = 'f1'\nbest = 1", "unknown key 'best' in [metric]"),
        ("[compress]\nmetric = 'f1'", "unknown key 'metric' in [compress]"),
        ("[metric]\nname = 3", "metric must be a string, got 3"),
        ("[data]\npath = 3", "path must be a string"),
    ],
)
def test_refuses_a_wrong_file_by_name(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, text), {})
    assert part in str(caught.value)
    assert str(tmp_path / "in.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("layout", "CHW", "must be one of NCHW, NHWC, got 'CHW'"),
        ("scale", 0, "must not be zero"),
        ("scale", "a", "must be a number"),
        ("mean", [float("nan")], "must be a number"),
        ("std", [1.0, -0.5], "must be positive"),
        ("std", [0.0], "must be positive"),
        ("augment", ["crop8"], "must be one of crop4, hflip"),
        ("validation", 1.0, "share from 0 to below 1"),
        ("validation", "files", "share from 0 to below 1"),
        ("delta", -1, "must not be negative"),
        ("delta", True, "must be a number"),
        ("stage", 3, "must be one of 1, 2"),
        ("stage", True, "must be one of 1, 2"),
        ("objective", "speed", "must be one of params, macs"),
        ("time_limit", 0, "must be positive"),
        ("time_limit", "-5m", "must be positive"),
        ("time_limit", "inf", "must be a number"),
        ("exclude", [3], "must be a string"),
        ("labels", "no", "must be true or false"),
        ("seed", True, "must be a whole number"),
        ("threads", -1, "must be a whole number"),
        ("trainer", "torch", "must be one of ort, reconstruct, none, file.py:function or 'command: PROGRAM"),
        ("trainer", "command: train.sh {candidate}", "{candidate} {trained}', got"),
        ("trainer", 1, "must be one of ort"),
        ("loss", "loss.txt", "must be file.py:function or an .onnx file"),
        ("optimizer", "adam", "must be one of adamw, sgd"),
        ("schedule", "linear", "must be one of cosine, step, constant"),
        ("learning_rate", 0, "must be positive"),
        ("weight_average", 1, "must be from 0 to below 1"),
        ("weight_average", -0.1, "must be from 0 to below 1"),
        ("before", "log", "must be file.py:function"),
        ("after", "log.py", "must be file.py:function"),
        ("max_params", "many", "must be a positive quantity such as 200k, 5M or 1.2G, got 'many'"),
        ("max_params", "200KB", "such as 200k"),
        ("max_params", "5m", "such as 200k"),
        ("max_macs", 0, "must be a positive quantity"),
        ("max_macs", "-5M", "must be a positive quantity"),
        ("max_macs", True, "must be a positive quantity"),
        ("max_size", "500k", "such as 500KB, 2MB or 1.5MiB"),
        ("max_size", "", "such as 500KB"),
        ("max_memory", float("nan"), "such as 500KB"),
        ("max_memory", "1e3000", "such as 500KB"),
        ("max_latency", "2 minutes", "such as 800us, 2ms or 0.1s"),
        ("max_latency", [2], "such as 800us"),
        ("confidence", 0.4, "from 0.5 to below 1"),
        ("confidence", 1.0, "from 0.5 to below 1"),
        ("input_shape", {"x": "1x3"}, "must be a list of sizes"),
        ("input_shape", {"x": [0, 3]}, "must be at least 1"),
        ("input_shape", [1, 3], "shape by input name"),
    ],
)
def test_refuses_a_value_out_of_range(tmp_path: Path, key: str, value: Any, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, FULL), {key: value})
    message = str(caught.value)
    assert message.startswith(f"the command line: {key.replace('_', '-')} ")
    assert part in message
    assert caught.value.exit_code == 2


def test_files_in_the_table_start_from_its_folder_and_those_of_an_option_do_not(tmp_path: Path) -> None:
    text = """
    [train]
    loss = "own/loss.onnx"
    before = "hooks.py:log"
    after = "/elsewhere/hooks.py:log"
    """
    config = load_config(written(tmp_path, text), {"before": "mine.py:log"})
    assert config.train.loss == str(tmp_path / "own" / "loss.onnx")
    assert config.train.before == "mine.py:log"
    assert config.train.after == "/elsewhere/hooks.py:log"
    command = "command: python train.py {candidate} {trained}"
    for trainer, wanted in (("train.py:train", f"{tmp_path / 'train.py'}:train"), (command, command)):
        assert load_config(written(tmp_path, f'[compress]\ntrainer = "{trainer}"'), {}).trainer == wanted


def test_sgd_needs_a_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="command line: optimizer sgd needs a learning-rate"):
        load_config(None, {"optimizer": "sgd"})
    assert load_config(None, {"optimizer": "sgd", "learning_rate": 0.1}).train.learning_rate == 0.1


def test_refuses_an_option_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="unknown option 'detla'"):
        load_config(None, {"detla": 1})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), (" 90s ", 90.0), ("15m", 900.0), ("2h", 7200.0), ("0.5h", 1800.0)]
)
def test_parses_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "1h30m", "soon", "5 d"])
def test_refuses_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("max_params", "200k", 2e5),
        ("max_params", " 1.5 M ", 1.5e6),
        ("max_params", 12345, 12345),
        ("max_macs", "1.2G", 1.2e9),
        ("max_macs", "300K", 3e5),
        ("max_size", "500KB", 5e5),
        ("max_size", "500kB", 5e5),
        ("max_size", "100B", 100),
        ("max_size", "1.5MiB", 1.5 * 2**20),
        ("max_memory", "1MB", 1e6),
        ("max_memory", "64KiB", 2**16),
        ("max_memory", "1GiB", 2**30),
        ("max_latency", "800us", 0.8),
        ("max_latency", "2ms", 2),
        ("max_latency", ".5s", 500),
        ("max_latency", 2.5, 2.5),
    ],
)
def test_hard_targets_have_units(tmp_path: Path, name: str, value: Any, limit: float) -> None:
    assert getattr(load_config(None, {name: value}), name) == pytest.approx(limit)
    quoted = f'"{value}"' if isinstance(value, str) else value
    table = written(tmp_path, f"[compress]\n{name.replace('_', '-')} = {quoted}\n")
    assert load_config(table, {}).limits == {name[4:]: pytest.approx(limit)}


def test_every_objective_can_be_a_hard_target() -> None:
    config = Config(**{f"max_{name}": 1.0 + place for place, name in enumerate(OBJECTIVES)})  # type: ignore[arg-type]
    assert config.limits == {name: 1.0 + place for place, name in enumerate(OBJECTIVES)}


def test_without_delta_any_drop_will_do_where_there_are_hard_targets() -> None:
    assert Config().largest_drop == 1.0
    assert Config(max_size=1e6).largest_drop == float("inf")
    assert Config(max_size=1e6, delta=0.0).largest_drop == 0.0
    assert Config(delta=2.5).largest_drop == 2.5
