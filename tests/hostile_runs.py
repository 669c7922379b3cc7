"""Runs of the command in forks of one process that has imported everything: outcome, seconds and memory of each.

A file that ends the process, hangs or takes all memory is found out about without harm to the tests. Started as a
script it reads requests, one JSON object a line, and answers each with one.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
SECONDS = 12  # after which a run counts as hung
ADDRESS_SPACE = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code; negative for the signal that ended it, as in `subprocess`.
        out: standard output.
        err: standard error.
        seconds: wall time.
        grown: MiB of memory above what the imports take.
    """

    code: int
    out: str
    err: str
    seconds: float
    grown: float

    @property
    def line(self) -> str:
        """The one line on standard error, after checking that it is one, and no confession."""
        assert self.code in (1, 2), (self.code, self.err)
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("onnxneutrino: "), self.err
        assert "internal error" not in self.err
        assert self.out == ""
        return self.err


class Runs:
    """The process that forks; `runs(folder, *arguments)` is one run of the command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, folder: Path, *arguments: str, file_size: int | None = None) -> Outcome:
        """Run `onnxneutrino` with these arguments in a folder; no file may grow beyond `file_size` bytes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"folder": str(folder), "arguments": arguments, "file_size": file_size}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)
        self._process.stdout.close()


def _answered(request: dict[str, Any], base: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _run(request)
        _, status, usage = os.wait4(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts[0],
        "err": texts[1],
        "seconds": time.perf_counter() - start,
        "grown": usage.ru_maxrss / 1024 - base,
    }


def _run(request: dict[str, Any]) -> None:
    from onnxneutrino.cli import main

    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    code = 70
    try:
        os.chdir(request["folder"])
        sys.argv[:] = ["onnxneutrino", *request["arguments"]]
        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 70
    except BaseException as error:
        print(f"uncaught {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _main() -> None:
    """Import what a run imports, and answer."""
    sys.path[:] = [entry for entry in sys.path if not (Path(entry or ".") / "onnxneutrino").is_dir()]
    import warnings

    warnings.simplefilter("default")
    import onnxruntime  # noqa: F401

    from onnxneutrino import console, delivery, inspection, replay  # noqa: F401

    with open("/proc/self/statm", encoding="ascii") as file:
        base = int(file.read().split()[1]) * resource.getpagesize() / MEBIBYTE
    for line in sys.stdin:
        print(json.dumps(_answered(json.loads(line), base)), flush=True)


if __name__ == "__main__":
    _main()
