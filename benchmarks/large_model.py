"""Compress a model of gigabytes in a process of its own and report the peak of its memory.

The model is a Conv front and a chain of Concat, MatMul and Relu with weights `(tiles · width, width)`, written tensor
by tensor as external data; each layer reads the features before it `tiles` times. Weights are stacks of square ones
whose singular values decay exponentially. These are products of two Householder reflections
around the singular values, so that they are orthogonally mixed without a decomposition.

    python benchmarks/large_model.py --megabytes 300 -- --trainer none --time-limit 2m
    python benchmarks/large_model.py --command profile
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SEED = 0
SIDE = 16  # of the input image
DECAY = 0.02  # of the logarithm of a singular value, from one to the next, at width 4096


def weight(width: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A `(width, width)` matrix `H1 diag(s) H2` of norm about 1 per output, `s` decaying to a floor of 1e-3.

    `H = I - 2 v v^T / v^T v` (Householder 1958).
    """
    singular = np.exp(-DECAY * 4096 / width * np.arange(width)) + 1e-3
    singular *= np.sqrt(2.0 * width / np.sum(singular**2))  # Relu halves the power
    left, right = generator.standard_normal((2, width))
    product = np.diag(singular.astype(np.float32))
    for vector, axis in ((left, 0), (right, 1)):
        unit = (vector / np.linalg.norm(vector)).astype(np.float32)
        product -= 2.0 * (np.outer(unit, unit @ product) if axis == 0 else np.outer(product @ unit, unit))
    return product[generator.permutation(width)][:, generator.permutation(width)]


def write_model(path: Path, megabytes: int, width: int, tiles: int = 1) -> None:
    """Write the model and its `weights.data`; no more than a few weights are in memory at once."""
    generator = np.random.default_rng(SEED)
    layers = max(1, round(megabytes * 2**20 / (4 * tiles * width * width)))
    channels = width // SIDE**2
    kernel = generator.standard_normal((channels, 3, 3, 3)).astype(np.float32) / np.float32(27**0.5)
    initializers = [
        numpy_helper.from_array(kernel, "conv.weight"),
        numpy_helper.from_array(np.array([0, width], np.int64), "flat"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["map"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["map"], ["positive"], "relu"),
        helper.make_node("Reshape", ["positive", "flat"], ["h0"], "flatten"),
    ]
    with path.with_name("weights.data").open("wb") as file:
        for index in range(layers):
            name = f"fc{index}.weight"
            tensor = TensorProto(name=name, dims=[tiles * width, width], data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            values = {"location": "weights.data", "offset": str(file.tell()), "length": str(4 * tiles * width * width)}
            for key, value in values.items():
                tensor.external_data.add(key=key, value=value)
            for _ in range(tiles):
                file.write(np.ascontiguousarray(weight(width, generator) / np.float32(tiles**0.5)).data)
            initializers.append(tensor)
            read = f"h{index}"
            if tiles > 1:
                read = f"t{index}"
                nodes.append(helper.make_node("Concat", [f"h{index}"] * tiles, [read], f"tile{index}", axis=1))
            nodes.append(helper.make_node("MatMul", [read, name], [f"y{index}"], f"fc{index}"))
            if index < layers - 1:
                nodes.append(helper.make_node("Relu", [f"y{index}"], [f"h{index + 1}"], f"relu{index}"))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(f"y{layers - 1}", TensorProto.FLOAT, ["N", width])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def tree(root: int) -> Iterator[int]:
    """The process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
    found = {root}
    while more := {own for own, parent in parents.items() if parent in found} - found:
        found |= more
    yield from found


def resident(process: int) -> dict[str, int]:
    """Resident bytes of a process: all (`VmRSS`), its own (`RssAnon`), and pages of files (`RssFile`)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


class Sampler(threading.Thread):
    """The largest sums of resident bytes of a process tree, looked up twenty times a second."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.peak: dict[str, int] = {}
        self.moments: list[tuple[float, int, int]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Sample until `ended` is set."""
        start = time.perf_counter()
        while not self.ended.wait(0.05):
            total: dict[str, int] = {}
            for process in tree(self.root):
                for key, value in resident(process).items():
                    total[key] = total.get(key, 0) + value
            for key, value in total.items():
                self.peak[key] = max(self.peak.get(key, 0), value)
            self.moments.append((time.perf_counter() - start, total.get("RssAnon", 0), total.get("RssFile", 0)))


def main() -> None:
    """Make the model, run the command, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--command", choices=("compress", "analyze", "profile", "evaluate"), default="compress")
    parser.add_argument("--folder", type=Path, help="keep the model here, and use the one that is there")
    parser.add_argument("--trace", type=float, default=0.0, help="print memory every so many seconds")
    parser.add_argument("options", nargs="*", help="after --: options of the command")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "large.onnx"
        if not model.exists():
            write_model(model, given.megabytes, given.width, given.tiles)
        size = model.stat().st_size + model.with_name("weights.data").stat().st_size
        files = [str(model)] + ([str(folder / "out.onnx")] if given.command == "compress" else [])
        options = list(given.options)
        if given.command in ("compress", "evaluate") and "--data" not in options:
            options += ["--data", "random", "--metric", "mse"]
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "onnxneutrino", given.command, *files, *options])
        sampler = Sampler(child.pid)
        sampler.start()
        try:
            code = child.wait()
        finally:
            child.kill()
            sampler.ended.set()
            sampler.join()
    step = 0.0
    for moment, own, mapped in sampler.moments:
        if given.trace and moment >= step:
            print(f"{moment:8.1f} s  own {own / 2**20:8.0f} MB  files {mapped / 2**20:8.0f} MB", file=sys.stderr)
            step = moment + given.trace
    peak = sampler.peak.get("VmRSS", 0)
    result = {
        "command": given.command,
        "exit_code": code,
        "model_bytes": size,
        "peak_bytes": peak,
        "peak_own_bytes": sampler.peak.get("RssAnon", 0),
        "peak_file_bytes": sampler.peak.get("RssFile", 0),
        "ratio": round(peak / size, 3),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
