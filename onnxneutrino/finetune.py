"""Fine-tuning with ONNX Runtime training: the only module that knows it.

The training copy of a model (lowered operators, fixed batch) gets a distillation loss in its own graph;
`onnxruntime.training.artifacts` adds the gradients, AdamW or SGD steps on them, and the trained arrays come back by
initializer name.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock
from onnxneutrino.coordinates import Coordinates, with_coordinates
from onnxneutrino.differentiable import untrainable
from onnxneutrino.directions import Directions
from onnxneutrino.errors import TrainingError
from onnxneutrino.gradient_graph import faster_gradients
from onnxneutrino.graph import RUNTIME_IR, element_dtype
from onnxneutrino.losses import Loss, loss_inputs, teacher_loss, with_loss
from onnxneutrino.memory import needed_for
from onnxneutrino.runtime import session_options
from onnxneutrino.schedules import Schedule, averaged, peak

Arrays = dict[str, NDArray[Any]]
MINIMUM_OPSET = 13
MAX_GRADIENT_NORM = 1.0
TIMED_STEPS = 4
READINGS, REFRESHES, LOOKS = 40, 10, 4  # in one fine-tune


@dataclass(frozen=True, eq=False)
class Example:
    """One training batch: the model's inputs, the teacher's outputs, integer labels where there are some."""

    inputs: Arrays
    teacher: Sequence[NDArray[Any]]
    labels: NDArray[Any] | None


@dataclass(frozen=True, eq=False)
class Trained:
    """Arrays by initializer name, the loss of every step, and what was run."""

    arrays: Arrays
    losses: tuple[float, ...]
    schedule: Schedule
    seconds: float


class NotFiniteError(TrainingError):
    """The loss or a trained array is not finite."""


def check_gradients(
    model: ModelProto, trainable: Sequence[str], outputs: Sequence[str], batch_statistics: bool = False
) -> None:
    """Refuse a training copy with an operator that has no right gradient on the way to the loss.

    With `batch_statistics` BatchNormalization has one: that of its training form.

    Raises:
        TrainingError: names the first such node and all such operators.
    """
    faults = untrainable(model, trainable, outputs)
    if batch_statistics:
        faults = [(name, operator) for name, operator in faults if operator != "BatchNormalization"]
    if faults:
        kinds = ", ".join(sorted({operator for _, operator in faults}))
        raise TrainingError(
            f"node '{faults[0][0]}': ONNX Runtime training has no right gradient for {kinds}; "
            "use --trainer none (factors and refit, no fine-tuning), or export without it"
        )


class Trainer:
    """Training artifacts of one training copy, ready to step.

    Use it as a context manager: the artifacts lie in a temporary folder.
    """

    def __init__(
        self,
        model: ModelProto,
        trainable: Sequence[str],
        loss: Loss,
        threads: int,
        optimizer: str = "adamw",
        *,
        weight_decay: float = 0.0,
        statistics: Sequence[str] = (),
        state: NDArray[np.uint8] | None = None,
        directions: Mapping[str, Directions] | None = None,
    ) -> None:
        """Make the artifacts.

        Args:
            model: training copy: lowered operators, opset >= 13, every input with a fixed batch.
            trainable: names of the initializers to train.
            loss: what to learn.
            threads: threads within an operator.
            optimizer: `adamw`, or `sgd` without momentum.
            weight_decay: of AdamW.
            statistics: names of the running averages of BatchNormalization in training form, which every step updates.
            state: of another trainer of the same model, to go on from; None to begin.
            directions: of what weights multiply, to which steps of AdamW are turned, shares of an array's own size
                (`coordinates.py`); None for steps as they are, as those of SGD always are.

        Raises:
            TrainingError: an operator between a trainable initializer and the loss has no right gradient, or
                the training runtime refuses the graph.
        """
        graph_model, _ = with_loss(model, loss)
        check_gradients(graph_model, trainable, [value.name for value in graph_model.graph.output], bool(statistics))
        self.loss = loss
        self._folder = tempfile.TemporaryDirectory(prefix="onnxneutrino-")
        self._feeds = {value.name: element_dtype(value.type.tensor_type.elem_type) for value in graph_model.graph.input}
        self.batch = int(graph_model.graph.input[0].type.tensor_type.shape.dim[0].dim_value)
        self.trainable = consumed(graph_model, trainable)
        self._coordinates = Coordinates()
        if directions is not None and optimizer == "adamw":
            graph_model, self._coordinates = with_coordinates(graph_model, self.trainable, directions)
        self._names = (*self.trainable, *statistics)
        self._gradients: list[NDArray[Any]] = []
        try:
            self._module, self._optimizer, self._state = _artifacts(
                graph_model,
                self.trainable,
                statistics,
                Path(self._folder.name),
                threads,
                optimizer,
                weight_decay,
                state,
            )
        except Exception as error:
            self._folder.cleanup()
            _check_disk(error)
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise TrainingError(f"ONNX Runtime training refuses the model: {text[0]}") from error

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def step(self, example: Example, rate: float) -> float:
        """One step of the optimizer on the clipped gradients.

        Returns:
            The loss before it, less the teacher's own.

        Raises:
            NotFiniteError: the loss is not finite.
            MemoryError: for a batch of this size; the trainer is of no more use.
        """
        given = loss_inputs(self.loss, example.teacher, example.labels)
        with needed_for(self.batch):
            loss = self._run(example, given)
            if not math.isfinite(loss):
                raise NotFiniteError(f"the training loss became {loss}; lower the learning rate or check the data")
            self._clip()
            self._optimizer.set_learning_rate(rate)
            self._optimizer.step()
        self._module.lazy_reset_grad()
        return loss - teacher_loss(self.loss, example.teacher, given)

    def gradients(self, example: Example) -> Arrays:
        """Gradients of the loss by what is trained, for one batch; nothing is updated.

        Raises:
            MemoryError: for a batch of this size; the trainer is of no more use.
        """
        with needed_for(self.batch):
            self._run(example, loss_inputs(self.loss, example.teacher, example.labels))
        found = {name: np.array(self._state.parameters[name].grad) for name in self.trainable}
        self._module.lazy_reset_grad()
        return found

    def arrays(self) -> Arrays:
        """The trainable initializers and the statistics as they are now."""
        return self._coordinates.arrays({name: self._state.parameters[name].data for name in self._names})

    def state(self) -> NDArray[np.uint8]:
        """All that the next step follows from, AdamW's moments and number of steps included, bit for bit."""
        path = Path(self._folder.name, "state")
        try:
            self._state.save_checkpoint(self._state, str(path), include_optimizer_state=True)
        except RuntimeError as error:
            _check_disk(error)
            raise
        return np.frombuffer(path.read_bytes(), np.uint8)

    def _run(self, example: Example, given: Mapping[str, NDArray[Any]]) -> float:
        values = {**example.inputs, **given}
        feeds = [np.ascontiguousarray(values[name], dtype) for name, dtype in self._feeds.items()]
        return float(np.asarray(self._module(*feeds)).reshape(-1)[0])

    def _clip(self) -> None:
        """Scale the gradients to a norm of at most 1 (Pascanu et al. 2013).

        The runtime's own clipping sums in no fixed order, so that no run could be repeated bit for bit.
        """
        if not self._gradients:  # the buffers come with the first gradients, and stay where they are
            self._gradients = [self._state.parameters[name]._parameter.grad.numpy() for name in self.trainable]
        norm = math.sqrt(math.fsum(float(np.vdot(own, own)) for own in self._gradients))
        if norm > MAX_GRADIENT_NORM:
            for own in self._gradients:
                own *= np.float32(MAX_GRADIENT_NORM / norm)


def _check_disk(error: Exception) -> None:
    """Raise OSError, which names the place, where the runtime had no space for a file: no fault of the model."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error):
        raise OSError(errno.ENOSPC, full, tempfile.gettempdir()) from error


def consumed(model: ModelProto, names: Sequence[str]) -> list[str]:
    """Those `names` that a node on the way to an output consumes; the gradient builder fails on others."""
    needed = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
    return [name for name in names if name in needed]


def _training_package() -> tuple[Any, Any, Any]:
    """Import ONNX Runtime's artifact builder, blocks and training API without torch.

    `onnxruntime.training/__init__` imports `amp` and `optim`, which need torch; the three modules used here
    do not. A bare package with the same path lets them be imported alone.
    """
    name = "onnxruntime.training"
    if name not in sys.modules:
        spec = importlib.util.find_spec("onnxruntime")
        folder = Path(spec.origin).parent / "training" if spec is not None and spec.origin else None
        if folder is None or not folder.is_dir():
            raise TrainingError(
                "this onnxruntime cannot train; run: pip uninstall -y onnxruntime && "
                "pip install --force-reinstall onnxruntime-training-cpu==1.19.2"
            )
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from onnxruntime.training import api, artifacts, onnxblock

    return artifacts, onnxblock, api


def onnxblocks() -> Any:
    """ONNX Runtime's `onnxblock`; from then on a user's file can import it as `onnxruntime.training.onnxblock`."""
    return _training_package()[1]


def _artifacts(
    model: ModelProto,
    trainable: Sequence[str],
    statistics: Sequence[str],
    folder: Path,
    threads: int,
    optimizer: str,
    weight_decay: float,
    begin: NDArray[np.uint8] | None,
) -> tuple[Any, Any, Any]:
    artifacts, onnxblock, api = _training_package()
    with _silent_stderr():
        artifacts.generate_artifacts(
            model,
            requires_grad=list(trainable),
            frozen_params=list(statistics),
            loss=None,
            optimizer=onnxblock.optim.SGD() if optimizer == "sgd" else onnxblock.optim.AdamW(weight_decay=weight_decay),
            artifact_directory=str(folder),
        )
    for name in ("training_model.onnx", "optimizer_model.onnx"):
        made = onnx.load(folder / name)
        made.ir_version = min(made.ir_version, RUNTIME_IR)
        if name == "training_model.onnx":
            made = faster_gradients(made)
        onnx.save(made, folder / name)
        del made
    if begin is not None:
        (folder / "checkpoint").write_bytes(begin.tobytes())
    state = api.CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = api.Module(str(folder / "training_model.onnx"), state, session_options=session_options(threads))
    return module, api.Optimizer(str(folder / "optimizer_model.onnx"), module), state


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the gradient builder writes there whatever the logger's level."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def step_seconds(trainer: Trainer, examples: Iterator[Example]) -> float:
    """Wall time of one step, lessons included: the mean of four at rate zero, after a first one."""
    trainer.step(next(examples), 0.0)
    start = clock.now()
    for _ in range(TIMED_STEPS):
        trainer.step(next(examples), 0.0)
    return (clock.now() - start) / TIMED_STEPS


def fine_tune(
    trainer: Trainer,
    examples: Iterator[Example],
    *,
    seconds: float,
    learning_rate: float,
    shape: str = "cosine",
    long_run: int = 0,
    weight_average: float = 0.0,
    steps: int | None = None,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    refresh: Callable[[Arrays], None] | None = None,
    look: Callable[[Arrays, int, float], bool] | None = None,
) -> Trained:
    """Train for about `seconds`: the first steps are timed at rate zero and give the number of steps.

    That number follows the clock: what else uses the cores shortens or lengthens the schedule, not the run.

    Args:
        trainer: the artifacts.
        examples: endless batches of the trainer's size.
        seconds: wall time to spend, data and teacher included.
        learning_rate: its peak.
        shape: of the schedule, see `Schedule`.
        long_run: steps that `learning_rate` is meant for; fewer take a lower peak, see `peak`.
        weight_average: decay of the moving average of the arrays, which is looked at and returned; 0 for none.
        steps: number of steps, when it is known already; nothing is timed then.
        report: called with step, steps and loss about once a second.
        refresh: called with the arrays as they are, a few times in all.
        look: asked after each quarter of the steps but the last, with the arrays to be returned, the step and the share
            of the steps that it stands for; True ends the training there.

    Raises:
        NotFiniteError: the loss or a trained array is not finite.
    """
    start = begun = clock.now()
    given = steps
    if steps is None:
        pace = step_seconds(trainer, examples)
        begun = clock.now()
        steps = max(1, int((seconds - (begun - start)) / pace))
    schedule = Schedule(steps, trainer.batch, peak(learning_rate, steps, long_run), shape)
    average = trainer.arrays() if weight_average else {}
    between_readings, between_looks = max(1, steps // READINGS), max(1, steps // REFRESHES)
    losses: list[float] = []
    told, looked = time.perf_counter(), 1
    while (step := len(losses)) < schedule.steps:
        if given is None and step and step % between_readings == 0:
            now = clock.now()
            left = (seconds - (now - start)) / ((now - begun) / step)
            schedule = replace(schedule, steps=step + max(1, int(left)))
        if refresh is not None and step and step % between_looks == 0:
            refresh(trainer.arrays())
        if look is not None and step and step >= looked * schedule.steps // LOOKS and looked < LOOKS:
            if look(average or trainer.arrays(), step, looked / LOOKS):
                break
            looked += 1
        losses.append(trainer.step(next(examples), schedule.rate(step)))
        if weight_average:
            average = averaged(average, trainer.arrays(), weight_average, step)
        if time.perf_counter() - told > 1.0:
            told = time.perf_counter()
            report(step + 1, schedule.steps, float(np.mean(losses[-20:])))
    arrays = average or trainer.arrays()
    for name, array in arrays.items():
        if not np.isfinite(array).all():  # what the last step did shows in no loss
            raise NotFiniteError(f"'{name}' is not finite after training; lower the learning rate or check the data")
    return Trained(arrays, tuple(losses), schedule, clock.now() - start)
