"""A function in the user's own file, `file.py:function`: how it is found, and where it failed."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxneutrino.errors import NeutrinoError


@dataclass(frozen=True, eq=False)
class UserFunction:
    """A function of the user, the file it is from, and the error to raise where it fails."""

    path: Path
    name: str
    function: Callable[..., Any]
    error: type[NeutrinoError]

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            NeutrinoError: the function raised; the line names file and line.
        """
        try:
            return self.function(*arguments)
        except (Exception, SystemExit) as error:  # a script's sys.exit must not end the run in silence
            raise self.failure(error) from error

    def failure(self, error: BaseException) -> NeutrinoError:
        """Return the one line for an exception out of the user's code."""
        line = _line(error, self.path)
        place = self.place if line is None else f"{self.path}, line {line}"
        return self.error(f"{place}: {self.name} failed with {describe(error)}")

    def returned(self, what: str, expected: str) -> NeutrinoError:
        """Return the one line for a result of the wrong kind; it names the line where the function begins."""
        return self.error(f"{self.place}: {self.name} returned {what}; {expected}")

    @property
    def place(self) -> str:
        """The file, and the line where the function begins, if that is where it is written."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        if code is None or Path(code.co_filename).resolve() != self.path.resolve():
            return str(self.path)
        return f"{self.path}, line {code.co_firstlineno}"

    def wrong(self, what: str) -> NeutrinoError:
        """Return the one line for what the function gave back, such as "must return a number, not None"."""
        try:
            place = f"{self.path}, line {inspect.getsourcelines(self.function)[1]}"
        except (OSError, TypeError):  # an object that can be called has no line of its own
            place = str(self.path)
        return self.error(f"{place}: {self.name} {what}")


def is_function(reference: str) -> bool:
    """Whether `reference` has the form `file.py:function`."""
    file, _, name = reference.rpartition(":")
    return file.endswith(".py") and name != ""


def load_function(reference: str, base: Path, error: type[NeutrinoError]) -> UserFunction:
    """Load `file.py:function`; a relative file starts from `base`.

    Raises:
        NeutrinoError: of the type `error`, for a file or function that is missing or cannot be imported.
    """
    file, _, name = reference.rpartition(":")
    path = base / os.path.expanduser(file)  # `Path.expanduser` raises where there is no such user
    if not os.path.isfile(path):
        raise error(f"{path}: not found; '{reference}' must name a Python file and a function in it")
    module_name = f"onnxneutrino_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise error(f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    # As for a script: its folder can be imported from. Dataclasses look their module up in sys.modules.
    sys.modules[module_name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as problem:
        raise error(f"{path}, line {problem.lineno}: {problem.msg}") from problem
    except (Exception, SystemExit) as problem:
        line = _line(problem, path)
        place = path if line is None else f"{path}, line {line}"
        raise error(f"{place}: cannot be imported, {describe(problem)}") from problem
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{path}: has no function '{name}' (it has {', '.join(known) or 'none'})")
    return UserFunction(path, name, function, error)


def describe(error: BaseException) -> str:
    """Write an exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of a file that an exception went through; None where it did not, as for a wrong call."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    return frames[-1].lineno if frames else None
