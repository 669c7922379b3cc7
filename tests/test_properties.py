"""Properties that hold for every graph, on graphs that hypothesis draws (`steps_drawn.py`, `graphs_drawn.py`).

`ONNXNEUTRINO_EXAMPLES` sets how many graphs each test tries, new ones each time; without it a fixed few are tried.
"""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
from graphs_drawn import Drawn, graphs
from hypothesis import HealthCheck, Phase, assume, event, given, note, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from steps_drawn import STEPS

from onnxneutrino.differentiable import untrainable
from onnxneutrino.errors import ModelError
from onnxneutrino.finetune import Example
from onnxneutrino.forms import applicable, decompose, full_ranks
from onnxneutrino.gradcheck import derivatives
from onnxneutrino.graph import copied, fixed_shapes, tensor_types
from onnxneutrino.losses import Loss
from onnxneutrino.moments import MomentSum
from onnxneutrino.normalize import normalize
from onnxneutrino.passes import find_layers
from onnxneutrino.passes.factorize import factorize
from onnxneutrino.plan import Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

ASKED = os.environ.get("ONNXNEUTRINO_EXAMPLES")
OUTPUT_TOLERANCE = 1e-3
ITERATED_TOLERANCE = 3e-2  # alternating least squares end where they gain little
GRADIENT_TOLERANCE = 2e-2
ATTEMPTS = 4  # a kink may lie on the way; from several inputs in a row it does not
LARGEST = 1e3
NUDGE = 1e-5  # relative; what it changes by more than OUTPUT_TOLERANCE cannot be compared in single precision


def examples(count: int) -> settings:
    return settings(
        derandomize=ASKED is None,
        max_examples=int(ASKED) if ASKED else count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def outputs(model: ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(Runner(model)(inputs)[0])


def difference(one: np.ndarray, other: np.ndarray, least: float = 1e-6) -> float:
    """Largest difference, relative to the largest value or to `least`."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.float64) - other).max() / max(float(np.abs(one).max()), least))


def usable(drawn: Drawn) -> np.ndarray:
    """The graph's outputs, where the runtime computes it and single precision is enough to compare them."""
    note(drawn.text())
    inputs = drawn.inputs()
    try:
        found = outputs(drawn.model, inputs)
    except ModelError:
        assume(False)
    assume(np.isfinite(found).all() and 1e-3 < np.abs(found).max() < LARGEST)
    noise = np.random.default_rng(drawn.seed + 1).standard_normal(drawn.shape).astype(np.float32)
    assume(difference(found, outputs(drawn.model, {"x": inputs["x"] + np.float32(NUDGE) * noise})) < OUTPUT_TOLERANCE)
    for node in drawn.model.graph.node:
        event(node.op_type)
    return found


def layers_of(model: ModelProto) -> list[Layer]:
    """Its layers, however small."""
    with mock.patch.multiple(find_layers, MIN_WEIGHTS=1, MIN_RANK=1):
        listed = find_layers.find_layers(model, tensor_types(model, fixed_shapes(model, {})))
    return [entry for entry in listed if isinstance(entry, Layer)]


@examples(300)
@given(drawn=graphs(STEPS), data=st.data())
def test_normalized_and_factorized_at_full_rank_it_computes_the_same(drawn: Drawn, data: st.DataObject) -> None:
    wanted = usable(drawn)
    inputs = drawn.inputs()
    model, notes = normalize(drawn.model, [inputs], lambda own, sample: Runner(own)(sample))
    assert not [line for line in notes if " undone: " in line and not line.startswith("slim ")]
    assert difference(wanted, outputs(model, inputs)) < OUTPUT_TOLERANCE
    layers = layers_of(model)
    factors = {}
    for layer in layers:
        form = data.draw(st.sampled_from(applicable(layer.weight.shape)))
        rows = MomentSum(layer.weight[0].size)
        rows.add(np.random.default_rng(0).standard_normal((200, layer.weight[0].size)).astype(np.float32))
        fitted = decompose(form, layer.weight, layer.bias, rows.moments())
        factors[layer.name] = fitted.factors(full_ranks(form, layer.weight.shape))
        event(f"{layer.kind} as {form}")
    chains = factorize(model, layers, factors)
    iterated = any(own.form == "cp" for own in factors.values())
    # In a single output large terms may cancel, while those of a chain are rounded before they are added.
    error = difference(wanted, outputs(chains, inputs), least=0.25)
    assert error < (ITERATED_TOLERANCE if iterated else OUTPUT_TOLERANCE)


def with_zero(model: ModelProto) -> ModelProto:
    """The graph with a zero, which is trained, added to its input."""
    copy = copied(model)
    shape = [dim.dim_value for dim in copy.graph.input[0].type.tensor_type.shape.dim]
    for node in copy.graph.node:
        node.input[:] = ["moved" if name == "x" else name for name in node.input]
    copy.graph.node.insert(0, helper.make_node("Add", ["x", "zero"], ["moved"], "add"))
    copy.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "zero"))
    return copy


@examples(200)
@given(drawn=graphs(STEPS))
def test_its_training_copy_has_its_outputs_and_gradients(drawn: Drawn) -> None:
    wanted = usable(drawn)
    inputs = drawn.inputs()
    model = with_zero(drawn.model)
    copy = training_copy(model, drawn.shape[0])
    assert difference(wanted, outputs(copy, inputs)) < OUTPUT_TOLERANCE
    kept = {tensor.name for tensor in copy.graph.initializer}
    weights = [name for layer in layers_of(model) for name in layer.initializers if name in kept]
    faults = untrainable(copy, ["zero", *weights], [drawn.output])
    for _, operator in faults:
        event(f"refused: {operator}")
    if faults:
        return
    groups: list[list[str]] = [["zero"], *([weights] if weights else [])]
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng([drawn.seed, attempt])
        own = {"x": inputs["x"] + np.float32(attempt / 10) * random.standard_normal(drawn.shape).astype(np.float32)}
        values = outputs(model, own)
        target = values + np.abs(values).max() * random.standard_normal(values.shape).astype(np.float32)
        example = Example(own, [target], None)
        found = derivatives(model, copy, groups, Loss("values", (drawn.output,)), example, seed=attempt)
        wrong = [entry for entry in found if not entry.error < GRADIENT_TOLERANCE]
        if not wrong:
            return
        groups = [list(entry.names) for entry in wrong]
    pytest.fail(str(wrong))
