"""Whole runs on graphs of other shapes: new opsets and IRs, stored weights, several inputs, free sizes, bodies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from slow_time import SlowTime

import onnxneutrino
from onnxneutrino import clock
from onnxneutrino.config import load_config
from onnxneutrino.delivery import compress_file
from onnxneutrino.errors import ModelError, NeutrinoError
from onnxneutrino.graph import all_nodes, load, opset
from onnxneutrino.opset_down import RUNTIME_OPSET, brought_down, too_new
from onnxneutrino.report import Report
from onnxneutrino.runtime import Runner

NEWEST = onnx.defs.onnx_opset_version()
OPTIONS: dict[str, Any] = {"delta": 30, "trainer": "none", "threads": 1, "time_limit": 20}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def low_rank(generator: np.random.Generator, rows: int, columns: int, *shape: int) -> NDArray[np.float32]:
    """Rank 3, of size one for inputs of size one."""
    product = generator.standard_normal((rows, 3)) @ generator.standard_normal((3, columns))
    return (product / np.sqrt(3 * columns)).astype(np.float32).reshape(shape or (rows, columns))


def convnet(
    nodes: str, sizes: str = "N, 2, 8, 8", version: int = 17, ir: int = 8, extra: dict[str, NDArray] | None = None
) -> ModelProto:
    """Weights `w1 (24, 2, 3, 3)`, `w2 (24, 24, 3, 3)` of low rank, `w3 (24, 4)`; nodes go from x to y `(N, 4)`."""
    generator = np.random.default_rng(0)
    head = f'<ir_version: {ir}, opset_import: ["": {version}]>'
    model = parser.parse_model(f"{head} g (float[{sizes}] x) => (float[N, 4] y) {{ {nodes} }}")
    weights = {
        "w1": low_rank(generator, 24, 18, 24, 2, 3, 3),
        "w2": low_rank(generator, 24, 216, 24, 24, 3, 3),
        "w3": generator.standard_normal((24, 4)).astype(np.float32),
        **(extra or {}),
    }
    read = {name for node in all_nodes(model.graph) for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in weights.items() if name in read)
    return model


BODY = """
[c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1) [act] r = {act} (a)
[c2] b = Conv <pads = [1, 1, 1, 1]> (r, w2) [pool] p = GlobalAveragePool (b)
[flat] f = Flatten (p) [f3] y = MatMul (f, w3)
"""
PLAIN = BODY.format(act="Relu")


def data(*shape: int, count: int = 32) -> Path:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((2 * count, *shape)).astype(np.float32)
    np.savez("data.npz", x_train=x[:count], x_test=x[count:])
    return Path("data.npz")


def run(model: ModelProto, external: bool = False, **options: Any) -> tuple[ModelProto, Report]:
    """Compress a file as the command does; the written model."""
    onnx.save(model, "in.onnx", save_as_external_data=external, location="weights.bin", size_threshold=0)
    options = {"data": "data.npz", "metric": "agreement"} | OPTIONS | options
    report = compress_file(Path("in.onnx"), Path("out.onnx"), load_config(Path("in.onnx"), options))
    onnx.checker.check_model("out.onnx")
    return onnx.load("out.onnx"), report


def refusal(model: ModelProto, kind: type[NeutrinoError] = ModelError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        run(model, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not Path("out.onnx").exists()
    return text


def factorized(model: ModelProto) -> bool:
    return any("/" in node.name and node.name.split("/")[0] in ("c1", "c2", "f3") for node in model.graph.node)


# --- opset and IR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "ir"), [(22, 10), (23, 11), (24, 12), (25, 13), (NEWEST, onnx.IR_VERSION)])
def test_newer_opsets_and_irs_are_kept(version: int, ir: int) -> None:
    data(8, 8, 2)
    given = convnet(BODY.format(act="Swish" if version > 23 else "Mish"), version=version, ir=ir)
    written, report = run(given)
    assert report.compressed
    assert factorized(written)
    assert (opset(written), written.ir_version) == (version, ir)
    assert ("Swish" in {node.op_type for node in written.graph.node}) == (version > 23)
    x = np.random.default_rng(2).standard_normal((3, 2, 8, 8)).astype(np.float32)
    wanted = ReferenceEvaluator(written).run(None, {"x": x})[0]  # type: ignore[index]
    np.testing.assert_allclose(Runner(Path("out.onnx"))({"x": x})[0], wanted, rtol=1e-4, atol=1e-5)


def test_newer_opset_is_trained() -> None:
    data(8, 8, 2)
    given = convnet(BODY.format(act="Swish"), version=24, ir=12)
    written, report = run(given, trainer="ort", time_limit=15, metric="top1", **labelled(given))
    assert opset(written) == 24
    assert report.training


def labelled(model: ModelProto) -> dict[str, Any]:
    x = np.load("data.npz")
    y = {name: Runner(model)({"x": x[f"x_{name}"].transpose(0, 3, 1, 2)})[0].argmax(1) for name in ("train", "test")}
    np.savez("labelled.npz", x_train=x["x_train"], x_test=x["x_test"], y_train=y["train"], y_test=y["test"])
    return {"data": "labelled.npz"}


def test_newer_opset_with_external_data() -> None:
    data(8, 8, 2)
    written, report = run(convnet(PLAIN, version=23, ir=11), external=True, exclude=("c2",))
    assert report.compressed
    assert opset(written) == 23
    assert list(Path().glob("out.onnx.*.data"))


NEW_OPERATORS = """
s = Swish <alpha: float = 1.5> (x)
r = RMSNormalization <axis: int = 1, epsilon: float = 0.01> (s, scale)
t = RMSNormalization (r, last)
m = AveragePool <kernel_shape = [3, 3]> (t)
v = Cast <to = 1, round_mode = "up"> (m)
b = ReduceSum (v)
c = Cast <to = 9> (b)
y = If (c) <
    then_branch = yes () => (float[N, 2, K, K] p) { p = Swish (v) },
    else_branch = no () => (float[N, 2, K, K] q) { q = Identity (v) }
>
"""


@pytest.mark.parametrize("element", [np.float32, np.float16])
def test_rewritten_operators_compute_the_same(element: type[np.generic]) -> None:
    """Against the reference implementation of the specification at the model's own opset."""
    generator = np.random.default_rng(0)
    kind = "float" if element is np.float32 else "float16"
    text = NEW_OPERATORS.replace("float[", f"{kind}[").replace("to = 1,", f"to = {1 if kind == 'float' else 10},")
    model = parser.parse_model(
        f'<ir_version: 12, opset_import: ["": {NEWEST}]> '
        f"g ({kind}[N, 2, 8, 8] x) => ({kind}[N, 2, K, K] y) {{ {text} }}"
    )
    for name, shape in (("scale", (2, 8, 8)), ("last", (8,))):
        model.graph.initializer.append(numpy_helper.from_array(generator.standard_normal(shape).astype(element), name))
    before = model.SerializeToString(deterministic=True)
    down = brought_down(model)
    assert model.SerializeToString(deterministic=True) == before
    down.ir_version = 10
    onnx.checker.check_model(down, full_check=True)
    assert opset(down) == RUNTIME_OPSET
    assert not {"Swish", "RMSNormalization"} & {node.op_type for node in all_nodes(down.graph)}
    tolerance = 1e-5 if element is np.float32 else 5e-3
    for sign in (1, -1):  # both branches
        x = np.abs(generator.standard_normal((3, 2, 8, 8))).astype(element) * element(sign)
        wanted = ReferenceEvaluator(model).run(None, {"x": x})[0]  # type: ignore[index]
        np.testing.assert_allclose(Runner(model)({"x": x})[0], wanted, rtol=tolerance, atol=tolerance)


def test_an_older_opset_is_the_model_itself() -> None:
    model = convnet(PLAIN, version=21)
    assert too_new(model) is None
    assert brought_down(model) is model


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[att] z = Attention <q_num_heads = 1, kv_num_heads = 1> (r, r, r)", "'att': Attention is newer"),
        ("[e] z = TensorScatter (r, r)", "'e': TensorScatter is newer"),
        ('[s] z = SpaceToDepth <blocksize = 2, mode = "CRD"> (r)', "'s': attribute 'mode' of SpaceToDepth is newer"),
    ],
)
def test_what_the_runtime_does_not_have_is_refused_by_name(line: str, words: str) -> None:
    data(8, 8, 2)
    text = refusal(convnet(PLAIN.replace("[c2]", f"{line} [c2]"), version=NEWEST, ir=12))
    assert text.startswith("in.onnx: node ")
    assert words in text
    assert "export with opset 21" in text


def test_an_ir_that_nobody_reads() -> None:
    assert "IR version 99 is newer" in refusal(convnet(PLAIN, ir=99))


# --- stored weights -------------------------------------------------------------------------------------------------


def quantized(model: ModelProto, name: str) -> ModelProto:
    """The model with this weight in 8 bits per output channel, dequantized in the graph."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    value = numpy_helper.to_array(tensor)
    scale = np.abs(value).max(axis=(1, 2, 3)) / 127
    stored = np.rint(value / scale[:, None, None, None]).astype(np.int8)
    model.graph.initializer.remove(tensor)
    model.graph.initializer.append(numpy_helper.from_array(stored, f"{name}_q"))
    model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_s"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [name], "dq", axis=0))
    return model


def test_weight_only_quantization_becomes_float() -> None:
    data(8, 8, 2)
    written, report = run(quantized(convnet(PLAIN), "w2"))
    assert report.compressed
    assert factorized(written)
    assert "DequantizeLinear" not in {node.op_type for node in written.graph.node}
    assert all(tensor.data_type != TensorProto.INT8 for tensor in written.graph.initializer)
    scales = 24
    assert report.original.params == 24 * 2 * 9 + 24 * 24 * 9 + 24 * 4 + scales
    assert "DequantizeLinear dq folded into weights" in report.normalization
    assert any("the output holds them as float32" in note for note in report.normalization)


@pytest.mark.parametrize("line", ["QuantizeLinear (r, s, z)", "DequantizeLinear (r, s)", "DynamicQuantizeLinear (r)"])
def test_quantized_activations_are_refused(line: str) -> None:
    data(8, 8, 2)
    text = refusal(convnet(PLAIN.replace("[c2]", f"[q] q = {line} [c2]"), extra={"s": np.ones((), np.float32)}))
    assert "compress the float model first and quantize the result" in text


def test_weight_behind_transpose() -> None:
    data(8, 8, 2)
    w3 = np.random.default_rng(3).standard_normal((4, 24)).astype(np.float32)
    given = convnet(PLAIN.replace("[f3] y = MatMul (f, w3)", "v = Transpose (w3) [f3] y = MatMul (f, v)"))
    given.graph.initializer.remove(next(t for t in given.graph.initializer if t.name == "w3"))
    given.graph.initializer.append(numpy_helper.from_array(w3, "w3"))
    _, report = run(given)
    assert {layer.name: layer.reason for layer in report.layers}.get("f3") != "weight is computed at run time"


# --- several inputs and outputs -------------------------------------------------------------------------------------

PAIR = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2, 8, 8] image, float[N, 6] extra) => (float[N, 4] classes, float[N, 24, 8, 8] map, float[N, 1] value) {
[c1] a = Conv <pads = [1, 1, 1, 1]> (image, w1) map = Relu (a)
[c2] b = Conv <pads = [1, 1, 1, 1]> (map, w2) p = GlobalAveragePool (b) f = Flatten (p)
j = Concat <axis = 1> (f, extra)
[f3] classes = MatMul (j, w3)
[f4] value = MatMul (j, w4) }
"""
LOADER = """
import numpy as np

def load():
    generator = np.random.default_rng(4)
    def batches(count):
        return [
            ({"image": generator.standard_normal((16, 2, 8, 8)).astype(np.float32),
              "extra": generator.standard_normal((16, 6)).astype(np.float32)}, None)
            for _ in range(count)
        ]
    return {"train": batches(3), "test": batches(2)}
"""


@pytest.mark.parametrize("trainer", ["none", "ort"])
def test_two_inputs_and_an_intermediate_output(trainer: str) -> None:
    generator = np.random.default_rng(0)
    model = parser.parse_model(PAIR)
    weights = {
        "w1": low_rank(generator, 24, 18, 24, 2, 3, 3),
        "w2": low_rank(generator, 24, 216, 24, 24, 3, 3),
        "w3": generator.standard_normal((30, 4)).astype(np.float32),
        "w4": generator.standard_normal((30, 1)).astype(np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    Path("loader.py").write_text(LOADER, encoding="utf-8")
    options = OPTIONS | {"trainer": trainer, "time_limit": 15 if trainer == "ort" else 6}
    result = onnxneutrino.compress(model, data="loader.py:load", **options)
    assert result.model is not None
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.compressed
    assert factorized(result.model)
    assert list(result.model.graph.input) == list(model.graph.input)
    assert list(result.model.graph.output) == list(model.graph.output)
    assert bool(result.report.training) == (trainer == "ort")
    inputs = {"image": np.ones((5, 2, 8, 8), np.float32), "extra": np.ones((5, 6), np.float32)}
    assert [output.shape for output in Runner(result.model)(inputs)] == [(5, 4), (5, 24, 8, 8), (5, 1)]


# --- free sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["none", "ort"])
def test_free_sizes_are_those_of_the_data(trainer: str) -> None:
    data(10, 12, 2)
    given = convnet(PLAIN, sizes="N, 2, h, w")
    written, report = run(given, trainer=trainer, time_limit=6)
    assert report.compressed
    assert factorized(written)
    assert written.graph.input == given.graph.input
    assert written.graph.output == given.graph.output
    for size in ((2, 2, 10, 12), (3, 2, 7, 5)):
        assert Runner(written)({"x": np.ones(size, np.float32)})[0].shape == (size[0], 4)


def test_free_sizes_of_a_folder() -> None:
    from PIL import Image

    generator = np.random.default_rng(5)
    for split in ("train", "test"):
        for name in ("a", "b"):
            place = Path("images", split, name)
            place.mkdir(parents=True)
            for index in range(8):
                Image.fromarray(generator.integers(0, 256, (9, 7), np.uint8)).save(place / f"{index}.png")
    given = convnet(PLAIN.replace("w1", "w0"), sizes="N, 1, h, w", extra={"w0": np.ones((24, 1, 3, 3), np.float32)})
    _, report = run(given, data="images", scale=1 / 255)
    assert report.compressed
    Image.fromarray(generator.integers(0, 256, (9, 8), np.uint8)).save("images/test/b/wide.png")
    Path("out.onnx").unlink()
    assert "--input-shape x=1x1x?x?" in refusal(given, NeutrinoError, data="images")


@pytest.mark.parametrize("source", ["random", "varying.py:load"])
def test_sizes_that_the_data_does_not_fix(source: str) -> None:
    Path("varying.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    batches = [(np.zeros((4, 2, size, size), np.float32), None) for size in (8, 8, 6)]\n"
        "    return {'train': batches, 'test': batches}\n",
        encoding="utf-8",
    )
    text = refusal(convnet(PLAIN, sizes="N, 2, h, w"), NeutrinoError, data=source)
    assert "--input-shape x=1x2x?x?" in text


def test_strided_same_padding_of_a_free_size_stays() -> None:
    """Its pads depend on the size, so explicit ones would be wrong at other sizes."""
    data(10, 12, 2)
    same = '[c2] b = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (r, w2)'
    nodes = PLAIN.replace("[c2] b = Conv <pads = [1, 1, 1, 1]> (r, w2)", same)
    text = refusal(convnet(nodes, sizes="N, 2, h, w"), only=["c2"])
    assert "auto_pad with a stride on a map of free size" in text
    written, _ = run(convnet(nodes, sizes="N, 2, 10, 12"), only=["c2"])
    assert factorized(written)


# --- bodies ---------------------------------------------------------------------------------------------------------

CONDITIONAL = """
[c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1) [act] r = Relu (a)
[c2] b = Conv <pads = [1, 1, 1, 1]> (r, w2)
total = ReduceSum <keepdims = 0> (x) yes = Cast <to = 9> (total)
[branch] d = If (yes) <
    then_branch = then () => (float[N, 24, H, W] p) { [inner] p = Conv <pads = [1, 1, 1, 1]> (b, w2_inner) },
    else_branch = otherwise () => (float[N, 24, H, W] q) { q = Relu (b) }
>
[pool] o = GlobalAveragePool (d) [flat] f = Flatten (o) [f3] y = MatMul (f, w3)
"""


def test_bodies_stay_byte_for_byte() -> None:
    data(8, 8, 2)
    inner = low_rank(np.random.default_rng(6), 24, 216, 24, 24, 3, 3)
    given = convnet(CONDITIONAL, extra={"w2_inner": inner})
    written, report = run(given)
    assert report.compressed
    assert factorized(written)

    def bodies(model: ModelProto) -> list[bytes]:
        (branch,) = (node for node in model.graph.node if node.op_type == "If")
        return [attribute.g.SerializeToString(deterministic=True) for attribute in branch.attribute]

    assert bodies(written) == bodies(load(Path("in.onnx")).model)
    np.testing.assert_array_equal(
        numpy_helper.to_array(next(t for t in written.graph.initializer if t.name == "w2_inner")), inner
    )
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["branch/then_branch/inner"] == "inside the body of If branch"


def test_a_model_with_all_layers_in_bodies_is_refused_before_its_data_are_read() -> None:
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,16] x, bool c) => (float[N,32] y) {
            y = If (c) <
                then_branch = p () => (float[N,32] t) <float[16,32] w> { t = MatMul (x, w) },
                else_branch = q () => (float[N,32] e) <float[16,32] v> { e = MatMul (x, v) }>
        }
        """
    )
    for name, branch in (("w", 0), ("v", 1)):
        body = model.graph.node[0].attribute[branch].g
        del body.value_info[:]
        body.initializer.append(numpy_helper.from_array(np.ones((16, 32), np.float32), name))
    with pytest.raises(ModelError, match=r"no layer can be factorized: inside the body of If"):
        onnxneutrino.compress(model, data="missing.npz", delta=1.0)


MIDDLES = {
    "QuickGelu": [helper.make_node("QuickGelu", ["a"], ["b"], "middle", domain="com.microsoft", alpha=1.7)],
    "If": [
        helper.make_node("ReduceSum", ["x"], ["total"], "total", keepdims=0),
        helper.make_node("Less", ["total", "bound"], ["flag"], "flag"),
        helper.make_node(
            "If",
            ["flag"],
            ["b"],
            "middle",
            then_branch=helper.make_graph(
                [helper.make_node("Relu", ["a"], ["t"], "then")],
                "then",
                [],
                [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
            ),
            else_branch=helper.make_graph(
                [helper.make_node("Identity", ["a"], ["e"], "else")],
                "else",
                [],
                [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
            ),
        ),
    ],
}


@pytest.mark.parametrize("kind", MIDDLES)
def test_layers_before_what_has_no_gradient_learn_the_original(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        left, values, right = np.linalg.svd(rng.standard_normal(shape).reshape(shape[0], -1), full_matrices=False)
        falling = (left * (values * np.exp(-np.arange(len(values)) / 4))) @ right
        return numpy_helper.from_array(falling.reshape(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "first", pads=[1, 1, 1, 1]),
        *MIDDLES[kind],
        helper.make_node("Conv", ["b", "w1"], ["c"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], "head", transB=1),
    ]
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [
            weight("w0", 32, 8, 3, 3),
            weight("w1", 32, 32, 3, 3),
            weight("w2", 10, 32),
            numpy_helper.from_array(np.float32(1e9).reshape(()), "bound"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=8)
    monkeypatch.setattr(clock, "time", SlowTime())
    report = onnxneutrino.compress(
        model, data="random", metric="agreement", delta=50.0, time_limit=40.0, seed=0, threads=1
    ).report
    before, behind = report.blocks
    assert (before.layers, before.how, before.learns, before.ended_by) == (
        ("first",),
        "reconstruction",
        ("a",),
        (kind,),
    )
    assert (behind.layers[0], behind.how) == ("second", "end to end")
    assert report.training
    assert report.compressed
    assert not [warning for warning in report.warnings if "not fine-tuned" in warning or "gradient" in warning]
