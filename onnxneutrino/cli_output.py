"""How every command ends: its result on standard output or as JSON, an error as one line and an exit code.

What takes long to import is imported inside the functions, as in `cli.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from onnxneutrino import interrupts
from onnxneutrino.errors import NeutrinoError, OutputError, UsageError

PIPE_WIDTH = 240
ERROR_TEXT = 240
LONGEST_LINE = 2000


def messages() -> contextlib.AbstractContextManager[Any]:
    """What a user's own loader or metric prints goes to standard error: standard output holds results."""
    return contextlib.redirect_stdout(sys.stderr)


def show(renderable: Any, json_file: str | None) -> None:
    """Print a table, unless standard output carries JSON; not on a terminal it is never cut or wrapped."""
    from rich.console import Console

    if json_file == "-":
        return
    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    console = Console(highlight=False, width=PIPE_WIDTH)
    with console.capture() as shown:
        console.print(renderable)
    click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))


def emit(json_file: str | None, text: str) -> None:
    """Write JSON where it was asked for."""
    if json_file == "-":
        click.echo(text, nl=False)
    elif json_file is not None:
        try:
            Path(json_file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{json_file}: cannot be written: {error.strerror or error}") from error


def as_json(value: Any) -> str:
    """JSON with a line feed at the end; NaN as null."""
    from onnxneutrino.json_values import plain

    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


def check_json(json_file: str | None) -> None:
    """Find out before the work whether the JSON file can be written; devices and pipes can."""
    from onnxneutrino.storage import check_writable

    if json_file not in (None, "-") and (not Path(json_file).exists() or Path(json_file).is_dir()):
        check_writable(Path(json_file))


def one_line(error: object) -> str:
    """What an error says, on one line: names out of a file may hold line feeds, escape sequences or a megabyte."""
    text = " ".join(str(error).split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]} ..."


def _onward() -> str:
    """How to go on after an error, where there is something to go on from."""
    how = interrupts.left()
    return f"; {how}" if how else ""


def run(work: Callable[[], None], json_file: str | None, debug: bool) -> None:
    """Do the work; an error becomes one line and its exit code, a traceback only with --debug."""
    try:
        with interrupts.handled():
            check_json(json_file)
            work()
    except BrokenPipeError:
        raise  # the reader of standard output has gone, such as `| head`: click ends quietly
    except NeutrinoError as error:
        if debug:
            raise
        onward = "" if isinstance(error, UsageError) else _onward()
        click.echo(f"onnxneutrino: {one_line(error)}{onward}", err=True)
        sys.exit(error.exit_code)
    except MemoryError as error:
        if debug:
            raise
        what = "give a smaller --input-shape or smaller data, or use a machine with more"
        click.echo(f"onnxneutrino: not enough memory ({one_line(error) or 'no size is known'}); {what}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if debug:
            raise
        interrupts.tell()
        sys.exit(1)
    except OSError as error:  # of the system: a full disk under TMPDIR, a name that is too long, too many open files
        if debug:
            raise
        place = error.filename
        if place is None and error.errno == errno.ENOSPC:
            place = f"{tempfile.gettempdir()}, or where the output goes"
        where = f"{place}: " if place is not None else ""
        click.echo(f"onnxneutrino: {one_line(where + (error.strerror or str(error)))}{_onward()}", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        line = one_line(error)[:ERROR_TEXT]
        click.echo(f"onnxneutrino: internal error, {type(error).__name__}: {line}; run again with --debug", err=True)
        sys.exit(1)
