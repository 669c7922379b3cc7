"""Data, TOML files and reports made to harm: one line, seconds, and no more memory than the file is worth."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hostile_runs import MEBIBYTE, Runs
from onnx import numpy_helper, parser
from PIL import Image

ALLOWANCE, SECONDS = 64, 10.0
IMAGES = np.random.default_rng(1).integers(0, 256, (32, 6, 6), np.uint8)
GOOD: dict[str, Any] = {"x_train": IMAGES, "y_train": np.arange(32) % 4, "x_test": IMAGES, "y_test": np.arange(32) % 4}


def entry(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def header(text: str, version: int = 1, length: int | None = None) -> bytes:
    """The head of an array; `length` is what it says about itself."""
    code = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack(code, length or len(text)) + text.encode("latin1")


def shaped(shape: str, descr: str = "'|u1'") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")


def archive(content: bytes, kind: int = zipfile.ZIP_STORED, name: str = "x_train.npy") -> bytes:
    """An .npz file in which one member has other content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind, compresslevel=6) as made:
        made.writestr(name, content)
        for own, array in GOOD.items():
            if f"{own}.npy" != name:
                made.writestr(f"{own}.npy", entry(array))
    return file.getvalue()


def patched(content: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Bytes replaced in the central directory's first entry."""
    start = content.find(b"PK\1\2")
    for offset, new in changes:
        content = content[: start + offset] + new + content[start + offset + len(new) :]
    return content


PLAIN = archive(entry(IMAGES))
DEFLATED = zipfile.ZIP_DEFLATED
NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "inflates": (
        lambda: archive(shaped(f"({2**25}, 3, 3)") + bytes(9 * 2**25), DEFLATED),
        "would inflate from",
    ),
    "size that lies": (lambda: patched(archive(entry(IMAGES), DEFLATED), (24, b"\xff\xff\xff\x7f")), "x_train"),
    "pickled": (lambda: archive(entry(np.array([{1: 2}] * 32, object))), "'x_train' is pickled"),
    "structured": (lambda: archive(entry(np.zeros(32, [("a", "f4"), ("b", "i4")]))), "does not fit the input"),
    "dates": (lambda: archive(entry(np.zeros((32, 6, 6), "M8[s]"))), "does not fit the input"),
    "no bytes": (lambda: archive(shaped(f"({2**50}, 6, 6)", "'|V0'")), "x_train"),
    "2^62 images": (lambda: archive(shaped(f"({2**62}, 6, 6)")), "takes 166"),
    "a billion images": (lambda: archive(shaped(f"({10**9}, 6, 6)"), DEFLATED), "bytes and has 0"),
    "many digits": (lambda: archive(shaped(f"({'9' * 4000}, 6, 6)")), "'x_train'"),
    "negative": (lambda: archive(shaped("(-32, 6, 6)") + bytes(1152)), "'x_train' of shape"),
    "negative twice": (lambda: archive(shaped("(-32, -6, 6)") + bytes(1152)), "'x_train' of shape"),
    "into the next array": (lambda: archive(shaped("(64, 6, 6)") + bytes(1152)), "takes 2304 bytes and has 1152"),
    "too long": (lambda: archive(shaped("(32, 6, 6)") + bytes(1153)), "takes 1152 bytes and has 1153"),
    "hundred axes": (lambda: archive(shaped(repr((1,) * 100)) + b"0"), "'x_train' cannot be read"),
    "long header": (lambda: archive(header(" " * 50_000_000, 2), DEFLATED), "'x_train' cannot be read"),
    "length of the header": (lambda: archive(header("{", 2, 2**32 - 1)), "'x_train' cannot be read"),
    "brackets": (lambda: archive(header("(" * 9000)), "'x_train' cannot be read"),
    "signs": (lambda: archive(header("-" * 9000 + "1")), "'x_train' cannot be read"),
    "code": (lambda: archive(shaped("__import__('os').system('touch pwned')")), "malformed node"),
    "shape of one number": (lambda: archive(shaped("7")), "shape is not valid"),
    "version": (lambda: archive(b"\x93NUMPY\x09\x00" + bytes(50)), "'x_train' cannot be read"),
    "no array": (lambda: archive(b"hello"), "'x_train' cannot be read"),
    "empty member": (lambda: archive(b""), "'x_train' cannot be read"),
    "checksum": (lambda: patched(PLAIN, (16, b"\0\0\0\0")), "Bad CRC-32"),
    "encrypted": (lambda: patched(PLAIN, (8, b"\1\0")), "is damaged"),
    "method": (lambda: patched(PLAIN, (10, b"\x61\0")), "is damaged"),
    "place in the file": (lambda: patched(PLAIN, (42, b"\xf0\xff\xff\xff")), "is damaged"),
    "cut short": (lambda: PLAIN[:-200], "not an .npz file"),
    "empty": (lambda: b"", "not an .npz file"),
}
SOUND: dict[str, Callable[[], bytes]] = {
    "Fortran order": lambda: archive(entry(np.asfortranarray(IMAGES)), DEFLATED),
    "big-endian": lambda: archive(entry(IMAGES.astype(">i4"))),
    "paths of members": lambda: archive(entry(IMAGES), name="../../x_train.npy"),
    "LZMA": lambda: archive(entry(IMAGES), zipfile.ZIP_LZMA),
    "white images": lambda: archive(entry(np.full((32, 6, 6), 255, np.uint8)), DEFLATED),
}
TOML: dict[str, tuple[bytes, str]] = {
    "table": (b"[evil]\na = 1", "unknown entry 'evil'"),
    "key": (b'[data]\n"a\\u0000\\u001b[31m" = 1', "unknown key 'a??[31m'"),
    "type": (b"[data]\npath = 3", "path must be a string"),
    "NaN": (b"[data]\nscale = nan", "scale must be a number"),
    "infinity": (b"[compress]\ndelta = inf", "delta must be a number"),
    "date": (b"[compress]\ndelta = 2020-01-01", "delta must be a number"),
    "large number": (b"[data]\nscale = " + b"9" * 400, "scale int too large"),
    "many digits": (b"[compress]\nseed = " + b"9" * 5000, "cannot be read as TOML"),
    "twice": (b"[data]\nscale = 1\nscale = 2", "cannot be read as TOML"),
    "brackets": (b"a = " + b"[" * 5000 + b"]" * 5000, "cannot be read as TOML"),
    "no text": (b"\xff\xfe[data]", "cannot be read as TOML"),
    "threads": (b"[compress]\nthreads = 100000", "threads must be at most 1024"),
    "path with a zero byte": (b'[data]\npath = "a\\u0000.npz"', "a?.npz: not found"),
    "long path": (b'[data]\npath = "' + b"a" * 5000 + b'"', "onnxneutrino: aaaa"),
    "path of nobody": (b'[data]\npath = "~nobody-at-all/a.npz"', "not found"),
    "metric of nobody": (b'[data]\npath = "data.npz"\n[metric]\nname = "~nobody-at-all/a.py:f"', "not found"),
    "scale beyond float32": (b'[data]\npath = "data.npz"\nscale = 1e300', "values beyond float32"),
}
REPORTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "list": (b"[]", "'report' must be an object"),
    "NaN": (b"NaN", "'report' must be an object"),
    "brackets": (b"[" * 100_000, "is not JSON"),
    "many digits": (b"9" * 6000, "is not JSON"),
    "key": (b'{"a\\u001b": 1}', "unknown key 'report.a?'"),
    "no text": (b"\xff\xfe", "cannot be read as a report"),
}


def png(width: int, height: int, pixels: bytes, extra: tuple[bytes, bytes] | None = None) -> bytes:
    """A grey PNG file that says it has this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    more = b"" if extra is None else chunk(*extra)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "billions of pixels": (lambda: png(100_000, 100_000, bytes(1000)), "has more than 89478485 pixels"),
    "more than is safe": (lambda: png(12_000, 12_000, bytes(1000)), "has more than 89478485 pixels"),
    "text that inflates": (
        lambda: png(6, 6, bytes(42), (b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))),
        "cannot be read as an image",
    ),
    "cut short": (lambda: png(6, 6, bytes(42))[:-30], "cannot be read as an image"),
    "empty": (lambda: b"", "cannot be read as an image"),
    "a program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", "cannot be read as an image"),
    "directory of a TIFF": (lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200, "cannot be read as an image"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one grey 6×6 input, and sound data."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 1, 6, 6] x) => (float[N, 4] y) '
        "{ f = Flatten (x)\n y = Gemm (f, w) }"
    )
    weights = np.random.default_rng(0).standard_normal((36, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "in.onnx")
    (tmp_path / "data.npz").write_bytes(PLAIN)
    return tmp_path


def refused(runs: Runs, folder: Path, words: str, *arguments: str, size: int = 0) -> None:
    outcome = runs(folder, *arguments, "--threads", "1")
    assert words in outcome.line
    assert outcome.seconds < SECONDS
    assert outcome.grown < ALLOWANCE + 4 * size / MEBIBYTE


@pytest.mark.parametrize("name", NPZ)
def test_npz(runs: Runs, folder: Path, name: str) -> None:
    make, words = NPZ[name]
    content = make()
    (folder / "data.npz").write_bytes(content)
    refused(runs, folder, words, "evaluate", "in.onnx", "--data", "data.npz", size=len(content))
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("name", SOUND)
def test_unusual_archives_are_read(runs: Runs, folder: Path, name: str) -> None:
    (folder / "data.npz").write_bytes(SOUND[name]())
    outcome = runs(folder, "evaluate", "in.onnx", "--data", "data.npz", "--threads", "1")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("name", TOML)
def test_toml(runs: Runs, folder: Path, name: str) -> None:
    content, words = TOML[name]
    (folder / "in.toml").write_bytes(content)
    outcome = runs(folder, "evaluate", "in.onnx")
    assert words in outcome.line
    assert outcome.seconds < SECONDS


@pytest.mark.parametrize("name", REPORTS)
def test_report(runs: Runs, folder: Path, name: str) -> None:
    content, words = REPORTS[name]
    (folder / "old.json").write_bytes(content)
    refused(runs, folder, words, "compress", "in.onnx", "out.onnx", "--replay", "old.json")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(runs: Runs, folder: Path, name: str) -> None:
    make, words = PICTURES[name]
    pictures(folder)
    (folder / "images/test/a/0.png").write_bytes(make())
    refused(runs, folder, words, "evaluate", "in.onnx", "--data", "images")


def pictures(folder: Path) -> None:
    for index, image in enumerate(IMAGES[:16]):
        place = folder / "images" / ("train", "test")[index % 2] / "abcd"[index // 4]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")


def test_what_is_no_file_is_not_read(runs: Runs, folder: Path) -> None:
    pictures(folder)
    os.mkfifo(folder / "pipe.npz")
    refused(runs, folder, "is a device or pipe", "evaluate", "in.onnx", "--data", "pipe.npz")
    refused(runs, folder, "device or pipe", "compress", "in.onnx", "out.onnx", "--replay", "pipe.npz")
    for name, make in (("pipe", os.mkfifo), ("loop", lambda path: path.symlink_to(path.name))):
        picture = folder / f"images/test/a/{name}.png"
        make(picture)
        refused(runs, folder, f"{name}.png: is no file", "evaluate", "in.onnx", "--data", "images")
        picture.unlink()


def test_code_is_run_only_where_a_python_file_is_named(runs: Runs, folder: Path) -> None:
    (folder / "evil.py").write_text("open('pwned', 'w').close()\ndef f(): ...\n", encoding="utf-8")
    for name in ("evil.npz", "evil"):
        (folder / name).write_text("open('pwned', 'w')", encoding="utf-8")
        runs(folder, "evaluate", "in.onnx", "--data", name)
        runs(folder, "evaluate", "in.onnx", "--data", f"{name}:f")
        assert not (folder / "pwned").exists()
    (folder / "in.toml").write_text('[data]\npath = "evil.py:f"\n', encoding="utf-8")
    assert "f returned NoneType" in runs(folder, "evaluate", "in.onnx").line
    assert (folder / "pwned").exists()
