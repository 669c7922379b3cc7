"""Where a network is cut, what its blocks learn, and that gradients stay within them."""

from __future__ import annotations

import numpy as np
from models_drawn import drawn
from onnx import numpy_helper

from onnxneutrino.blocks import Cut, blocks, bottlenecks, cut_at_faults, cut_between_layers
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner

BATCH = 4


CHAIN = f"""
    net (float[{BATCH},6] x) => (float[{BATCH},3] y) <float[6,5] w0, float[5,4] w1, float[4,3] w2>
    {{ a = MatMul (x, w0)  b = Sign (a)  c = MatMul (b, w1)  d = Relu (c)  y = MatMul (d, w2) }}
"""
WEIGHTS = ["w0", "w1", "w2"]
LAYERS = {"first": ["w0"], "second": ["w1"], "third": ["w2"]}


def test_a_network_without_faults_is_not_cut() -> None:
    model = drawn(CHAIN.replace("Sign", "Tanh"))
    cut = cut_at_faults(model, WEIGHTS, ["y"])
    assert (cut.fed, cut.learned) == ((), ())
    (block,) = blocks(model, cut, LAYERS)
    assert block.layers == ("first", "second", "third")
    assert block.learns == ("y",)
    assert not block.reconstructed


def test_before_a_fault_the_input_is_learned_and_behind_it_the_output_is_given() -> None:
    model = drawn(CHAIN)
    cut = cut_at_faults(model, WEIGHTS, ["y"])
    assert cut.fed == ("b",)
    assert cut.learned == ("a",)
    assert cut.ends == ("y",)
    first, rest = blocks(model, cut, LAYERS)
    assert (first.layers, first.learns, first.reconstructed, first.ended_by) == (("first",), ("a",), True, ("Sign",))
    assert (rest.layers, rest.learns, rest.reconstructed, rest.ended_by) == (("second", "third"), ("y",), False, ())


def test_a_fault_that_nothing_trained_reaches_only_runs() -> None:
    model = drawn(CHAIN)
    cut = cut_at_faults(model, ["w1", "w2"], ["y"])
    assert (cut.fed, cut.learned) == ((), ())


def test_faults_in_a_row_are_one_cut() -> None:
    model = drawn(CHAIN.replace("b = Sign (a)", "s = Floor (a)  t = Round (s)  b = Sign (t)"))
    cut = cut_at_faults(model, WEIGHTS, ["y"])
    assert cut.fed == ("b",)
    assert cut.learned == ("a",)


def test_an_operator_named_faulty_is_a_cut() -> None:
    model = drawn(CHAIN.replace("Sign", "Tanh"))
    cut = cut_at_faults(model, WEIGHTS, ["y"], ["Tanh"])
    assert (cut.fed, cut.learned) == (("b",), ("a",))


def test_a_fault_at_the_output_leaves_reconstruction_alone() -> None:
    model = drawn(CHAIN.replace("Sign", "Tanh").replace("y = MatMul (d, w2)", "e = MatMul (d, w2)  y = Sign (e)"))
    cut = cut_at_faults(model, WEIGHTS, ["y"])
    assert cut.learned == ("e",)
    assert cut.fed == ()
    assert cut.ends == ()
    (block,) = blocks(model, cut, LAYERS)
    assert block.reconstructed
    assert block.layers == ("first", "second", "third")


def test_a_branch_of_an_if_is_no_way_for_a_gradient() -> None:
    text = f"""
        net (float[{BATCH},6] x, bool c) => (float[{BATCH},4] y) <float[6,5] w0, float[5,4] w1>
        {{
            a = MatMul (x, w0)
            b = If (c) <
                then_branch = p () => (float[{BATCH},5] t) {{ t = Neg (a) }},
                else_branch = q () => (float[{BATCH},5] e) {{ e = Abs (a) }}>
            y = MatMul (b, w1)
        }}
    """
    cut = cut_at_faults(drawn(text), ["w0", "w1"], ["y"])
    assert (cut.fed, cut.learned) == (("b",), ("a",))
    assert cut.faults["a"] == "If"


RESIDUAL = f"""
    net (float[{BATCH},6] x) => (float[{BATCH},6] y) <float[6,6] w0, float[6,6] w1, float[6,6] w2, float[6,6] w3>
    {{
        a = MatMul (x, w0)  b = Relu (a)
        c = MatMul (b, w1)  d = Relu (c)  e = MatMul (d, w2)  f = Add (b, e)
        s = Shape (b)  g = Reshape (f, s)
        y = MatMul (g, w3)
    }}
"""


def test_bottlenecks_are_where_every_way_passes() -> None:
    # x, its product and its Relu; then the two ways of the residual meet in f. Shape is no way.
    assert bottlenecks(drawn(RESIDUAL), ["y"]) == {"a", "b", "f", "g", "y"}


def test_cuts_between_layers_keep_a_residual_together() -> None:
    model = drawn(RESIDUAL)
    names = ["w0", "w1", "w2", "w3"]
    cut = cut_between_layers(model, Cut(ends=("y",)), names, ["y"], ["x", "b", "d", "g"])
    assert cut.fed == ("b", "g")
    assert cut.learned == ("b", "g")
    found = blocks(model, cut, {name: [name] for name in names})
    assert [block.layers for block in found] == [("w0",), ("w1", "w2"), ("w3",)]
    assert [block.learns for block in found] == [("b",), ("g",), ("y",)]


def test_gradients_are_those_of_the_block_alone() -> None:
    model = drawn(CHAIN)
    cut = cut_at_faults(model, WEIGHTS, ["y"])
    loss = Loss("values", ("y",), reconstructed=cut.learned, fed=cut.fed, scales=(2.0, 5.0))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((BATCH, 6)).astype(np.float32)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    a = Runner(model, ["a"])({"x": x})[0]
    y_target, a_target = rng.standard_normal((BATCH, 3)), rng.standard_normal((BATCH, 5))
    fed = rng.standard_normal((BATCH, 5)).astype(np.float32)
    with Trainer(model, WEIGHTS, loss, 1) as trainer:
        gradients = trainer.gradients(Example({"x": x}, [y_target, a_target, fed], None))
    # Both errors are means, and the loss is the mean over the two tensors.
    own = x.T @ ((a - a_target) * 2 / a.size * 5.0 / 2)
    np.testing.assert_allclose(gradients["w0"], own, rtol=1e-4, atol=1e-6)
    hidden = fed @ held["w1"]
    positive = np.maximum(hidden, 0)
    error = (positive @ held["w2"] - y_target) * 2 / y_target.size * 2.0 / 2
    np.testing.assert_allclose(gradients["w2"], positive.T @ error, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients["w1"], fed.T @ (error @ held["w2"].T * (hidden > 0)), rtol=1e-4, atol=1e-6)
