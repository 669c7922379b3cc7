"""Coverage-guided fuzzing of everything that reads a file: anything but success or a NeutrinoError is a finding.

    pip install 'onnxneutrino[fuzz]'
    python benchmarks/fuzz.py model CORPUS --seconds 300
    python benchmarks/fuzz.py npz|toml|report|image CORPUS --seconds 300

atheris (libFuzzer) changes small valid files byte by byte and keeps, in the folder CORPUS, what reaches new code; a
finding is written there as `crash-...`, an input of more than 10 s as `timeout-...`, of more than 2 GB as `oom-...`.
The model is loaded, checked, its shapes inferred, its layers found and its costs counted: everything before ONNX
Runtime. `tests/test_hostile_found.py` keeps what was found.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["onnxneutrino", "tomllib", "zipfile", "numpy.lib"]):
    import numpy as np
    from onnx import numpy_helper, parser
    from PIL import Image

    from onnxneutrino import cost, soundness, storage
    from onnxneutrino.config import DataConfig, load_config
    from onnxneutrino.data_folder import read_image
    from onnxneutrino.data_npz import open_npz
    from onnxneutrino.data_values import InputSpec
    from onnxneutrino.errors import NeutrinoError
    from onnxneutrino.graph import fixed_shapes, tensor_types
    from onnxneutrino.passes.find_layers import find_layers
    from onnxneutrino.replay import repeated
    from onnxneutrino.report import Report, SixMetrics

SPEC = InputSpec("x", (None, 2, 6, 6), np.dtype(np.float32))
TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 6, 6] x) => (float[N, 4] y) {
    [conv1] h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
    [act] r = Relu (h)
    [if] q = If (t) <then_branch = a () => (float[N, 16, 6, 6] s) { s = Identity (r) },
        else_branch = b () => (float[N, 16, 6, 6] u) { u = Neg (r) }>
    [flat] f = Flatten (q)
    [fc] y = Gemm (f, w2, b2) }"""


def model(path: Path) -> None:
    """Load, check, infer, find layers, count."""
    loaded = storage.load(path).model
    storage.check(loaded, path.name)
    shapes = fixed_shapes(loaded, {})
    types = tensor_types(loaded, shapes)
    if soundness.size_fault(loaded, types) is None:
        find_layers(loaded, types)
        cost.params(loaded)
        cost.macs(loaded, types)


def npz(path: Path) -> None:
    """Open the splits and read a batch of each."""
    for split in open_npz(path, DataConfig(str(path)), SPEC, 4).values():
        if split is not None:
            next(split.batches(4))


def toml(path: Path) -> None:
    """Read the configuration beside a model."""
    load_config(path.with_suffix(".onnx"), {})


def report(path: Path) -> None:
    """Read a report and prepare its repetition."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    repeated(None, Report.from_json(text), {})


def image(path: Path) -> None:
    """Decode."""
    read_image(path, (6, 6), True)


TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "model": (".onnx", model),
    "npz": (".npz", npz),
    "toml": (".toml", toml),
    "report": (".json", report),
    "image": (".png", image),
}


def seeds(target: str) -> list[bytes]:
    """Small valid files."""
    generator = np.random.default_rng(0)
    if target == "model":
        made = parser.parse_model(TEXT)
        shapes = {"w1": (16, 2, 3, 3), "b1": (16,), "w2": (576, 4), "b2": (4,)}
        for name, shape in shapes.items():
            made.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        made.graph.initializer.append(numpy_helper.from_array(np.array(True), "t"))
        function = parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17, "l": 1]> g (float[1, 4] x) => (float[1, 4] y) { y = l.F (x) }'
            '<domain: "l", opset_import: ["": 17]> F (a) => (b) { b = Relu (a) }'
        )
        return [made.SerializeToString(), function.SerializeToString()]
    if target == "npz":
        arrays: dict[str, Any] = {"x_train": np.zeros((8, 6, 6, 2), np.uint8), "x_test": np.zeros((8, 6, 6, 2), "f4")}
        arrays |= {"y_train": np.arange(8) % 4, "y_test": np.arange(8) % 4}
        stored, deflated = io.BytesIO(), io.BytesIO()
        np.savez(stored, **arrays)
        np.savez_compressed(deflated, **arrays)
        return [stored.getvalue(), deflated.getvalue()]
    if target == "toml":
        return [
            b'[data]\npath = "a.npz"\nlayout = "NHWC"\nscale = 0.5\nmean = [0.1, 0.2]\nstd = 1\naugment = ["hflip"]\n',
            b'[metric]\nname = "top1"\n[compress]\ntime-limit = "15m"\nmax-size = "5KB"\ninput-shape = { x = [1] }\n',
        ]
    if target == "report":
        six = SixMetrics(90.0, 10, 40, 100, 50, 1.5)
        done = Report("a.onnx", "a.npz", "top1", six, 1.0, "params", True, six, six, clock=(1.0,), settings={"seed": 1})
        return [done.to_json().encode()]
    found = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (8, 6), np.uint8)).save(file, kind)
        found.append(file.getvalue())
    return found


def main() -> None:
    """Fuzz one target for some time."""
    options = argparse.ArgumentParser(description="Fuzz what reads files.")
    options.add_argument("target", choices=sorted(TARGETS))
    options.add_argument("corpus", type=Path, help="folder of inputs, made where it is missing")
    options.add_argument("--seconds", type=int, default=300)
    given = options.parse_args()
    given.corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(given.target)):
        (given.corpus / f"seed-{number}").write_bytes(seed)
    suffix, read = TARGETS[given.target]
    folder = tempfile.TemporaryDirectory(
        prefix="onnxneutrino-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    )
    path = Path(folder.name) / f"in{suffix}"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except NeutrinoError as error:
            if not str(error).strip():
                raise ValueError("an error without words") from error

    limits = [
        f"-max_total_time={given.seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=16384",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={given.corpus}/", str(given.corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
