"""Parts of a graph compute what the whole computes, and start where every way leads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from models_drawn import drawn

from onnxneutrino.errors import ModelError
from onnxneutrino.graph import tensor_types
from onnxneutrino.passes.find_layers import find_layers
from onnxneutrino.plan import Layer
from onnxneutrino.runtime import Runner
from onnxneutrino.segments import between, resting_places

NET = """
    net (float[N,16,6,6] x) => (float[N,8] y)
    <float[16,16,3,3] w0, float[16,16,3,3] w1, float[16,16,3,3] w2, float[16,16,1,1] w3, float[576,8] w4>
    {
        [c0] a = Conv <pads = [1,1,1,1]> (x, w0)   b = Relu (a)
        [c1] c = Conv <pads = [1,1,1,1]> (b, w1)   d = Relu (c)
        [c2] e = Conv <pads = [1,1,1,1]> (d, w2)   f = Add (b, e)
        s = Shape (b)  g = Reshape (f, s)
        [c3] h = Conv (g, w3)  i = Flatten (h)
        [m4] y = MatMul (i, w4)
    }
"""


MODEL = drawn(NET)
TYPES = tensor_types(MODEL, {"x": (1, 16, 6, 6)})
LAYERS = [layer for layer in find_layers(MODEL, TYPES) if isinstance(layer, Layer)]


def test_layers_start_at_the_last_place_that_every_way_passes() -> None:
    found = resting_places(MODEL, TYPES, LAYERS, ["y"], np.inf)
    # Within the residual it is b; the last layer reads the map h, for its Flatten goes with it.
    assert found == {"c0": None, "c1": "b", "c2": "b", "c3": "g", "m4": "h"}


def test_what_is_too_large_to_keep_is_no_place() -> None:
    assert set(resting_places(MODEL, TYPES, LAYERS, ["y"], 16 * 36 - 1).values()) == {None}


@pytest.mark.parametrize(("start", "tensors"), [("b", ["f"]), ("g", ["y"]), ("h", ["i", "y"]), (None, ["d"])])
def test_a_part_computes_what_the_whole_does(start: str | None, tensors: Sequence[str]) -> None:
    x = np.random.default_rng(1).standard_normal((3, 16, 6, 6)).astype(np.float32)
    part = between(MODEL, start, tensors, TYPES)
    given = {"x": x} if start is None else {"x": x, start: Runner(MODEL, [start])({"x": x})[0]}
    for own, whole in zip(Runner(part)(given), Runner(MODEL, tensors)({"x": x}), strict=True):
        np.testing.assert_allclose(own, whole, rtol=1e-5, atol=1e-5)
    if start == "g":
        assert [node.name for node in part.graph.node] == ["c3", "Flatten_9", "m4"]
        assert {tensor.name for tensor in part.graph.initializer} == {"w3", "w4"}
        assert [value.name for value in part.graph.input] == ["g"]


def test_another_value_at_the_start_gives_another_result() -> None:
    x = np.zeros((1, 16, 6, 6), np.float32)
    part = between(MODEL, "b", ["y"], TYPES)
    ones, zeros = (Runner(part)({"x": x, "b": np.full(x.shape, value, np.float32)})[0] for value in (1, 0))
    assert np.abs(ones - zeros).max() > 1


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensor 'q'"):
        between(MODEL, "b", ["q"], TYPES)
