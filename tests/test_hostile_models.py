"""ONNX files made to harm: one line, exit code 1, seconds, and no more memory than the file is worth."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hostile_runs import MEBIBYTE, Runs
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper, parser

from onnxneutrino import normalize

NODES = """[conv1] h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x2, w1, b1)
    [act] r = Relu (h)
    [flat] f = Flatten (r)
    [fc] y = Gemm (f, w2, b2)"""
ZERO = np.zeros((1, 1), np.float32)
NOT_TEXT = TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], string_data=[b"\xff\xfe"])
ALLOWANCE = 64  # MiB: sessions, and what the system rounds
SECONDS = 10.0


def convnet(before: str = "", nodes: str = NODES, sizes: str = "N, 2, 6, 6", **constants: Any) -> ModelProto:
    """A small convnet that reads `x2`, which `before` makes; with constants of these names."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[{sizes}] x) => (float[N, 4] y) {{ {before or 'x2 = Identity (x)'}\n {nodes} }}"
    )
    shapes = {"w1": (16, 2, 3, 3), "b1": (16,), "w2": (576, 4), "b2": (4,)}
    arrays = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()} | constants
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(own), name) for name, own in arrays.items())
    return model


def summed(nodes: str, **constants: Any) -> ModelProto:
    """The convnet behind nodes that make `z`, all of which is added to the input."""
    return convnet(f"{nodes}\n q = ReduceSum <keepdims = 0> (z)\n x2 = Add (x, q)", **constants)


def changed(change: Callable[[ModelProto], Any]) -> ModelProto:
    model = convnet()
    change(model)
    return model


def conv(attribute: str, value: str) -> ModelProto:
    given = [f"{attribute} = {value}", *(text for text in ("kernel_shape = [3, 3]",) if attribute not in text)]
    return convnet(nodes=NODES.replace("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", ", ".join(given)))


def external(model: ModelProto, **entries: Any) -> ModelProto:
    """Let the data of `w1`, 1152 bytes, be in a file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return model


def dims(*sizes: int) -> ModelProto:
    model = convnet()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(sizes)
    return model


def nested(depth: int) -> ModelProto:
    """If within If."""
    graph = parser.parse_graph("g () => (float[N, 2, 6, 6] o0) { o0 = Identity (x) }")
    for level in range(1, depth + 1):
        other = parser.parse_graph(f"e () => (float[N, 2, 6, 6] e{level}) {{ e{level} = Identity (x) }}")
        node = helper.make_node("If", ["t"], [f"o{level}"], then_branch=graph, else_branch=other)
        graph = GraphProto(name="g", node=[node], output=[helper.make_tensor_value_info(f"o{level}", 1, None)])
    model = convnet(f"x2 = Identity (o{depth})", t=np.array(True))
    model.graph.node.insert(0, graph.node[0])
    return model


def looping(**constants: Any) -> ModelProto:
    """A Loop without an end, or with the trip count `n`."""
    body = parser.parse_graph(
        "b (int64 i, bool c, float[?, 2, 6, 6] v) => (bool d, float[?, 2, 6, 6] u) "
        "{ d = Identity (c)\n u = Identity (v) }"
    )
    model = convnet("x2 = Identity (l)", t=np.array(True), **constants)
    node = helper.make_node("Loop", ["n" if constants else "", "t", "x"], ["l"], name="forever", body=body)
    model.graph.node.insert(0, node)
    return model


def functions(text: str) -> ModelProto:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "l": 1]> g (float[N, 2, 6, 6] x) => (float[N, 4] y) '
        f"{{ x2 = l.F0 (x)\n {NODES} }} {text}"
    )
    model.graph.initializer.extend(convnet().graph.initializer)
    return model


def function(name: str, *calls: str) -> str:
    """A local function that calls others one after the other."""
    names = ["a", *(f"c{index}" for index in range(len(calls) - 1)), "b"]
    lines = "\n".join(f"{new} = {call} ({old})" for call, old, new in zip(calls, names, names[1:], strict=False))
    return f'<domain: "l", opset_import: ["": 17, "l": 1]> {name} (a) => (b) {{ {lines} }}'


def sparse(*shape: int) -> ModelProto:
    values = numpy_helper.from_array(np.ones(2, np.float32), "sp")
    indices = numpy_helper.from_array(np.array([1, 5]), "indices")
    model = convnet("z = MatMul (x, sp)\n q = ReduceSum <keepdims = 0> (z)\n x2 = Add (x, q)")
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=indices, dims=shape))
    return model


def chain(count: int, op: str, **constants: Any) -> ModelProto:
    """Each node reads twice what the one before has made."""
    lines = [f"z{index + 1} = {op.format(f'z{index}')}" for index in range(count)]
    return summed("\n".join(["z0 = Identity (o)", *lines, f"z = Identity (z{count})"]), o=ZERO, **constants)


def whole(large: int) -> np.ndarray:
    return np.array([large, large])


MODELS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    # Data in another file.
    "parent": (lambda: external(convnet(), location="../w.bin"), "points outside the directory"),
    "absolute": (lambda: external(convnet(), location="/etc/passwd"), "/etc/passwd"),
    "device": (lambda: external(convnet(), location="/dev/zero"), "'/dev/zero' (tensor 'w1') is missing"),
    "link": (lambda: external(convnet(), location="link.bin"), "link"),
    "linked folder": (lambda: external(convnet(), location="linked/w.bin"), "outside"),
    "hard link": (lambda: external(convnet(), location="hard.bin"), "hard link"),
    "folder": (lambda: external(convnet(), location="sub"), "'sub' (tensor 'w1') is missing"),
    "no location": (lambda: external(convnet()), "external data '' (tensor 'w1') is missing"),
    "pipe": (lambda: external(convnet(), location="pipe"), "is missing"),
    "zero byte": (lambda: external(convnet(), location="w\0.bin"), "is missing"),
    "long name": (lambda: external(convnet(), location="a" * 5000), "File name too long"),
    "negative offset": (lambda: external(convnet(), location="w.bin", offset=-5), "offset must be non-negative"),
    "negative length": (lambda: external(convnet(), location="w.bin", length=-5), "length must be non-negative"),
    "offset beyond": (lambda: external(convnet(), location="w.bin", offset=2**62), "'w.bin' ends before 'w1'"),
    "length beyond": (lambda: external(convnet(), location="w.bin", length=2**62), "shape and type take 1152"),
    "not a number": (lambda: external(convnet(), location="w.bin", offset="1e9"), "invalid literal"),
    "many digits": (lambda: external(convnet(), location="w.bin", offset="9" * 5000), "digits"),
    "dims beyond": (lambda: external(dims(2**31, 2**31, 1, 1), location="w.bin"), "'w.bin' ends before 'w1'"),
    "negative dims": (lambda: external(dims(-1, 2, 3, 3), location="w.bin"), "tensor 'w1' is damaged"),
    # Tensors.
    "too short": (lambda: changed(lambda m: m.graph.initializer[0].ClearField("raw_data")), "w1"),
    "2^62": (lambda: dims(2**62), "w1"),
    "product overflows": (lambda: dims(2**62, 4, 288), "w1"),
    "two negative dims": (lambda: dims(-16, -2, 3, 3), "tensor 'w1' is damaged"),
    "hundred dims": (lambda: dims(16, 2, 3, 3, *[1] * 100), "tensor 'w1' is damaged"),
    "unknown type": (lambda: changed(lambda m: setattr(m.graph.initializer[0], "data_type", 99)), "type 99"),
    "strings": (lambda: changed(lambda m: m.graph.initializer.append(NOT_TEXT)), "'s' is damaged"),
    "unknown input type": (
        lambda: changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99)),
        "element type 99",
    ),
    "input too large": (lambda: convnet(sizes="N, 2, 1000000, 1000000"), "more than half of this machine's memory"),
    "input of 2^62": (lambda: convnet(sizes=f"N, 2, {2**62}, 6"), "more than half of this machine's memory"),
    # What a few bytes ask for.
    "ConstantOfShape": (lambda: summed("z = ConstantOfShape (s)", s=whole(2**20)), "constants of the graph"),
    "Expand": (lambda: summed("z = Expand (o, s)", o=ZERO, s=whole(2**20)), "constants of the graph"),
    "Expand of the input": (lambda: summed("z = Expand (x, s)", s=np.array([2**30, 1, 1, 1, 1])), "'z' of shape"),
    "Tile": (lambda: summed("z = Tile (o, s)", o=ZERO, s=whole(2**20)), "constants of the graph"),
    "Range": (
        lambda: summed("i = Range (a, b, c)\n z = Cast <to = 1> (i)", a=np.int64(0), b=np.int64(2**62), c=np.int64(1)),
        "constants of the graph",
    ),
    "Pad": (lambda: summed("z = Pad (x, p)", p=np.array([0, 0, 2**20, 2**20, 0, 0, 0, 0])), "'z' of shape"),
    "Resize": (lambda: summed("z = Resize (x, , s)", s=np.float32([1, 1, 1e6, 1e6])), "'z' of shape"),
    "OneHot": (
        lambda: summed("z = OneHot (i, d, v)", i=np.array([1]), d=np.int64(2**50), v=np.float32([0, 1])),
        "constants of the graph",
    ),
    "MatMul": (
        lambda: summed("z = MatMul (a, b)", a=np.zeros((2**17, 1), "f4"), b=np.zeros((1, 2**17), "f4")),
        "constants of the graph",
    ),
    "RandomNormal": (lambda: summed(f"z = RandomNormal <shape = [{2**20}, {2**20}]> ()"), "constants of the graph"),
    "Concat of Concat": (lambda: chain(40, "Concat <axis = 0> ({0}, {0})"), "constants of the graph"),
    "Tile of Tile": (lambda: chain(12, "Tile ({0}, s)", s=np.array([16, 1])), "constants of the graph"),
    "sparse": (lambda: sparse(2**31, 2**31), "constants of the graph"),
    "ConvTranspose": (
        lambda: summed(f"z = ConvTranspose <strides = [{2**20}, {2**20}]> (x, w)", w=np.zeros((2, 2, 3, 3), "f4")),
        "'z' of shape",
    ),
    # Attributes.
    "strides 0": (lambda: conv("strides", "[0, 0]"), "node 'conv1' has strides 0"),
    "dilations 0": (lambda: conv("dilations", "[0, 1]"), "node 'conv1' has dilations 0"),
    "group -2": (lambda: conv("group", "-2"), "node 'conv1' has group -2"),
    "kernel 2^40": (lambda: conv("kernel_shape", f"[{2**40}, 3]"), "node 'conv1' has kernel_shape"),
    "pads 2^62": (lambda: conv("pads", f"[{2**62}, 0, 0, 0]"), "node 'conv1' has pads"),
    "blocksize 2^33": (lambda: summed(f"z = DepthToSpace <blocksize = {2**33}> (x)"), "has blocksize"),
    "reference": (
        lambda: changed(lambda m: setattr(m.graph.node[1].attribute[0], "ref_attr_name", "k")),
        "from a function that is not there",
    ),
    "type of an attribute": (
        lambda: changed(lambda m: setattr(m.graph.node[1].attribute[0], "type", AttributeProto.GRAPH)),
        "not a valid ONNX model",
    ),
    # Graphs.
    "cycle": (lambda: convnet(nodes=NODES.replace("Relu (h)", "Add (h, f)")), "topologically sorted"),
    "two of a name": (lambda: convnet(nodes=f"{NODES}\n h = Relu (x)"), "single static assignment"),
    "two weights": (lambda: changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])), "not unique"),
    "nested": (lambda: nested(12), "nested deeper than 8"),
    "many nodes": (
        lambda: changed(lambda m: m.graph.node.extend([helper.make_node("Relu", ["x"], ["u"])] * 100_000)),
        "more than 20000 nodes",
    ),
    "many weights": (
        lambda: changed(lambda m: m.graph.initializer.extend([TensorProto(name="u", data_type=1)] * 100_000)),
        "more than 50000",
    ),
    "endless Loop": (looping, "(forever) does not end within 5 s"),
    "without output": (
        lambda: changed(lambda m: m.graph.node.append(helper.make_node("Constant", [], [], value=TensorProto()))),
        "(Constant) has no outputs",
    ),
    "unknown domain": (lambda: changed(lambda m: setattr(m.graph.node[1], "domain", "a\nb\x1b[31m")), "a b?[31m.Conv"),
    "function calls itself": (lambda: functions(function("F0", "l.F0")), "'F0' calls itself"),
    "functions in a circle": (lambda: functions(function("F0", "l.F1") + function("F1", "l.F0")), "calls itself"),
    "functions that double": (
        lambda: functions(
            "".join(function(f"F{i}", f"l.F{i + 1}", f"l.F{i + 1}") for i in range(24)) + function("F24", "Relu")
        ),
        "more than 20000 nodes",
    ),
    "opset": (lambda: changed(lambda m: setattr(m.opset_import[0], "version", 2**62)), "is not supported"),
    "IR": (lambda: changed(lambda m: setattr(m, "ir_version", 2**62)), "is newer than"),
    "NaN": (lambda: convnet(w1=np.full((16, 2, 3, 3), np.nan, "f4")), "'w1' holds NaN"),
    "no outputs": (lambda: changed(lambda m: m.graph.ClearField("output")), "no graph with outputs"),
    "no nodes": (lambda: changed(lambda m: m.graph.ClearField("node")), "not a valid ONNX model"),
}
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "zeros": (b"\0" * 1000, "not an ONNX model"),
    "text": (b"hello" * 1000, "not an ONNX model"),
    "name of an operator that is no text": (
        convnet().SerializeToString().replace(b"Relu", b"\xff\xfe\xfd\xfc"),
        "not UTF-8",
    ),
    "name of a node that is no text": (
        convnet().SerializeToString().replace(b"conv1", b"\xff\xfe\xfd\xfc\xfb"),
        "not UTF-8",
    ),
    "bodies beyond what protobuf reads": (b"\x3a\xff\xff\xff\x07" + b"\x0a\xff\xff\xff\x07" * 300, "not an ONNX model"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the model goes, with files that it may not read beside it and above it."""
    beside = tmp_path / "model"
    (beside / "sub").mkdir(parents=True)
    for file in (beside / "w.bin", tmp_path / "w.bin", beside / "sub" / "w.bin"):
        file.write_bytes(bytes(1152))
    (beside / "link.bin").symlink_to("../w.bin")
    os.link(tmp_path / "w.bin", beside / "hard.bin")
    (beside / "linked").symlink_to("..")
    os.mkfifo(beside / "pipe")
    return beside


def refused(runs: Runs, folder: Path, words: str) -> None:
    outcome = runs(folder, "evaluate", "in.onnx", "--data", "random", "--metric", "agreement", "--threads", "1")
    assert words in outcome.line
    assert "in.onnx: " in outcome.line
    assert outcome.seconds < SECONDS
    assert outcome.grown < ALLOWANCE + 4 * (folder / "in.onnx").stat().st_size / MEBIBYTE


@pytest.mark.parametrize("name", MODELS)
def test_model(runs: Runs, folder: Path, name: str) -> None:
    make, words = MODELS[name]
    (folder / "in.onnx").write_bytes(make().SerializeToString())
    refused(runs, folder, words)


@pytest.mark.parametrize("name", FILES)
def test_file(runs: Runs, folder: Path, name: str) -> None:
    content, words = FILES[name]
    (folder / "in.onnx").write_bytes(content)
    refused(runs, folder, words)


def test_pipes_and_devices_are_not_read(runs: Runs, folder: Path) -> None:
    for source in ("pipe", "/dev/zero"):
        assert "is a device or pipe" in runs(folder, "analyze", source).line
    (folder / "loop.onnx").symlink_to("loop.onnx")
    assert "no such file" in runs(folder, "analyze", "loop.onnx").line


@pytest.mark.parametrize(
    "model",
    [
        convnet(),
        nested(8),
        functions(function("F0", "l.F1") + function("F1", "Relu", "Neg")),
        sparse(6, 6),
        external(convnet(), location="w.bin"),
        external(convnet(), location="sub/w.bin", offset=0, length=1152),
        looping(n=np.int64(3)),
        summed("z = Expand (o, s)", o=ZERO, s=np.array([64, 64])),
        convnet(w1=np.full((16, 2, 3, 3), 1e-40, "f4")),
    ],
    ids=["plain", "nested", "functions", "sparse", "external", "below", "loop", "expand", "denormal"],
)
def test_what_is_unusual_and_sound_is_read(runs: Runs, folder: Path, model: ModelProto) -> None:
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    outcome = runs(folder, "evaluate", "in.onnx", "--data", "random", "--metric", "agreement", "--threads", "1")
    assert (outcome.code, outcome.err) == (
        0,
        "onnxneutrino: random inputs were used: the results say nothing about real data\n",
    )
    assert outcome.out == "agreement 100.00 on 256 test examples\n"


def test_too_many_nodes_for_onnxslim_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize, "SLIM_NODES", 3)
    _, notes = normalize.normalize(convnet(), [], lambda graph, inputs: [])
    assert "slim skipped: it takes minutes on 5 nodes" in notes
