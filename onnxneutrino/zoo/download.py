"""A file from the network, whole or not at all: streamed beside its place, its checksum compared, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnxneutrino.errors import DataError, OutputError, UsageError

BLOCK = 1 << 18
TIMEOUT = 30.0
SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class File:
    """A file that a data set consists of: its name, the MD5 in hexadecimal digits that its source states, its size."""

    name: str
    md5: str
    size_bytes: int


def checked_base(url: str) -> str:
    """The address that file names are put behind.

    Raises:
        UsageError: not http or https.
    """
    if not url.startswith(SCHEMES):
        raise UsageError(f"--url {url}: must begin with http:// or https://; a folder is given with --data")
    return url.rstrip("/") + "/"


def obtained(
    base: str, file: File, folder: Path, tell: Callable[[int], None] = lambda done: None, timeout: float = TIMEOUT
) -> Path:
    """The file in `folder`: as it lies there, else downloaded.

    Args:
        base: address that ends with a slash; the file's name is put behind it.
        file: what it must be.
        folder: where it goes, and where one is taken that was put there by hand.
        tell: called with the number of bytes that have come.
        timeout: seconds for the connection, and for each wait for more.

    Raises:
        DataError: no network, refused, cut or altered; or a file of this name that is another.
        OutputError: it cannot be written. Nothing is left behind then, either.
    """
    path = folder / file.name
    if path.exists():
        found = _digest(path)
        if found != file.md5:
            raise DataError(f"{path}: is not the file it should be (MD5 {found}, not {file.md5}); remove it")
        return path
    url = base + file.name
    digest = hashlib.md5(usedforsecurity=False)
    with pending(path) as target:
        done = 0
        for block in _blocks(url, path, timeout):
            done += len(block)
            if done > file.size_bytes:
                raise _failed(url, path, f"it is larger than {file.size_bytes} bytes")
            digest.update(block)
            target.write(block)
            tell(done)
        if done < file.size_bytes:
            raise _failed(url, path, f"it ends after {done} of {file.size_bytes} bytes")
        if digest.hexdigest() != file.md5:
            raise _failed(url, path, f"it was altered (MD5 {digest.hexdigest()}, not {file.md5})")
    return path


def _blocks(url: str, path: Path, timeout: float) -> Iterator[bytes]:
    """What the server sends; every way in which that fails is one line."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            while block := response.read(BLOCK):
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        raise _failed(url, path, f"the server answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _failed(url, path, f"nothing came for {timeout:g} s") from error
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        raise _failed(url, path, f"nothing came for {timeout:g} s" if late else _words(error.reason)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed(url, path, _words(error)) from error


def _words(reason: object) -> str:
    """An error of the network in its own words, on one line."""
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return " ".join(text.split()) or type(reason).__name__


def _failed(url: str, path: Path, what: str) -> DataError:
    return DataError(
        f"{url}: cannot be downloaded: {what}; try again, name a mirror with --url, put the file at {path} by hand, "
        "or use data of your own with --data"
    )


def _digest(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


@contextlib.contextmanager
def pending(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to be written, which takes its place when all is well and is gone otherwise.

    Raises:
        OutputError: the disk or the system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
