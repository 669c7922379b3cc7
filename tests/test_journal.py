"""A journal gives back what a step made, bit for bit, and where its clock stood; what is damaged is made again."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from onnxneutrino import clock, interrupts, journal, run_directory
from onnxneutrino.allocate import Option
from onnxneutrino.bench import Candidate
from onnxneutrino.config import load_config
from onnxneutrino.errors import OutputError, UsageError
from onnxneutrino.factors import Factors, Stage
from onnxneutrino.journal import UNKEPT, Journal, RunJournal
from onnxneutrino.metrics import Drop
from onnxneutrino.plan import Choice
from onnxneutrino.records import packed, read_arrays, read_head, unpacked, write_record
from onnxneutrino.run_directory import Identity
from onnxneutrino.task import Network

GENERATOR = np.random.default_rng(0)


def candidate() -> Candidate:
    stages = (Stage(np.asfortranarray(GENERATOR.normal(size=(3, 5)).astype(np.float32))), Stage(np.eye(2, 3)[::-1]))
    own = Factors("svd", (3,), stages, np.zeros(2, np.float32), np.float64(0.1) / 3)
    network = Network({"fc": own}, {"bias": np.array(1.5, np.float16)})
    choices = {"fc": Option(Choice("svd", (3,)), 0.1 + 0.2, float("inf"), (1.0, 2.0)), "other": Option(None, 1.0, 0.0)}
    return Candidate("a", network, choices, 1e300, 5e-324, Drop(0.1, 0.2, -0.1, float("nan")), 1 / 3)


def equal(a: Any, b: Any) -> bool:
    """Whether two packed values are the same to the bit."""
    (plain, arrays), (other, others) = packed(a), packed(b)
    same = all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(arrays, others, strict=True))
    return json.dumps(plain) == json.dumps(other) and same


def test_values_come_back_to_the_bit(tmp_path: Path) -> None:
    value = candidate()
    plain, arrays = packed(value)
    write_record(tmp_path / "0.npz", {"value": plain}, arrays)
    head, read = read_head(tmp_path / "0.npz"), read_arrays(tmp_path / "0.npz")
    assert head is not None
    assert read is not None
    back = unpacked(head["value"], read)
    assert equal(back, value)
    assert back.choices == value.choices
    assert isinstance(back.network.factors["fc"].ranks, tuple)
    assert all(array.flags.c_contiguous for array in (*arrays, *read))
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


@pytest.mark.parametrize("harm", ["cut", "changed", "empty", "gone"])
def test_a_damaged_record_is_none(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "0.npz"
    write_record(path, {"name": "a"}, [np.arange(1000)])
    data = bytearray(path.read_bytes())
    if harm == "changed":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-100], "changed": data, "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        path.unlink()
    assert read_arrays(path) is None
    assert harm == "changed" or read_head(path) is None


def walk(own: Journal, made: list[str], fail: str = "") -> list[float]:
    """Three steps, the second with one within, and readings of the clock between and in them; what they gave."""

    def step(name: str, within: bool = False) -> float:
        if name == fail:
            raise RuntimeError(name)
        made.append(name)
        inner = own.step(f"{name} within", lambda: step(f"{name} within")) if within else 0.0
        return clock.now() + inner

    found = [clock.now(), own.step("one", lambda: step("one")), clock.now()]
    found.append(own.step("two", lambda: step("two", within=True)))
    return [*found, own.step("three", lambda: step("three")), clock.now()]


@pytest.mark.parametrize("fail", ["two", "two within", "three"])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, fail: str) -> None:
    before: list[str] = []
    first = RunJournal(tmp_path)
    with pytest.raises(RuntimeError), clock.recording(first.readings, onward=True):
        walk(first, before, fail)
    again: list[str] = []
    second = RunJournal(tmp_path)
    assert second.worth
    with clock.recording(second.readings, onward=True) as tape:
        found = walk(second, again)
        times = tape.readings
        assert times == sorted(times)  # the time between does not count, and none is lost
    assert "one" not in again
    with clock.recording(times):
        assert walk(UNKEPT, []) == found
    assert {path.name for path in tmp_path.iterdir()} == {"0.npz", "1.npz", "2.npz"}


def test_a_record_that_is_gone_is_made_again_to_the_same_end(tmp_path: Path) -> None:
    with clock.recording((), onward=True):
        found = walk(RunJournal(tmp_path), [])
    (tmp_path / "1.npz").write_bytes(b"damaged")
    own, made = RunJournal(tmp_path), list[str]()
    with clock.recording(own.readings, onward=True):
        assert walk(own, made)[:-1] == found[:-1]
    assert made == ["two", "two within"]


def test_a_run_that_went_another_way_is_refused(tmp_path: Path) -> None:
    with clock.recording((), onward=True):
        clock.now()
        RunJournal(tmp_path).step("one", lambda: 1)
    with pytest.raises(UsageError, match="'one' stands there instead of 'two'"), clock.recording((), onward=True):
        RunJournal(tmp_path).step("two", lambda: 1)


def test_what_is_kept_within_a_step_goes_with_it(tmp_path: Path) -> None:
    def failing(own: Journal) -> int:
        own.keep("progress", lambda: (1, np.arange(3)))
        own.keep("progress", lambda: (2, np.arange(3)))  # too soon
        raise RuntimeError

    def going_on(own: Journal) -> int:
        number, array = own.kept("progress")
        assert array.tolist() == [0, 1, 2]
        assert own.kept("other") is None
        return int(number)

    with clock.recording((), onward=True):
        clock.now()
        first = RunJournal(tmp_path)
        with pytest.raises(RuntimeError):
            first.step("step", lambda: failing(first))
        second = RunJournal(tmp_path)
        assert second.step("step", lambda: going_on(second)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_a_journal_that_cannot_be_written_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    own = RunJournal(tmp_path)
    with clock.recording((), onward=True):
        assert own.step("one", lambda: 1) == 1
        monkeypatch.setattr(journal, "write_record", full)
        assert own.step("two", lambda: 2) == 2
        monkeypatch.undo()
        assert own.step("three", lambda: 3) == 3  # would have a gap before it
    assert own.warnings == (
        f"{tmp_path}: cannot be written (No space left on device); the run went on without a journal",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_too_much_and_objects_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RECORD_BYTES", 100)
    own = RunJournal(tmp_path)
    with clock.recording((), onward=True):
        assert len(own.step("large", lambda: np.zeros(1000))) == 1000
        assert own.step("objects", lambda: np.array([None])).tolist() == [None]
    assert not list(tmp_path.iterdir())


def test_the_best_network_is_kept_and_told(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", 1, [1])])
    own = RunJournal(tmp_path)
    own.best(lambda: helper.make_model(graph), "3 times smaller")
    assert ModelProto.FromString((tmp_path / "best.onnx").read_bytes()).graph.name == "g"
    assert interrupts.left() == f"continue with --resume (best so far: 3 times smaller: {tmp_path / 'best.onnx'})"
    interrupts.leave()


# --- the run directory ------------------------------------------------------------------------------------------

ONE = Identity({"seed": "0", "contents of the model": "aa"})
TWO = Identity({"seed": "1", "contents of the model": "bb"})


def interrupted(folder: Path, own: Identity = ONE, seconds: float = 1.0, resume: bool = False) -> None:
    """Leave an unfinished run of so many seconds."""

    def run() -> None:
        with (
            run_directory.opened(folder, own, resume) as kept,
            clock.recording(kept.readings, onward=True) as tape,
        ):
            clock.now()
            tape.jump(tape.readings, tape.shown() + seconds)
            kept.step("one", lambda: 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    interrupts.leave()


def test_nothing_stays_of_a_finished_run_or_one_that_did_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_directory.opened(folder, ONE, resume=False) as own, clock.recording((), onward=True):
        own.step("one", lambda: 1)
        assert {path.name for path in folder.iterdir()} == {"run.json", "lock", "0.npz"}
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), run_directory.opened(folder, ONE, resume=False):
        raise ZeroDivisionError
    assert not folder.exists()


def test_an_unfinished_run_goes_on_or_is_refused_by_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    interrupted(folder, seconds=750)
    with run_directory.opened(folder, ONE, resume=True) as own:
        assert own.worth
        assert own.elapsed == pytest.approx(750, abs=5)
        assert run_directory._started(folder) == ONE
    interrupted(folder, seconds=750)
    with pytest.raises(UsageError, match=r"started with seed 0 \(now 1\), contents of the model aa \(now bb\); give"):
        run_directory.opened(folder, TWO, resume=True).__enter__()
    with pytest.raises(UsageError, match=r"an unfinished run of 12 min 3. s lies there; continue it with --resume"):
        run_directory.opened(folder, ONE, resume=False).__enter__()
    assert (folder / "0.npz").exists()


def test_a_short_unfinished_run_is_replaced(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    with run_directory.opened(tmp_path / "run", TWO, resume=False) as own:
        assert not own.worth


def test_records_without_what_they_were_started_with_are_none(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with run_directory.opened(tmp_path / "run", ONE, resume=True) as own:
        assert not own.worth


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("")
    with pytest.raises(OutputError, match=r"holds 'photo.png', which is not of a run"):
        run_directory.opened(tmp_path, ONE, resume=False).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(OutputError, match="No such file or directory; give another --run-dir"):
        run_directory.opened(tmp_path / "none" / "run", ONE, resume=False).__enter__()


def test_the_lock_is_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        run_directory.opened(folder, ONE, resume=False),
        pytest.raises(OutputError, match=f"another run, process {os.getpid()}, is at work there"),
    ):
        run_directory.opened(folder, ONE, resume=True).__enter__()
    folder.mkdir()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.close(lock)  # as the end of its process does
    with run_directory.opened(folder, ONE, resume=True):
        pass


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model", "contents of the model "),
        ("external", "contents of the model "),
        ("data", "contents of the data "),
        ("metric", "contents of the metric "),
        ("folder", "contents of the data "),
        ("option", "seed 0 (now 7)"),
        ("toml", "scale 1.0 (now 2.0)"),
        ("nothing", ""),
    ],
)
def test_whatever_a_run_follows_from_is_told_by_name(tmp_path: Path, change: str, told: str) -> None:
    model, data, metric, toml = (tmp_path / name for name in ("in.onnx", "data.npz", "metric.py", "in.toml"))
    tensor = helper.make_tensor("w", 1, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="in.data")
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("w", 1, [1])], [tensor])
    model.write_bytes(helper.make_model(graph).SerializeToString())
    (tmp_path / "in.data").write_bytes(b"0000")
    data.write_bytes(b"data")
    metric.write_text("")
    (tmp_path / "images").mkdir()
    path = "images" if change == "folder" else "data.npz"

    def own(**more: object) -> Identity:
        toml.write_text(f'[data]\npath = "{path}"\nscale = {2.0 if "toml" in more else 1.0}\n')
        given = {name: value for name, value in more.items() if name != "toml"}
        return run_directory.identity(model, load_config(model, {"metric": f"{metric}:f", "threads": 1, **given}))

    before = own()
    if change == "model":
        model.write_bytes(model.read_bytes() + helper.make_model(graph, producer_name="x").SerializeToString())
    elif change == "folder":
        (tmp_path / "images" / "1.png").write_text("")
    elif change in ("external", "data", "metric"):
        (tmp_path / {"external": "in.data", "data": "data.npz", "metric": "metric.py"}[change]).write_bytes(b"1111")
    after = own(**{"option": {"seed": 7}, "toml": {"toml": True}}.get(change, {}))
    differences = after.differences(before)
    assert (after.digest == before.digest) == (change == "nothing")
    assert len(differences) == bool(told)
    assert all(own.startswith(told) for own in differences)
