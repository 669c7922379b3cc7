"""The gradient self-check: before the first training, the model's own training artifacts against finite differences.

It runs in a child process, because a kernel of the training runtime can end the process that runs it:

    python -m onnxneutrino.selfcheck FOLDER

reads `model.onnx`, `loss.json`, `loss.onnx` and `arrays.npz` there and writes `result.json`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from onnxneutrino.errors import NeutrinoError, TrainingError
from onnxneutrino.finetune import Example
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.losses import Loss

TOLERANCE = 0.05
ATTEMPTS = 3  # a direction may cross a kink; three in a row do not
DEEP = 4
FAR = 10.0  # standard deviations
TIMEOUT = 180.0


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        fault: what is wrong with a gradient, in one line; None where every gradient is right.
        directions: how many were compared.
        worst: the largest relative error of those that passed.
        note: why there was no check, in one line; empty where there was one.
    """

    fault: str | None
    directions: int
    worst: float
    note: str = ""


def gradient_check(
    model: ModelProto, groups: Sequence[Sequence[str]], loss: Loss, example: Example, threads: int = 1
) -> Verdict:
    """Check a training copy in a child process.

    Args:
        model: training copy of the example's batch.
        groups: names of the trained initializers of each layer, in the order of the graph.
        loss: what is trained.
        example: one batch with the teacher's tensors; the targets are moved away from them, for at the teacher's own
            outputs every gradient is zero.
        threads: for the runtime.
    """
    with tempfile.TemporaryDirectory(prefix="onnxneutrino-check-") as name:
        folder = Path(name)
        onnx.save(model, folder / "model.onnx")
        (folder / "loss.onnx").write_bytes(loss.graph)
        stated = dataclasses.asdict(dataclasses.replace(loss, graph=b""))
        stated.pop("graph")
        request = {"loss": stated, "groups": _chosen(groups), "threads": threads}
        (folder / "loss.json").write_text(json.dumps(request), encoding="utf-8")
        arrays: dict[str, Any] = {f"input/{key}": value for key, value in example.inputs.items()}
        arrays |= {f"teacher/{index}": value for index, value in enumerate(_moved(loss, example))}
        if example.labels is not None:
            arrays["labels"] = example.labels
        np.savez(folder / "arrays.npz", **arrays)
        command = [sys.executable, "-m", "onnxneutrino.selfcheck", name]
        try:
            # In its folder: `-m` looks for the package where it is run first, and a checkout lacks its passes there.
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=folder)
        except subprocess.TimeoutExpired:
            return Verdict(None, 0, float("nan"), f"it did not end within {TIMEOUT:g} s")
        if done.returncode < 0:
            return Verdict(f"a kernel of the training runtime crashed (signal {-done.returncode})", 0, float("nan"))
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except OSError:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return Verdict(None, 0, float("nan"), last)
    return Verdict(**result)


def _chosen(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """All together, and alone the first and the last layer and some between: errors add up towards the first."""
    own = [list(group) for group in groups if group]
    places = sorted({round(place) for place in np.linspace(0, len(own) - 1, min(DEEP, len(own)))}) if own else []
    return [[name for group in own for name in group], *(own[place] for place in places)]


def _moved(loss: Loss, example: Example) -> list[np.ndarray]:
    """The teacher's tensors, those that are learned moved to where the loss has a slope whatever the network says."""
    generator = np.random.default_rng(0)
    moved = []
    for name, value in zip(loss.tensors, example.teacher, strict=True):
        array = np.asarray(value)
        noise = generator.standard_normal(array.shape)
        if name in loss.squared:
            # Far off on one side: near the teacher's own values curvature would hide the slope.
            size = float(np.std(array, dtype=np.float64))  # in float16 its sum of squares overflows
            array = np.asarray(array + FAR * (1 + noise / 2) * max(size, 1e-6), np.float32)
        elif loss.kind == "own":
            # Of another example and another class: whatever holds for the original's outputs holds for these.
            array = np.ascontiguousarray(array.reshape(-1)[::-1]).reshape(array.shape)
        elif name in loss.outputs:
            # Unsure of the class: where teacher and network are sure of the same, the slope is lost in rounding.
            array = np.asarray(loss.temperature * noise, np.float32)
        moved.append(array)
    return moved


def _run(folder: Path) -> None:
    request = json.loads((folder / "loss.json").read_text(encoding="utf-8"))
    stated: dict[str, Any] = request["loss"]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
    loss = Loss(**fields, graph=(folder / "loss.onnx").read_bytes())
    with np.load(folder / "arrays.npz") as stored:
        inputs = {key.removeprefix("input/"): stored[key] for key in stored.files if key.startswith("input/")}
        teacher = [stored[f"teacher/{index}"] for index in range(len(loss.tensors))]
        labels = stored["labels"] if "labels" in stored.files else None
    model, example = onnx.load(folder / "model.onnx"), Example(inputs, teacher, labels)
    verdict = check(model, request["groups"], loss, example, request["threads"])
    (folder / "result.json").write_text(json.dumps(dataclasses.asdict(verdict)), encoding="utf-8")


def check(
    model: ModelProto, groups: Sequence[Sequence[str]], loss: Loss, example: Example, threads: int = 1
) -> Verdict:
    """The check itself, in this process."""
    open_groups, worst = list(groups), 0.0
    try:
        for attempt in range(ATTEMPTS):
            found = derivatives(model, model, open_groups, loss, example, threads=threads, seed=attempt)
            wrong = [own for own in found if not own.error <= TOLERANCE]
            worst = max([worst, *(own.error for own in found if own.error <= TOLERANCE)])
            if not wrong:
                return Verdict(None, len(groups), worst)
            open_groups = [own.names for own in wrong]
    except TrainingError as error:
        return Verdict(str(error), 0, float("nan"))
    except NeutrinoError as error:
        return Verdict(None, 0, float("nan"), str(error))
    own = max(wrong, key=lambda entry: entry.error)
    text = f"the gradient at '{own.names[0]}' is {own.analytic:.3g}, finite differences give {own.numeric:.3g}"
    return Verdict(text, len(groups), own.error)


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
