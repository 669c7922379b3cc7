"""Training elsewhere: a function or a command of the user gets a candidate as ONNX and gives back a trained one.

Only the arrays of the initializers that training may change are read back, by name, so that nothing else can come in.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino.config_checks import COMMAND, is_command
from onnxneutrino.data_function import UserFunction, is_function, load_function
from onnxneutrino.errors import ModelError, TrainingError
from onnxneutrino.graph import arrays, copied, load, save

TRAINABLE = "onnxneutrino.trainable"  # metadata of a candidate: names of the initializers that may change, one a line
GRACE = 30.0  # seconds after its own that a command is given to write its result
GRACE_SHARE = 0.25  # of its own, where that is more
END_SECONDS = 5.0  # between asking a command to end and killing it


@dataclass(frozen=True, eq=False)
class External:
    """A training loop of the user: a function, or the words of a command.

    Attributes:
        name: as the user wrote it.
        function: `train(candidate, original, seconds)`, of two paths, which returns a path or a model; None for a
            command.
        command: its words with the placeholders `{candidate}`, `{trained}`, `{original}`, `{seconds}`.
    """

    name: str
    function: UserFunction | None = None
    command: tuple[str, ...] = ()

    def trained(
        self, candidate: ModelProto, original: ModelProto, names: Sequence[str], seconds: float
    ) -> dict[str, NDArray[Any]]:
        """Let a candidate be trained.

        Args:
            candidate: graph with a free batch.
            original: the teacher, likewise.
            names: initializers that training may change.
            seconds: it should take.

        Returns:
            Their arrays after training, in the types that the candidate has.

        Raises:
            TrainingError: it failed, took too long, or gave back another model than a trained candidate.
        """
        with tempfile.TemporaryDirectory(prefix="onnxneutrino-") as folder:
            paths = {key: str(Path(folder, f"{key}.onnx")) for key in ("candidate", "original", "trained")}
            marked = copied(candidate)
            marked.metadata_props.add(key=TRAINABLE, value="\n".join(names))
            save(marked, Path(paths["candidate"]), external=False)
            save(original, Path(paths["original"]), external=False)
            if self.function is not None:
                given = self.function(paths["candidate"], paths["original"], seconds)
            else:
                _run([_filled(word, {**paths, "seconds": f"{seconds:.0f}"}) for word in self.command], seconds)
                given = paths["trained"]
            return self._checked(arrays(self._model(given)), arrays(candidate), names)

    def _model(self, given: Any) -> ModelProto:
        if isinstance(given, ModelProto):
            return given
        if not isinstance(given, (str, os.PathLike)):
            raise self._wrong(f"must return the path of a trained model or an onnx.ModelProto, not {_kind(given)}")
        try:
            return load(Path(given)).model
        except ModelError as error:
            raise self._wrong(f"gave no trained model: {error}") from error

    def _checked(
        self, after: Mapping[str, NDArray[Any]], before: Mapping[str, NDArray[Any]], names: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        trained = {}
        for name in names:
            if name not in after:
                raise self._wrong(f"gave a model without the initializer '{name}'; the names must stay as they are")
            own, wanted = after[name], before[name]
            if own.shape != wanted.shape or own.dtype.kind != "f":
                raise self._wrong(
                    f"gave '{name}' as {own.dtype} of shape {list(own.shape)}; it must stay {wanted.dtype} of shape "
                    f"{list(wanted.shape)}"
                )
            with np.errstate(over="ignore"):  # what float16 does not hold is infinite
                trained[name] = np.array(own, wanted.dtype)
            if not np.isfinite(trained[name]).all():
                raise self._wrong(f"gave '{name}' with values that are not finite in {wanted.dtype}")
        for name in sorted(before.keys() & after.keys() - set(names)):
            wanted = before[name]
            if not np.array_equal(after[name].astype(wanted.dtype), wanted, equal_nan=wanted.dtype.kind == "f"):
                raise self._wrong(f"changed '{name}', which is not among the initializers in '{TRAINABLE}'")
        return trained

    def _wrong(self, what: str) -> TrainingError:
        if self.function is None:
            return TrainingError(f"{self.name}: {what}")
        error = self.function.wrong(what)
        assert isinstance(error, TrainingError)
        return error


def load_external(trainer: str) -> External | None:
    """The training loop that `--trainer` names; None for one of the project's own.

    Raises:
        TrainingError: a file or function that is missing, or a program that is not found.
    """
    if is_command(trainer):
        try:
            words = shlex.split(trainer.removeprefix(COMMAND))
        except ValueError as error:
            raise TrainingError(f"trainer '{trainer}' cannot be split into words: {error}") from error
        if shutil.which(words[0]) is None:
            raise TrainingError(f"trainer '{trainer}': there is no program '{words[0]}'")
        return External(trainer, command=tuple(words))
    if is_function(trainer):
        return External(trainer, load_function(trainer, Path("."), TrainingError))
    return None


def _filled(word: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        word = word.replace(f"{{{key}}}", value)
    return word


def _kind(value: Any) -> str:
    return type(value).__name__


def _run(words: Sequence[str], seconds: float) -> None:
    """Run a command in a process group of its own, its output on standard error; nothing of it outlives this."""
    limit = seconds + max(GRACE, GRACE_SHARE * seconds)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            raise TrainingError(f"{shlex.join(words)}: was stopped after {limit:.0f} s, it had {seconds:.0f}") from None
        except BaseException:  # an interrupt, above all: the command has not heard of it
            _end(process)
            raise
    if code != 0:
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise TrainingError(f"{shlex.join(words)}: failed with {how}; what it says stands above")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then kill it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
