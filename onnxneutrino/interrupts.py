"""Ctrl-C and SIGTERM: the run ends within two seconds wherever it is, and says how to go on.

The first signal raises KeyboardInterrupt in the main thread. Two things can stop that: the thread is in a long call
outside Python (a decomposition, a run of the network), or the exception is raised where it cannot go on (in a
destructor, in a bare `except` of a library). So a second thread, which the signal wakes through a pipe, ends the
process after a grace time, and `check` raises once more at the next look at the clock.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

GRACE = 1.5  # seconds
EXIT_CODE = 1
NOTHING = "nothing was written"
STOPPED = b"\0"  # a number that no signal has
SHOW_CURSOR = "\x1b[?25h"  # a live view hides it

_asked = threading.Event()
_told = threading.Lock()  # held for good by who says the last words
_last_words = NOTHING


def check() -> None:
    """Raise KeyboardInterrupt where the user has asked for an end and the run still goes on."""
    if _asked.is_set():
        raise KeyboardInterrupt


def leave(words: str = NOTHING) -> None:
    """Say what to do after an interrupt, for `tell`."""
    global _last_words
    _last_words = words


def left() -> str:
    """What was left to be said; empty for nothing."""
    return "" if _last_words == NOTHING else _last_words


def tell() -> None:
    """Write the one line about an interrupt to standard error, once in a process."""
    if not _asked.is_set() or _told.acquire(blocking=False):
        sys.stderr.write(f"onnxneutrino: interrupted; {_last_words}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Take SIGINT and SIGTERM within; a signal that is ignored stays so. For the main thread of a command alone."""
    taken = [own for own in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(own) != signal.SIG_IGN]
    leave()
    if threading.current_thread() is not threading.main_thread() or not taken:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {own: signal.signal(own, _raise) for own in taken}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, frozenset(taken)), daemon=True)
    watch.start()
    try:
        yield
    finally:
        # Where an end was asked for, it is watched until the process is gone: its threads may be in long calls.
        if not _asked.is_set():
            for own, handler in before.items():
                signal.signal(own, handler)
            signal.set_wakeup_fd(woken)
            os.write(writer, STOPPED)
            watch.join()
            os.close(reader)
            os.close(writer)


def _raise(number: int, frame: object) -> None:
    _asked.set()
    raise KeyboardInterrupt


def _watch(reader: int, numbers: frozenset[int]) -> None:
    """End the process a grace time after the first of these signals, or at the second."""
    while (first := os.read(reader, 1)) != STOPPED:
        if first[0] in numbers:
            break
    else:
        return
    _asked.set()
    select.select([reader], [], [], GRACE)
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
    tell()
    os._exit(EXIT_CODE)
