from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.parser import parse_model

from onnxneutrino import graph, storage
from onnxneutrino.errors import ModelError, OutputError, UsageError
from onnxneutrino.runtime import Runner

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[2] spare = {1, 2}>
{
    [a] b = Constant <value_floats = [1.0, 2.0, 3.0]> ()
    [a] h = MatMul (x, w)
    s = Add (h, b)
    y = Relu (s)
    dead = Neg (spare)
}
"""


@pytest.fixture
def model() -> ModelProto:
    return parse_model(TEXT)


def written(tmp_path: Path, model: ModelProto, name: str = "m.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


def big(value: float = 1.0) -> ModelProto:
    weight = numpy_helper.from_array(np.full((32, 32), value, np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "mm")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 32]) for n in "xy"]
    body = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_load_names_every_node_once(tmp_path: Path, model: ModelProto) -> None:
    source = graph.load(written(tmp_path, model))
    names = [node.name for node in source.model.graph.node]
    assert names == ["a", "MatMul_1", "Add_2", "Relu_3", "Neg_4"]
    assert not source.external
    again = graph.load(written(tmp_path, source.model))
    assert [node.name for node in again.model.graph.node] == names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x08\x08\x12\xff\xff\xff", "corrupt or truncated"),
        (b"\x08\x08", "no graph"),
    ],
)
def test_load_refuses_what_is_no_model(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        graph.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_load_refuses_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        graph.load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        graph.load(tmp_path)


@pytest.mark.parametrize(
    ("version", "words"), [(99, r"opset 99 is not supported \(7 to \d+ are\); update onnx"), (6, "opset 6 is not")]
)
def test_load_refuses_other_opsets(tmp_path: Path, model: ModelProto, version: int, words: str) -> None:
    model.opset_import[0].version = version
    with pytest.raises(ModelError, match=words):
        graph.load(written(tmp_path, model))


def test_load_refuses_no_opset_custom_and_quantized(tmp_path: Path, model: ModelProto) -> None:
    bare = graph.copied(model)
    del bare.opset_import[:]
    with pytest.raises(ModelError, match="no opset_import"):
        graph.load(written(tmp_path, bare))
    custom = graph.copied(model)
    custom.graph.node[3].domain = "my.ops"
    with pytest.raises(ModelError, match=r"node 'y' is my\.ops\.Relu"):
        graph.load(written(tmp_path, custom))
    quantized = graph.copied(model)
    quantized.graph.node[3].op_type = "DequantizeLinear"
    with pytest.raises(ModelError, match="quantize the result"):
        graph.load(written(tmp_path, quantized))


def test_load_inlines_local_functions(tmp_path: Path) -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        net (float[N] x) => (float[N] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 17]>
        twice (a) => (b) { b = Add (a, a) }
        """
    )
    loaded = graph.load(written(tmp_path, model)).model
    assert [node.op_type for node in loaded.graph.node] == ["Add"]
    (y,) = Runner(loaded)({"x": np.array([1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(y, [2, 4])


def test_check_names_the_tensor_with_nan(model: ModelProto) -> None:
    graph.check(model, "m")
    broken = graph.with_arrays(model, {"w": np.full((4, 3), np.nan)})
    with pytest.raises(ModelError, match="m: tensor 'w' holds NaN"):
        graph.check(broken, "m")
    with pytest.raises(ModelError, match="tensor 'w' holds infinity"):
        graph.check(graph.with_arrays(model, {"w": np.full((4, 3), np.inf)}), "m")


def test_check_lets_a_mask_be_infinite(model: ModelProto) -> None:
    masked = graph.copied(model)
    masked.graph.initializer.append(numpy_helper.from_array(np.array([-np.inf], np.float32), "mask"))
    masked.graph.node[2].input[1] = "mask"
    graph.check(masked, "m")


def test_save_and_load_external(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    graph.save(big(1.0), path, external=True)
    (first,) = tmp_path.glob("out.onnx.*.data")
    source = graph.load(path)
    assert source.external
    np.testing.assert_array_equal(graph.arrays(source.model)["w"], np.ones((32, 32)))
    onnx.checker.check_model(str(path))
    graph.save(big(2.0), path, external=True)
    (second,) = tmp_path.glob("out.onnx.*.data")
    assert second.name != first.name
    graph.save(big(3.0), path, external=False)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    assert not graph.load(path).external


def test_load_names_missing_and_short_external_data(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    graph.save(big(), path, external=True)
    (data,) = tmp_path.glob("*.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"'{data.name}' ends before 'w'"):
        graph.load(path)
    data.unlink()
    with pytest.raises(ModelError, match=f"'{data.name}'.* is missing"):
        graph.load(path)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_save_leaves_the_old_file_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, error: BaseException
) -> None:
    path = tmp_path / "out.onnx"
    graph.save(big(1.0), path, external=external)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == path:
            raise error
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        graph.save(big(2.0), path, external=external)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_check_writable(tmp_path: Path) -> None:
    graph.check_writable(tmp_path / "out.onnx")
    with pytest.raises(OutputError, match="does not exist"):
        graph.check_writable(tmp_path / "none" / "out.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        graph.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        graph.check_writable(tmp_path / "file" / "out.onnx")


def inputs_model(*shapes: list[int | str | None]) -> ModelProto:
    values = [helper.make_tensor_value_info(f"i{k}", TensorProto.FLOAT, shape) for k, shape in enumerate(shapes)]
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Neg", ["i0"], ["o"])], "g", values, [output])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)])


def test_fixed_shapes_takes_the_batch_as_one() -> None:
    assert graph.fixed_shapes(inputs_model(["N", 3, 8, 8], ["N"]), {}) == {"i0": (1, 3, 8, 8), "i1": (1,)}
    assert graph.fixed_shapes(inputs_model([4, 3]), {}) == {"i0": (1, 3)}
    assert graph.fixed_shapes(inputs_model(["N", 5], [2, "N", 7]), {}) == {"i0": (1, 5), "i1": (2, 1, 7)}
    assert graph.fixed_shapes(inputs_model([-1, 3]), {}) == {"i0": (1, 3)}


def test_fixed_shapes_needs_free_axes_and_takes_overrides() -> None:
    model = inputs_model(["N", 3, "h", None])
    with pytest.raises(ModelError, match=r"'i0' is declared \[N, 3, h, \?\].*--input-shape i0=1x3x\?x\?"):
        graph.fixed_shapes(model, {})
    assert graph.fixed_shapes(model, {"i0": (1, 3, 6, 7)}) == {"i0": (1, 3, 6, 7)}
    with pytest.raises(ModelError, match="contradicts"):
        graph.fixed_shapes(model, {"i0": (1, 4, 6, 7)})
    with pytest.raises(UsageError, match="no input 'z'; its inputs are i0"):
        graph.fixed_shapes(model, {"z": (1,)})


def test_tensor_types_follow_the_given_shape(model: ModelProto) -> None:
    types = graph.tensor_types(model, {"x": (5, 4)})
    assert types["h"] == graph.TensorType((5, 3), np.dtype(np.float32))
    assert types["w"].shape == (4, 3)
    assert "h" not in graph.tensor_types(model, {})


def test_arrays_read_and_replace_constants(model: ModelProto) -> None:
    np.testing.assert_array_equal(graph.arrays(model)["b"], np.array([1, 2, 3], np.float32))
    changed = graph.with_arrays(model, {"b": np.array([4.0, 5.0, 6.0]), "w": np.zeros((4, 3))})
    (y,) = Runner(changed)({"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(y, [[4, 5, 6], [4, 5, 6]])
    assert graph.arrays(changed)["b"].dtype == np.float32
    with pytest.raises(ModelError, match="'nothing'"):
        graph.with_arrays(model, {"nothing": np.zeros(1)})


def test_consumers_see_captures_and_outputs() -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2] x, bool c) => (float[2] y, float[2] h) {
            h = Neg (x)
            y = If (c) <
                then_branch = a () => (float[2] t) { t = Abs (h) },
                else_branch = b () => (float[2] e) { e = Exp (x) }>
        }
        """
    )
    found = graph.consumers(model.graph)
    assert [node.op_type if node else None for node in found["h"]] == ["If", None]
    assert [node.op_type for node in found["x"] if node] == ["Neg", "If"]
    graph.replace_uses(model.graph, "x", "z")
    assert graph.reads(model.graph.node[1]) == ["c", "h", "z"]


def test_drop_unused_and_expose(model: ModelProto) -> None:
    dropped = graph.drop_unused(model)
    assert [node.op_type for node in dropped.graph.node] == ["Constant", "MatMul", "Add", "Relu"]
    assert [tensor.name for tensor in dropped.graph.initializer] == ["w"]
    exposed = graph.expose(model, ["h", "b"])
    onnx.checker.check_model(exposed)
    assert [node.op_type for node in exposed.graph.node] == ["Constant", "MatMul"]
    h, b = Runner(exposed)({"x": np.ones((1, 4), np.float32)})
    np.testing.assert_array_equal(h, [[18, 22, 26]])
    np.testing.assert_array_equal(b, [1, 2, 3])
    with pytest.raises(ModelError, match="no tensor 'q'"):
        graph.expose(model, ["q"])
    assert not graph.expose(model, ["b"]).graph.input


def test_with_batch_fixes_inputs_and_matching_outputs(model: ModelProto) -> None:
    fixed = graph.with_batch(model, 6)
    assert graph.declared_shape(fixed.graph.input[0]) == (6, 4)
    assert graph.declared_shape(fixed.graph.output[0]) == (6, 3)
    single = graph.with_batch(graph.with_batch(model, 1), 3)
    assert graph.declared_shape(single.graph.output[0]) == (None, 3)


def test_convert_opset_and_cap_ir(model: ModelProto) -> None:
    model.domain = "kept"
    model.ir_version = 11
    newer = graph.convert_opset(model, 20)
    assert graph.opset(newer) == 20
    assert newer.ir_version <= 10
    assert graph.capped_ir(model).ir_version == 10
    x = {"x": np.arange(4, dtype=np.float32)[None]}
    np.testing.assert_array_equal(Runner(newer)(x)[0], Runner(model)(x)[0])


def test_below_ir_4_new_initializers_become_inputs(model: ModelProto) -> None:
    model.ir_version = 3
    listed = graph.complete_inputs(model)
    assert [value.name for value in listed.graph.input] == ["x", "w", "spare"]
    assert [value.name for value in graph.real_inputs(listed)] == ["x"]


def test_every_negative_file_gets_one_line(shared: Path) -> None:
    files = sorted((shared / "models" / "negative").iterdir())
    assert files
    for path in files:
        with pytest.raises(ModelError) as caught:
            graph.load(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
