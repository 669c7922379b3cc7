"""`zoo fetch`: official files from a server on this machine, every way in which that fails, and data of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import re
import resource
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from onnxneutrino.cli import main
from onnxneutrino.config import load_config
from onnxneutrino.data_npz import read_npz
from onnxneutrino.errors import DataError, ModelError, OutputError
from onnxneutrino.formats import format_bytes
from onnxneutrino.inspection import evaluate
from onnxneutrino.zoo import recipes
from onnxneutrino.zoo.archives import read_cifar
from onnxneutrino.zoo.datasets import DATA_SOURCES
from onnxneutrino.zoo.download import File, obtained
from onnxneutrino.zoo.fetch import fetch
from onnxneutrino.zoo.recipes import RECIPES, Recipe, find

COUNTS = {"train": 25, "test": 10}


def images(name: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Drawn images `(N, H, W[, C])` and labels of a data set."""
    random = np.random.default_rng([len(name), len(split)])
    source = next(own for own in DATA_SOURCES if own.name == name)
    assert source.image is not None
    channels, *size = source.image
    shape = (COUNTS[split], *size) if channels == 1 else (COUNTS[split], *size, channels)
    labels = random.integers(0, source.classes, COUNTS[split])
    return random.integers(0, 256, shape).astype(np.uint8), labels.astype(np.uint8)


def idx(array: NDArray[np.uint8]) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


def records(x: NDArray[np.uint8], y: NDArray[np.uint8], coarse: bool) -> bytes:
    pixels = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    columns = [np.zeros_like(y), y] if coarse else [y]
    return np.concatenate([np.stack(columns, axis=1), pixels], axis=1).astype(np.uint8).tobytes()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def cifar10_members() -> dict[str, bytes]:
    (x, y), test = images("cifar10", "train"), images("cifar10", "test")
    parts = {f"data_batch_{n + 1}.bin": records(x[5 * n : 5 * n + 5], y[5 * n : 5 * n + 5], False) for n in range(5)}
    own = {"readme.html": b"<p>", **parts, "test_batch.bin": records(*test, False)}
    return {f"cifar-10-batches-bin/{name}": data for name, data in own.items()}


def official(name: str) -> dict[str, bytes]:
    """Small files in the official formats, by name."""
    if name == "mnist":
        made = {}
        for split, part in (("train", "train"), ("test", "t10k")):
            x, y = images(name, split)
            made[f"{part}-images-idx3-ubyte.gz"], made[f"{part}-labels-idx1-ubyte.gz"] = idx(x), idx(y)
        return made
    if name == "cifar10":
        return {"cifar-10-binary.tar.gz": tarred(cifar10_members())}
    members = {f"cifar-100-binary/{split}.bin": records(*images(name, split), True) for split in COUNTS}
    return {"cifar-100-binary.tar.gz": tarred({"cifar-100-binary/fine_label_names.txt": b"apple\n", **members})}


def with_files(recipe: Recipe, files: dict[str, bytes]) -> Recipe:
    """The recipe with the checksums of these files."""
    stated = tuple(File(own.name, md5(files[own.name]), len(files[own.name])) for own in recipe.data.files)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, files=stated))


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `answers` replaces the usual answer for a name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[Handler, bytes], None]] = {}
        self.asked: list[str] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        self.server.asked.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        self.server.answers.get(name, whole)(self, self.server.files[name])

    def log_message(self, *_: Any) -> None:
        pass

    def head(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def whole(handler: Handler, data: bytes) -> None:
    handler.head(len(data))
    handler.wfile.write(data)


def cut(handler: Handler, data: bytes) -> None:
    handler.head(len(data))
    handler.wfile.write(data[: len(data) // 2])


def altered(handler: Handler, data: bytes) -> None:
    whole(handler, data[:-1] + bytes([data[-1] ^ 1]))


def longer(handler: Handler, data: bytes) -> None:
    whole(handler, data + b"more")


def broken(handler: Handler, data: bytes) -> None:
    handler.send_error(500)


def hanging(handler: Handler, data: bytes) -> None:
    handler.head(len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.server.over.wait(20)


def silent(handler: Handler, data: bytes) -> None:
    handler.server.over.wait(20)


@pytest.fixture
def server() -> Iterator[Server]:
    own = Server()
    thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield own
    own.over.set()
    own.shutdown()
    thread.join()
    own.server_close()


@pytest.fixture
def recipe(server: Server) -> Recipe:
    """A small network on CIFAR-10, served whole."""
    server.files = official("cifar10")
    return with_files(find("mlp-cifar10"), server.files)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_official_files(name: str, server: Server, tmp_path: Path) -> None:
    server.files = official(name)
    recipe = with_files(find(f"lenet5-{name}"), server.files)
    folder = tmp_path / "new" / "folder"
    told: list[str] = []
    found = fetch(recipe, folder, url=server.url, tell=told.append)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.toml", f"{name}.npz"}
    assert server.asked == [file.name for file in recipe.data.files]
    assert (found.data, found.input, found.classes, found.kept) == (
        f"{name}.npz",
        recipe.data.image,
        recipe.data.classes,
        (),
    )
    arrays = read_npz(folder / f"{name}.npz")
    with zipfile.ZipFile(folder / f"{name}.npz") as stored:  # uncompressed: a large one is mapped into memory
        assert {info.compress_type for info in stored.infolist()} == {zipfile.ZIP_STORED}
    for split in COUNTS:
        x, y = images(name, split)
        assert np.array_equal(arrays[f"x_{split}"], x)
        assert np.array_equal(arrays[f"y_{split}"], y)
        assert arrays[f"x_{split}"].dtype == np.uint8
    assert onnx.load(folder / "model.onnx").graph.name == recipe.name
    for file in recipe.data.files:
        assert f"{file.name}, {format_bytes(file.size_bytes)} of {format_bytes(file.size_bytes)}" in told
    path = folder / "model.onnx"
    assert evaluate(path, load_config(path, {"threads": 1})).examples == COUNTS["test"]


def test_a_second_fetch_takes_what_is_there(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    fetch(recipe, folder, url=server.url)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert fetch(recipe, folder, url=server.url, seed=1).kept == ("model.onnx", "model.toml")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "model.onnx").unlink()
    assert fetch(recipe, folder, url=server.url, seed=1).kept == ("model.toml",)
    assert (folder / "model.onnx").read_bytes() != before[folder / "model.onnx"]
    assert len(server.asked) == 1


def test_a_file_that_was_put_there_by_hand_is_used_and_stays(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    [(name, data)] = server.files.items()
    (tmp_path / name).write_bytes(data)
    fetch(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.toml", "cifar10.npz", name}
    assert server.asked == []


def test_another_file_of_that_name_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / recipe.data.files[0].name
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=f"{path}: is not the file it should be .*; remove it"):
        fetch(recipe, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (cut, r"it ends after \d+ of \d+ bytes"),
        (altered, r"it was altered \(MD5 [0-9a-f]{32}, not [0-9a-f]{32}\)"),
        (longer, r"it is larger than \d+ bytes"),
        (broken, "the server answers 500 Internal Server Error"),
        (hanging, r"nothing came for 0\.3 s"),
        (silent, r"nothing came for 0\.3 s"),
        (None, "the server answers 404 Not Found"),
    ],
    ids=["cut", "altered", "longer", "500", "hanging midway", "silent", "404"],
)
@pytest.mark.parametrize("new", [True, False], ids=["new folder", "folder with a file"])
def test_a_failed_download_leaves_nothing(
    answer: Callable[[Handler, bytes], None] | None,
    says: str,
    new: bool,
    recipe: Recipe,
    server: Server,
    tmp_path: Path,
) -> None:
    [name] = server.files
    if answer is None:
        server.files = {}
    else:
        server.answers[name] = answer
    folder = tmp_path / "net"
    if not new:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    with pytest.raises(DataError) as caught:
        fetch(recipe, folder, url=server.url, timeout=0.3)
    what = (
        f"{server.url}/{name}: cannot be downloaded: (.*); try again, name a mirror with --url, put the file at "
        f"{folder / name} by hand, or use data of your own with --data"
    )
    assert_matches(str(caught.value), what, says)
    assert not folder.exists() if new else [path.name for path in folder.iterdir()] == ["mine.txt"]
    server.answers.clear()
    if answer is not None:
        fetch(recipe, folder, url=server.url)
        assert (folder / "cifar10.npz").exists()


def assert_matches(text: str, outer: str, inner: str) -> None:
    found = re.fullmatch(outer, text)
    assert found, text
    assert re.fullmatch(inner, found[1]), text


def test_no_server_and_no_network(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="cannot be downloaded: Connection refused; try again"):
        fetch(recipe, tmp_path / "net", url=f"http://127.0.0.1:{port}")

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DataError, match=r"tar\.gz: cannot be downloaded: Name or service not known; try again"):
        fetch(recipe, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar10.npz", "model.onnx"])
def test_a_full_disk(name: str, recipe: Recipe, server: Server, tmp_path: Path) -> None:
    archive = len(server.files["cifar-10-binary.tar.gz"])
    room = {"cifar-10-binary.tar.gz": archive // 2, "cifar10.npz": archive + 50, "model.onnx": 400_000}[name]
    folder = tmp_path / "net"
    with largest_file(room), pytest.raises(OutputError, match=f"{folder / name}: cannot be written: File too large"):
        fetch(recipe, folder, url=server.url)
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    before = {"cifar10.npz": {"cifar-10-binary.tar.gz"}, "model.onnx": {"cifar10.npz", "model.toml"}}
    assert left == before.get(name, set())
    fetch(recipe, folder, url=server.url)
    assert len(server.asked) == (2 if name == "cifar-10-binary.tar.gz" else 1)


def test_places_that_cannot_be_written(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        fetch(recipe, tmp_path / "file" / "net", url=server.url)
    (tmp_path / "net" / "model.onnx").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"model\.onnx: is a folder"):
        fetch(recipe, tmp_path / "net", url=server.url)
    assert server.asked == []


def test_an_interrupt_leaves_nothing(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        assert [path.name for path in tmp_path.iterdir()] != []  # the part that has come
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtained(f"{server.url}/", recipe.data.files[0], tmp_path, interrupt)
    assert not list(tmp_path.iterdir())


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in cifar10_members().items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (tarred(without("data_batch_3.bin")), "it has no member cifar-10-batches-bin/data_batch_3.bin"),
        (tarred({**cifar10_members(), "cifar-10-batches-bin/test_batch.bin": b"short"}), "test_batch.bin has 5 bytes"),
        (tarred({**cifar10_members(), "cifar-10-batches-bin/test_batch.bin": b"\x0b" + bytes(3072)}), "a label is 11"),
        (tarred(cifar10_members())[:-200], "cannot be read"),
        (b"not an archive", "not a gzip file"),
    ],
    ids=["member missing", "member short", "label too large", "cut", "no archive"],
)
def test_damaged_archives(content: bytes, says: str, tmp_path: Path) -> None:
    """As a mirror may hold them where its files are trusted: the checksums are those of the damaged file."""
    recipe = with_files(find("mlp-cifar10"), {"cifar-10-binary.tar.gz": content})
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=says):
        fetch(recipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_members_are_read_and_never_extracted(tmp_path: Path) -> None:
    """Names that lead elsewhere are passed over; a link in place of a member is no member."""
    outside = {"../evil": b"x", "/tmp/evil": b"x"}
    (tmp_path / "inside").mkdir()
    archive = tmp_path / "inside" / "cifar-10-binary.tar.gz"
    archive.write_bytes(tarred({**outside, **cifar10_members()}))
    splits = {"test": ["cifar-10-batches-bin/test_batch.bin"]}
    assert len(read_cifar(archive, splits, 1, 10)["test"][0]) == COUNTS["test"]
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "inside", archive]
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="it has no member"):
        read_cifar(archive, splits, 1, 10)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-images-idx3-ubyte.gz", idx(np.zeros((3, 27, 27), np.uint8)), "its head is that of other data"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(24, np.uint8)), "holds 24 labels for 25 images"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"\x00\x00\x08\x03"), "cannot be read"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 25)), "ends after 0 of 25"),
    ],
    ids=["size", "count", "head", "cut"],
)
def test_damaged_idx_files(name: str, content: bytes, says: str, server: Server, tmp_path: Path) -> None:
    server.files = {**official("mnist"), name: content}
    with pytest.raises(DataError, match=says):
        fetch(with_files(find("mlp-mnist"), server.files), tmp_path, url=server.url)
    assert not (tmp_path / "model.onnx").exists()
    assert not (tmp_path / "mnist.npz").exists()


def write_images(folder: Path, size: tuple[int, int] = (20, 24)) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog", "eel"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (*size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(("size", "wanted"), [(None, (3, 20, 24)), (16, (3, 16, 16))])
def test_own_images(size: int | None, wanted: tuple[int, int, int], tmp_path: Path) -> None:
    data = write_images(tmp_path / "pictures")
    found = fetch(find("resnet20-images"), tmp_path / "net", data=data, size=size)
    assert (found.input, found.classes) == (wanted, 3)
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"model.onnx", "model.toml"}
    path = tmp_path / "net" / "model.onnx"
    assert evaluate(path, load_config(path, {"threads": 1})).examples == 6


def test_own_arrays_in_place_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (x_train, y_train), (x_test, y_test) = images("cifar10", "train"), images("cifar10", "test")
    np.savez_compressed(tmp_path / 'my "data".npz', x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    monkeypatch.chdir(tmp_path)
    found = fetch(find("resnet20-cifar10"), tmp_path / "net", data=Path('my "data".npz'))
    assert found.data == str(tmp_path / 'my "data".npz')
    config = load_config(tmp_path / "net" / "model.onnx", {"threads": 1})
    assert (config.data.path, config.data.augment, config.metric) == (found.data, ("crop4", "hflip"), "top1")
    assert config.time_limit == 1800
    assert evaluate(tmp_path / "net" / "model.onnx", config).examples == COUNTS["test"]
    fetch(find("mlp-images"), tmp_path / "other", data=tmp_path / 'my "data".npz')


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_train": np.zeros((25, 28, 28, 3), np.uint8)}, "28x28x3.*do not fit the input 'input' of shape 3x32x32"),
        ({"y_train": np.full(25, 10)}, "label 10 at index 0 is out of range; the model has 10 classes"),
        ({"y_test": None}, "needs a label for each image: y_train and y_test, or folders of classes"),
        ({"x_test": None}, "has no array 'x_test'"),
    ],
    ids=["shape", "classes", "labels", "split"],
)
def test_own_arrays_that_do_not_fit(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    (x_train, y_train), (x_test, y_test) = images("cifar10", "train"), images("cifar10", "test")
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, **change}
    np.savez(tmp_path / "own.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=says):
        fetch(find("mlp-cifar10"), tmp_path / "net", data=tmp_path / "own.npz")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.full(25, 0.5), "labels have dtype float64; classification needs integers"),
        (np.full(25, -1), "label -1 at index 0 is out of range"),
        (np.zeros(25, np.int64), "has one class alone; a classifier tells two or more apart"),
        (np.ones((25, 32, 32), np.int64), "needs a label for each image"),
    ],
    ids=["floats", "negative", "one class", "maps"],
)
def test_labels_that_do_not_tell_classes(labels: NDArray[Any], says: str, tmp_path: Path) -> None:
    x, _ = images("cifar10", "train")
    np.savez(tmp_path / "own.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    with pytest.raises(DataError, match=says):
        fetch(find("mlp-images"), tmp_path / "net", data=tmp_path / "own.npz")
    assert not (tmp_path / "net").exists()


def test_another_model_in_the_folder_stays(tmp_path: Path) -> None:
    data = write_images(tmp_path / "pictures")
    fetch(find("resnet20-images"), tmp_path / "net", data=data)
    before = (tmp_path / "net" / "model.onnx").read_bytes()
    with pytest.raises(ModelError, match="is there already and is called 'resnet20-images', not vgg11-images"):
        fetch(find("vgg11-images"), tmp_path / "net", data=data)
    assert (tmp_path / "net" / "model.onnx").read_bytes() == before


def test_images_too_small_for_the_network(tmp_path: Path) -> None:
    data = write_images(tmp_path / "pictures", (6, 6))
    with pytest.raises(ModelError, match="the images are too small for this network"):
        fetch(find("lenet5-images"), tmp_path / "net", data=data)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nothing-cifar10", "net"], 2, "recipe 'nothing-cifar10' is not known; `onnxneutrino zoo list` shows all"),
        (["mlp-images", "net"], 2, "takes your own images; name them with --data FOLDER or --data FILE.npz"),
        (["mlp-cifar10", "net", "--url", "file:///data"], 2, "--url file:///data: must begin with http:// or https://"),
        (["mlp-cifar10", "net", "--size", "32"], 2, "mlp-cifar10 has a size of its own"),
        (["mlp-cifar10", "net", "--data", "a.npz", "--url", "http://a"], 2, "--data and --url: give one of them"),
        (["mlp-cifar10", "net", "--data", "a.npz"], 1, "a.npz: not found"),
    ],
)
def test_wrong_usage(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["zoo", "fetch", *arguments])
    assert result.exit_code == code
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_commands(recipe: Recipe, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "RECIPES", (recipe,))
    monkeypatch.chdir(tmp_path)
    command = ["zoo", "fetch", "mlp-cifar10", "net", "--url", server.url]
    [name] = server.files
    server.answers[name] = cut
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"onnxneutrino: {server.url}/{name}: cannot be downloaded: it ends after ")
    assert result.stdout == ""
    assert not (tmp_path / "net").exists()
    server.answers.clear()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "net/model.onnx: written",
        "net/model.toml: written",
        "Next: onnxneutrino zoo train net",
    ]
    assert f"fetch: {name}, " in result.stderr
    result = CliRunner().invoke(main, [*command, "--json", "-"])
    assert json.loads(result.stdout) == {
        "recipe": "mlp-cifar10",
        "folder": "net",
        "data": "cifar10.npz",
        "classes": 10,
        "input": [3, 32, 32],
        "kept": ["model.onnx", "model.toml"],
    }


def test_list() -> None:
    result = CliRunner().invoke(main, ["zoo", "list"])
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert set(rows) == {"Recipe", *(recipe.name for recipe in RECIPES)}
    assert rows["resnet20-cifar10"] == ["cifar10", "271", "k", "40.6", "M", "3x32x32"]
    assert rows["resnet20-images"] == ["images", "-", "-", "-"]
    found = json.loads(CliRunner().invoke(main, ["zoo", "list", "--json", "-"]).stdout)
    assert [entry["name"] for entry in found] == [recipe.name for recipe in RECIPES]
    [own] = [entry for entry in found if entry["name"] == "lenet5-mnist"]
    assert own == {"name": "lenet5-mnist", "dataset": "mnist", "params": 61706, "macs": 416520, "input": [1, 28, 28]}


def test_every_family_of_the_paper_and_every_data_set() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    families = {recipe.name.rpartition("-")[0] for recipe in RECIPES}
    assert families >= {"mlp", "lenet5", "vgg16", "resnet20", "resnet18", "mobilenetv1", "mobilenetv2", "shufflenetv2"}
    assert families >= {"densenet40", "googlenet"}
    assert {recipe.data.name for recipe in RECIPES} == {"mnist", "cifar10", "cifar100", "images"}
    for source in DATA_SOURCES:
        assert all(len(file.md5) == 32 and int(file.md5, 16) for file in source.files)
        assert source.base.startswith("https://") if source.files else not source.base
