"""The rewritten training graph against the runtime's own ConvGrad, ReluGrad and GatherGrad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from models_drawn import drawn, random
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxneutrino import blocked_layout, finetune, gradient_graph
from onnxneutrino.blocked_layout import BLOCKED, channel_block
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.gradient_graph import faster_gradients
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

MICROSOFT = "com.microsoft"
GRADIENTS = ("dx", "dw", "db")


def conv_pair(
    x: Sequence[int],
    w: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    wanted: Sequence[str] = GRADIENTS,
) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
    """A graph of a Conv and its ConvGrad, and values for its inputs X, W and dY."""
    rank = len(x) - 2
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w[2:], strict=True)]
    out = [(x[2 + i] + pads[i] + pads[rank + i] - reach[i]) // strides[i] + 1 for i in range(rank)]
    shapes = {"x": [*x], "w": [*w], "dy": [x[0], w[0], *out]}
    values = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    settings = {"strides": strides, "pads": pads, "dilations": dilations, "group": group, "kernel_shape": [*w[2:]]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "forward", **settings),
        helper.make_node(
            "ConvGrad",
            ["dy", "x", "w"],
            [name if name in wanted else "" for name in GRADIENTS],
            "backward",
            domain=MICROSOFT,
            **settings,
        ),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *wanted)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "pair", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), values


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def assert_same(model: ModelProto, values: dict[str, NDArray[Any]]) -> ModelProto:
    """Both graphs give the same outputs, and the new one the same bits again; returns the new one."""
    made = faster_gradients(model)
    stock, faster = Runner(model, threads=1), Runner(made, threads=2)
    found = faster(values)
    for name, expected, own, again in zip(stock.names, stock(values), found, faster(values), strict=True):
        assert own.shape == expected.shape, name
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        np.testing.assert_array_equal(own, again)
    return made


# X, W, strides, pads, dilations, group; and whether ConvGrad still gives dX.
DENSE = {
    "3x3": ((2, 3, 7, 6), (4, 3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, False),
    "1x1": ((2, 5, 4, 3), (6, 5, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, False),
    "3x1": ((3, 4, 8, 5), (2, 4, 3, 1), (1, 1), (1, 0, 1, 0), (1, 1), 1, False),
    "1x4, asymmetric": ((2, 3, 5, 9), (4, 3, 1, 4), (1, 1), (0, 2, 0, 1), (1, 1), 1, False),
    "valid": ((2, 3, 9, 9), (4, 3, 3, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1, False),
    "dilated": ((2, 3, 9, 8), (4, 3, 3, 3), (1, 1), (2, 1, 2, 0), (2, 1), 1, False),
    "pads beyond the kernel": ((2, 3, 5, 5), (4, 3, 2, 2), (1, 1), (2, 0, 0, 0), (1, 1), 1, True),
    "kernel as large as the map": ((2, 3, 4, 4), (5, 3, 4, 4), (1, 1), (0, 0, 0, 0), (1, 1), 1, True),
    "stride 2": ((2, 3, 9, 8), (4, 3, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, True),
    "stride 1x2": ((2, 3, 6, 8), (4, 3, 1, 3), (1, 2), (0, 1, 0, 1), (1, 1), 1, True),
    "two groups": ((2, 4, 6, 6), (6, 2, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, True),
    "channel multiplier": ((2, 4, 6, 6), (8, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4, True),
    "1-D": ((2, 3, 11), (4, 3, 3), (1,), (2, 0), (1,), 1, False),
    "3-D": ((2, 3, 4, 5, 6), (4, 3, 3, 1, 2), (1, 1, 1), (1, 0, 1, 1, 0, 0), (1, 1, 1), 1, False),
}
# X, W's kernel, strides, pads, dilations. Channels in whole blocks of any processor, or not.
DEPTHWISE = {
    "3x3": ((2, 32, 7, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "1x3": ((1, 16, 8, 8), (1, 3), (1, 1), (0, 1, 0, 1), (1, 1)),
    "5x1, valid": ((2, 16, 8, 5), (5, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "asymmetric": ((2, 16, 6, 7), (3, 2), (1, 1), (2, 0, 0, 1), (1, 1)),
    "dilated": ((2, 16, 9, 8), (3, 3), (1, 1), (2, 1, 2, 1), (2, 1)),
    "stride 2": ((2, 16, 8, 8), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "stride 2, a rest that no kernel reaches": ((2, 16, 8, 10), (3, 1), (2, 3), (0, 0, 0, 0), (1, 1)),
    "stride 3x1, dilated": ((2, 16, 11, 8), (2, 3), (3, 1), (0, 2, 1, 2), (2, 2)),
    "channels in no whole blocks": ((16, 5, 6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "maps in no whole blocks": ((3, 5, 6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "large map": ((1, 16, 20, 20), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}


# X, W, strides, pads, dilations; and whether ConvGrad still gives dW: batches in whole blocks of any processor, or not.
CORRELATED = {
    "3x3": ((16, 8, 6, 5), (12, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "1x3, two blocks of images": ((32, 8, 4, 8), (8, 8, 1, 3), (1, 1), (0, 1, 0, 1), (1, 1), False),
    "asymmetric": ((16, 8, 4, 5), (20, 8, 2, 4), (1, 1), (1, 2, 0, 1), (1, 1), False),
    "valid": ((16, 8, 6, 6), (8, 8, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "dilated": ((16, 8, 7, 6), (8, 8, 3, 3), (1, 1), (2, 1, 2, 1), (2, 1), False),
    "pads beyond the kernel": ((16, 8, 5, 5), (8, 8, 2, 2), (1, 1), (2, 0, 0, 0), (1, 1), False),
    "kernel as large as the map": ((16, 12, 4, 4), (8, 12, 4, 4), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "stride 2": ((16, 16, 8, 8), (8, 16, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), False),
    "stride 3x2, dilated, a rest unread": ((16, 16, 9, 10), (8, 16, 2, 3), (3, 2), (0, 0, 0, 0), (2, 1), False),
    "kernels from X": ((16, 16, 5, 5), (6, 16, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "kernels from X, asymmetric, dilated": ((16, 16, 5, 6), (5, 16, 2, 3), (1, 1), (0, 2, 1, 1), (1, 2), False),
    "channels in no whole fours": ((16, 6, 5, 5), (7, 6, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True),
    "images in no whole blocks": ((10, 8, 5, 5), (8, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True),
    "1x1": ((16, 8, 5, 5), (8, 8, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), True),
    "large map": ((16, 64, 34, 34), (64, 64, 3, 1), (1, 1), (1, 0, 1, 0), (1, 1), True),
}
# X, W, strides, pads, dilations; channels of any processor's blocks, and those that fill one.
IN_BLOCKS = {
    "3x3": ((2, 16, 6, 5), (32, 16, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "filled blocks": ((2, 28, 5, 7), (44, 28, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "1x3, asymmetric": ((3, 28, 5, 7), (28, 28, 1, 3), (1, 1), (0, 2, 0, 0), (1, 1)),
    "dilated, valid": ((2, 16, 16, 15), (16, 16, 3, 3), (1, 1), (0, 0, 0, 0), (2, 1)),
    "stride 2x1": ((2, 16, 9, 8), (16, 16, 3, 3), (2, 1), (1, 1, 1, 1), (1, 1)),
}


@pytest.mark.parametrize("case", CORRELATED)
def test_dense_weight_gradients_equal_convgrad(case: str) -> None:
    *geometry, stock = CORRELATED[case]
    made = assert_same(*conv_pair(*geometry, 1, ("dw", "db")))  # type: ignore[arg-type]
    assert kinds(made)["ConvGrad"] == int(stock or not channel_block())


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_dense_convs_in_blocks_equal_the_stock_ones(case: str) -> None:
    geometry = IN_BLOCKS[case]
    made = assert_same(*conv_pair(*geometry, 1, ("dx",)))
    convs = [node.domain for node in made.graph.node if node.op_type == "Conv"]
    expected = 2 if max(geometry[2]) == 1 else 1
    assert convs == [BLOCKED if channel_block() else ""] * expected


def test_a_processor_without_blocks_keeps_the_usual_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gradient_graph, blocked_layout):
        monkeypatch.setattr(module, "channel_block", lambda: 0)
    for geometry, group in (
        (CORRELATED["3x3"][:-1], 1),
        ((*DEPTHWISE["3x3"][:1], (32, 1, 3, 3), *DEPTHWISE["3x3"][2:]), 32),
    ):
        made = assert_same(*conv_pair(*geometry, group))  # type: ignore[arg-type]
        assert BLOCKED not in {node.domain for node in made.graph.node}


@pytest.mark.parametrize("case", DENSE)
def test_dense_gradients_equal_convgrad(case: str) -> None:
    *geometry, stock = DENSE[case]
    made = assert_same(*conv_pair(*geometry))  # type: ignore[arg-type]
    (left,) = (node for node in made.graph.node if node.op_type == "ConvGrad")
    assert bool(left.output[0]) == stock
    assert kinds(made)["Conv"] == (1 if stock else 2)


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_gradients_equal_convgrad(case: str) -> None:
    x, kernel, strides, pads, dilations = DEPTHWISE[case]
    made = assert_same(*conv_pair(x, (x[1], 1, *kernel), strides, pads, dilations, x[1]))
    if not channel_block():
        pytest.skip("no blocked layout on this processor: ConvGrad keeps dW")
    kept = case in ("large map", "maps in no whole blocks") or max(strides) > 1
    assert kinds(made)["ConvGrad"] == int(kept)
    assert kinds(assert_same(*conv_pair(x, (x[1], 1, *kernel), strides, pads, dilations, x[1], ("dw", "db"))))[
        "ConvGrad"
    ] == int(case in ("large map", "maps in no whole blocks"))


@pytest.mark.parametrize("wanted", [("dw",), ("dx",), ("dx", "dw"), ("dw", "db")])
@pytest.mark.parametrize("group", [1, 16])
def test_outputs_that_nobody_wants_are_not_made(wanted: tuple[str, ...], group: int) -> None:
    model, values = conv_pair((2, 16, 6, 6), (16, 16 // group, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), group, wanted)
    made = assert_same(model, values)
    if wanted == ("dx",):
        assert not kinds(made)["ConvGrad"]


def test_unknown_shapes_and_auto_pad_keep_their_nodes() -> None:
    model, _ = conv_pair((2, 3, 6, 6), (4, 3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    padded = ModelProto()
    padded.CopyFrom(model)
    for node in padded.graph.node:
        node.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    assert faster_gradients(padded).graph.node == padded.graph.node
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert faster_gradients(model).graph.node == model.graph.node


def test_relu_gradient_is_exact() -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in ("dy", "y", "dx")]
    node = helper.make_node("ReluGrad", ["dy", "y"], ["dx"], domain=MICROSOFT)
    graph = helper.make_graph([node], "relu", info[:2], info[2:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    y = random(64, seed=1)
    y[:6] = [0.0, -0.0, np.finfo(np.float32).tiny, -np.finfo(np.float32).tiny, np.finfo(np.float32).max, 1e-30]
    values = {"dy": random(64), "y": y}
    made = faster_gradients(model)
    assert not kinds(made)["ReluGrad"]
    np.testing.assert_array_equal(Runner(made)(values)[0], np.where(y > 0, values["dy"], 0))


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [2, 0, 3, 3], [3, 1]], ids=["all once", "one twice", "not all"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_gather_that_changes_the_order_is_undone_by_one(order: list[int], axis: int) -> None:
    shape, picked = [4, 4, 3], [4, 4, 3]
    picked[axis] = len(order)
    floats = {"x": shape, "dy": picked, "y": picked, "dx": shape}
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, own) for name, own in floats.items()}
    nodes = [
        helper.make_node("Gather", ["x", "order"], ["y"], axis=axis),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("GatherGrad", ["shape", "order", "dy"], ["dx"], domain=MICROSOFT, axis=axis),
    ]
    stored = [helper.make_tensor("order", TensorProto.INT64, [len(order)], order)]
    graph = helper.make_graph(nodes, "gather", [info["x"], info["dy"]], [info["y"], info["dx"]], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    made = faster_gradients(model)
    assert bool(kinds(made)["GatherGrad"]) == (sorted(order) != [0, 1, 2, 3])
    values = {"x": random(*shape), "dy": random(*picked, seed=1)}
    for found, expected in zip(Runner(made)(values), Runner(model)(values), strict=True):
        np.testing.assert_array_equal(found, expected)


NET = """
    net (float[N,3,8,8] x) => (float[N,5] y)
    <float[16,3,3,3] w0, float[16] b0, float[16,1,3,1] w1, float[16,1,1,3] w2, float[16] b2, float[20,16,1,1] w3,
     float[8,20,3,3] w4, float[5,8] w5, float[5] b5>
    {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)  r = Relu (a)
        b = Conv <group = 16, pads = [1,0,1,0]> (r, w1)
        c = Conv <group = 16, pads = [0,1,0,1]> (b, w2, b2)  d = Conv (c, w3)  s = Relu (d)
        e = Conv <strides = [2,2], pads = [1,1,1,1]> (s, w4)
        g = GlobalAveragePool (e)  f = Flatten (g)  y = Gemm <transB = 1> (f, w5, b5)
    }
"""


# A stretch that stays blocked, forward and backward, with a residual, a pool and channels that fill a block.
STRETCH = """
    net (float[N,3,8,8] x) => (float[N,5] y)
    <float[28,3,3,3] w0, float[28] b0, float[44,28,3,3] w1, float[44] b1, float[28,44,3,3] w2, float[28] b2,
     float[28,28,3,1] w3, float[28] b3, float[28,28,1,3] w4, float[5,28] w5, float[5] b5>
    {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)  r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w1, b1)  s = Relu (c)
        d = Conv <pads = [1,1,1,1]> (s, w2, b2)  e = Add (d, r)  t = Relu (e)
        p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
        f = Conv <pads = [1,0,1,0]> (p, w3, b3)  g = Conv <pads = [0,1,0,1]> (f, w4)  h = Add (g, p)  u = Relu (h)
        m = GlobalAveragePool (u)  v = Flatten (m)  y = Gemm <transB = 1> (v, w5, b5)
    }
"""


def gradients_both_ways(text: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> ModelProto:
    """The rewritten graph of a Trainer, whose gradients are those of the stock graph."""
    model = drawn(text, scaled=True)
    names = [tensor.name for tensor in model.graph.initializer]
    copy = training_copy(model, batch)
    example = Example({"x": random(batch, 3, 8, 8)}, [random(batch, 5, seed=1)], None)
    seen: list[ModelProto] = []

    def watched(given: ModelProto) -> ModelProto:
        seen.append(faster_gradients(given))
        return seen[-1]

    monkeypatch.setattr(finetune, "faster_gradients", watched)
    with Trainer(copy, names, Loss("values", ("y",)), 1) as trainer:
        found = trainer.gradients(example)
    monkeypatch.setattr(finetune, "faster_gradients", lambda given: given)
    with Trainer(copy, names, Loss("values", ("y",)), 1) as trainer:
        expected = trainer.gradients(example)
    assert sorted(found) == sorted(names)
    for name in names:
        assert np.linalg.norm(found[name] - expected[name]) <= 1e-4 * np.linalg.norm(expected[name]), name
    (graph,) = seen
    return graph


def test_a_trainer_gives_the_gradients_of_the_stock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = gradients_both_ways(NET, 16, monkeypatch)
    assert not kinds(graph)["ReluGrad"]
    # dX and dW of the strided w4 are left, and dW of w3, which is 1x1.
    left = [node for node in graph.graph.node if node.op_type == "ConvGrad"]
    assert [bool(node.output[0]) for node in left] == [True, False] or not channel_block()


@pytest.mark.parametrize("batch", [16, 3])
def test_a_stretch_of_a_network_stays_blocked(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = gradients_both_ways(STRETCH, batch, monkeypatch)
    if not channel_block():
        pytest.skip("no blocked layout on this processor")
    found = Counter((node.op_type, node.domain) for node in graph.graph.node)
    # w1 to w4 forward and for dX; their dW where the batch makes whole blocks.
    assert found["Conv", BLOCKED] == (12 if batch == 16 else 8)
    makers = {name: node.op_type for node in graph.graph.node for name in node.output}
    again = [node for node in graph.graph.node if makers.get(node.input[0]) == "ReorderOutput"]
    assert "ReorderInput" not in {node.op_type for node in again}
    # Both Relus of a stretch, and the Add before the second, are made of blocked maps.
    made = {makers.get(name) for node in graph.graph.node if node.op_type == "Relu" for name in node.input}
    assert {"Conv", "Add"} <= made
    assert not any(node.op_type == "Relu" for node in again)
