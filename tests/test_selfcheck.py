"""The self-check finds wrong gradients and crashing kernels, in a child process, and names the operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models_drawn import drawn
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from onnxneutrino import finetune, passes, selfcheck, training_copy, training_plan
from onnxneutrino.differentiable import differentiated
from onnxneutrino.errors import TrainingError
from onnxneutrino.finetune import Example
from onnxneutrino.graph import set_shape, tensor_types
from onnxneutrino.losses import Loss
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.selfcheck import Verdict, gradient_check
from onnxneutrino.training_plan import TrainingPlan, plan_training

BATCH = 4
VALUES = Loss("values", ("y",))


def conv_net(pads: str, batch: str = str(BATCH), middle: str = "b = Tanh (a)") -> ModelProto:
    return drawn(
        f"""
        net (float[{batch},4,8,8] x) => (float[{batch},16] y)
        <float[16,4,3,3] w0, float[16,16,3,3] w1, float[16,16] w2>
        {{
            a = Conv <{pads}, strides = [2,2]> (x, w0)  {middle}
            c = Conv <{pads}, strides = [2,2]> (b, w1)  d = Tanh (c)
            g = GlobalAveragePool (d)  f = Flatten (g)  y = MatMul (f, w2)
        }}
        """,
        scaled=True,
    )


def inputs(batch: int = BATCH) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(1).standard_normal((batch, 4, 8, 8)).astype(np.float32)}


def checked(model: ModelProto) -> Verdict:
    return gradient_check(model, [["w0"], ["w1"], ["w2"]], VALUES, Example(inputs(), Runner(model)(inputs()), None))


def planned(model: ModelProto, reconstruct: bool = False) -> TrainingPlan:
    set_shape(model.graph.input[0], ["N", 4, 8, 8])
    set_shape(model.graph.output[0], ["N", 16])
    types = tensor_types(model, {"x": (1, 4, 8, 8)})
    layers = [layer for layer in find_layers(model, types) if isinstance(layer, Layer)]
    return plan_training(model, types, layers, [], VALUES, inputs(), batch=BATCH, reconstruct=reconstruct, threads=1)


def test_right_gradients_pass() -> None:
    verdict = checked(conv_net("pads = [1,1,1,1]"))
    assert verdict.fault is None
    assert verdict.directions == 4
    assert 0 < verdict.worst < 0.05


def without_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the child, too, build artifacts whatever is known of an operator."""
    monkeypatch.setattr(finetune, "check_gradients", lambda *_: None)


def test_conv_with_same_padding_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:

    without_refusal(monkeypatch)
    model = conv_net('auto_pad = "SAME_UPPER"')
    example = Example(inputs(), Runner(model)(inputs()), None)
    moved = Example(example.inputs, selfcheck._moved(VALUES, example), None)
    verdict = selfcheck.check(model, [["w0"], ["w1"], ["w2"]], VALUES, moved)
    assert verdict.fault is not None
    assert re.search(r"gradient at 'w[01]' is .* finite differences give", verdict.fault)
    assert verdict.worst > 0.05


def test_a_crash_is_a_verdict() -> None:
    # ONNX Runtime 1.19.2: AveragePool with a symbolic batch ends the process in its gradient.
    model = conv_net("pads = [1,1,1,1]", middle="t = Tanh (a)  b = AveragePool <kernel_shape = [2,2]> (t)")
    set_shape(model.graph.input[0], ["N", 4, 8, 8])
    verdict = gradient_check(model, [["w0"]], VALUES, Example(inputs(), Runner(model)(inputs()), None))
    assert verdict.fault is not None
    assert "crashed (signal 8)" in verdict.fault


def wrong(kind: str) -> Callable[..., Verdict]:
    """A self-check that objects as long as a gradient passes an operator of this kind."""

    def check(model: ModelProto, groups: Any, loss: Loss, example: Example, threads: int) -> Verdict:
        passed = differentiated(model, ["w0", "w1", "w2"], [*loss.outputs, *loss.reconstructed])
        bad = any(node.op_type == kind for node in passed if not set(node.output) & set(loss.fed))
        return Verdict("objection" if bad else None, 1, 0.0)

    return check


def test_the_culprit_is_named_and_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_plan, "gradient_check", wrong("Tanh"))
    plan = planned(conv_net("pads = [1,1,1,1]"))
    assert plan.faulty == ("Tanh",)
    (warning,) = plan.warnings
    assert "gradient of Tanh is wrong in this model (objection)" in warning
    assert [block.reconstructed for block in plan.blocks] == [True, True, False]
    assert [block.ended_by for block in plan.blocks] == [("Tanh",), ("Tanh",), ()]


def test_where_no_single_operator_is_to_blame_nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_plan, "gradient_check", lambda *_: Verdict("objection", 1, 1.0))
    with pytest.raises(TrainingError, match="self-check failed: objection; use --trainer none"):
        planned(conv_net("pads = [1,1,1,1]"))


def test_reconstruction_cuts_between_layers_and_uses_no_labels() -> None:
    model = conv_net("pads = [1,1,1,1]")
    plan = planned(model, reconstruct=True)
    assert plan.loss.kind == "values"
    assert [block.learns for block in plan.blocks] == [("b",), ("g",), ("y",)] or plan.loss.fed[0] == "b"
    assert all(block.reconstructed for block in plan.blocks)
    values = Runner(model, plan.loss.squared)(inputs())
    assert plan.loss.scales == pytest.approx([1 / np.var(np.asarray(own, np.float64)) for own in values])


def test_a_network_without_any_gradient_is_refused_in_one_line() -> None:
    model = drawn(
        f"""
        net (float[{BATCH},4,8,8] x) => (float[{BATCH},16] y) <float[256,16] w0, float[16,16] w1>
        {{ f = Flatten (x)  s = MatMul (f, w0)  y = Sign (f2)  }}
        """.replace("y = Sign (f2)", "t = Sign (s)  y = Identity (t)"),
        scaled=True,
    )
    cut = planned(model)
    assert [block.ended_by for block in cut.blocks] == [("Sign",)]


def test_a_wrong_lowering_stops_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(model: ModelProto) -> tuple[ModelProto, list[str]]:
        copy = ModelProto()
        copy.CopyFrom(model)
        last = copy.graph.node[-1]
        half = numpy_helper.from_array(np.float32(0.5).reshape(()), "half")
        copy.graph.initializer.append(half)
        name, last.output[0] = last.output[0], "whole"
        copy.graph.node.append(helper.make_node("Mul", ["whole", "half"], [name], "halving"))
        return copy, ["halved"]

    monkeypatch.setattr(training_copy, "LOWER", (*passes.LOWER, halved))
    with pytest.raises(TrainingError, match="output 'y' of the training copy differs"):
        planned(conv_net("pads = [1,1,1,1]"))


def test_targets_of_float16_outputs_stay_finite() -> None:
    teacher = np.random.default_rng(0).standard_normal((8, 1000)).astype(np.float16) * np.float16(30)
    for loss in (Loss("classes", ("y",)), VALUES):
        (moved,) = selfcheck._moved(loss, Example({}, [teacher], None))
        assert np.isfinite(moved).all()
        assert moved.dtype == np.float32
        assert np.abs(moved - teacher).max() > 10


def test_a_check_that_cannot_be_done_is_a_note_and_blames_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "TIMEOUT", 0.01)
    verdict = checked(conv_net("pads = [1,1,1,1]"))
    assert verdict.fault is None
    assert verdict.note == "it did not end within 0.01 s"
    plan = planned(conv_net("pads = [1,1,1,1]"))
    assert plan.warnings == ("gradients were not checked: it did not end within 0.01 s",)
    assert not plan.faulty


def test_a_loss_of_zero_has_steps_too() -> None:
    model = conv_net("pads = [1,1,1,1]")
    example = Example(inputs(), Runner(model)(inputs()), None)
    assert selfcheck.check(model, [["w0"], ["w2"]], VALUES, example).fault is None
