"""Damage at random: what fuzzing found, files cut short, bits turned, graphs with one thing wrong."""

from __future__ import annotations

import base64
import contextlib
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper, parser

from onnxneutrino import storage
from onnxneutrino.config import Config, DataConfig
from onnxneutrino.data_npz import open_npz
from onnxneutrino.data_values import InputSpec
from onnxneutrino.errors import DataError, ModelError, NeutrinoError, UsageError
from onnxneutrino.prepare import check_main_graph, open_model
from onnxneutrino.replay import repeated
from onnxneutrino.report import Report, SixMetrics

SPEC = InputSpec("x", (None, 2, 6, 6), np.dtype(np.float32))


def convnet() -> ModelProto:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 6, 6] x) => (float[N, 4] y) {
        [conv1] h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
        [act] r = Relu (h)
        [flat] f = Flatten (r)
        [fc] y = Gemm <transB = 0> (f, w2, b2) }"""
    )
    shapes = {"w1": (4, 2, 3, 3), "b1": (4,), "w2": (144, 4), "b2": (4,)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    return model


def opened(model: ModelProto) -> None:
    """All that is done with a model before its data is read."""
    check_main_graph(open_model(model, "m.onnx", Config(data=DataConfig("random"), threads=1)))


def survives(path: Path) -> bool:
    """Whether a file is taken; anything else than a NeutrinoError is a failure of the test."""
    try:
        opened(storage.load(path).model)
    except NeutrinoError:
        return False
    return True


def test_text_that_is_not_utf8_deep_in_the_model(tmp_path: Path) -> None:
    """Found: a copy of the graph raised UnicodeDecodeError for the name of a value's dimension."""
    path = tmp_path / "in.onnx"
    path.write_bytes(
        base64.b64decode(
            "CAg6OxIMCgF4EgEAAP////YASgFnGhMKAXgSDgoMCAESCAoCCAEKAggEYhMKAXkSDgoMCAESCAoCCAEKAggEQgQKABARCAESAWw="
        )
    )
    with pytest.raises(ModelError, match="not UTF-8"):
        storage.load(path)


def test_weight_of_a_rank_that_its_operator_does_not_take(tmp_path: Path) -> None:
    """Found: a Gemm that became a Conv, whose weight of two dimensions the list of layers unpacked."""
    model = convnet()
    model.graph.node[3].op_type = "Conv"
    del model.graph.node[3].attribute[:]
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"node 'fc' \(Conv\) has a weight 'w2' of 2 dimensions"):
        storage.load(path)


def test_archive_that_says_it_spans_several_disks(tmp_path: Path) -> None:
    """Found: `zipfile.is_zipfile` raises for a ZIP64 end that names more than one disk."""
    path = tmp_path / "data.npz"
    locator = b"PK\x06\x07" + bytes(12) + b"\x02\0\0\0"
    path.write_bytes(bytes(56) + locator + b"PK\x05\x06" + bytes(18))
    with pytest.raises(DataError, match=r"data\.npz: is damaged and cannot be read"):
        open_npz(path, DataConfig("data.npz"), SPEC, 4)


def test_report_whose_settings_of_the_data_are_text() -> None:
    """Found: a dictionary was made of them."""
    six = SixMetrics(90.0, 10, 40, 100, 50, 1.5)
    report = Report("a.onnx", "", "top1", six, 1.0, "params", True, clock=(1.0,), settings={"data": ["abc"]})
    with pytest.raises(UsageError, match="no object"):
        repeated(None, report, {})


def test_model_cut_short_anywhere(tmp_path: Path) -> None:
    content, path = convnet().SerializeToString(), tmp_path / "in.onnx"
    for end in (*range(120), *range(120, len(content), 61)):
        path.write_bytes(content[:end])
        assert not survives(path)


def test_archive_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    arrays = {"x_train": np.zeros((2, 6, 6, 2), np.uint8), "x_test": np.zeros((2, 6, 6, 2), np.uint8)}
    np.savez(path, **arrays)
    content = path.read_bytes()
    for end in range(0, len(content), 5):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"data\.npz: "):
            open_npz(path, DataConfig("data.npz"), SPEC, None)


def test_bits_turned_in_a_model(tmp_path: Path) -> None:
    content, path = convnet().SerializeToString(), tmp_path / "in.onnx"
    draw = random.Random(0)
    graph = content.rfind(b"Gemm") + 40  # what comes behind are weights
    taken = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            damaged[draw.randrange(graph)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        taken += survives(path)
    assert taken < 150


def test_bits_turned_in_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    arrays = {"x_train": np.zeros((2, 6, 6, 2), np.uint8), "x_test": np.zeros((2, 6, 6, 2), np.uint8)}
    np.savez_compressed(path, **arrays)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            open_npz(path, DataConfig("data.npz"), SPEC, None)
        except DataError:
            refused += 1
    assert refused > 100


NAMES = st.sampled_from(["x", "y", "h", "r", "f", "w1", "w2", "b1", "", "nothing"])
NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 2**31, 2**62, 2**63 - 1])


@st.composite
def corrupted(draw: st.DrawFn) -> ModelProto:
    """A sound graph in which one thing is another."""
    model = convnet()
    graph = model.graph
    node = graph.node[draw(st.integers(0, 3))]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(NAMES)
    elif kind == 1:
        node.output[0] = draw(NAMES)
    elif kind == 2:
        tensor = graph.initializer[draw(st.integers(0, 3))]
        tensor.dims[draw(st.integers(0, len(tensor.dims) - 1))] = draw(NUMBERS)
    elif kind == 3:
        graph.initializer[draw(st.integers(0, 3))].data_type = draw(st.integers(0, 30))
    elif kind == 4:
        axis = graph.input[0].type.tensor_type.shape.dim[draw(st.integers(0, 3))]
        axis.dim_value = draw(NUMBERS)
    elif kind == 5 and node.attribute:
        attribute = node.attribute[draw(st.integers(0, len(node.attribute) - 1))]
        attribute.i = draw(NUMBERS)
        attribute.ints[:] = [draw(NUMBERS) for _ in attribute.ints]
    elif kind == 6:
        node.op_type = draw(
            st.sampled_from(["Conv", "Gemm", "MatMul", "Relu", "If", "Loop", "Constant", "Reshape", "?"])
        )
    elif kind == 7:
        graph.node.insert(draw(st.integers(0, 4)), node)
    elif kind == 8:
        del graph.node[draw(st.integers(0, 3))]
    else:
        other = graph.initializer[draw(st.integers(0, 3))]
        other.raw_data = other.raw_data[: draw(st.integers(0, 40))]
    return model


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(corrupted())
def test_graph_with_one_thing_wrong(model: ModelProto) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(NeutrinoError):
            opened(model)
