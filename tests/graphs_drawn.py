"""Hypothesis draws small graphs here: a chain of operators with random attributes, with branches back into it.

`graphs()` is the strategy. A step that does not fit the tensor it meets (its rank, its size, the opset) is left out,
so that a smaller example is always a simpler graph. `steps_drawn` holds the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

MOST_STEPS = 6
TRIES = 2  # steps drawn for one that fits
MOST_ELEMENTS = 2000  # of one tensor
OPSETS = (13, 14, 15, 16, 17, 18, 19, 20, 21)
T = TypeVar("T")


class Misfit(Exception):  # noqa: N818 - a step that is left out
    """A step cannot follow the graph as it is."""


class Draft:
    """A graph in the making: `value` is the tensor that the next step reads, `shape` its shape."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any], opset: int, shape: Sequence[int]) -> None:
        self.draw = draw
        self.opset = opset
        self.random = np.random.default_rng(draw(st.integers(0, 999)))
        self.value = "x"
        self.shapes: dict[str, tuple[int, ...]] = {"x": tuple(shape)}
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.value]

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes behind batch and channels; there is at least one.

        Raises:
            Misfit: the tensor is no map.
        """
        self.need(len(self.shape) in (3, 4, 5))
        return self.shape[2:]

    def need(self, holds: bool) -> None:
        if not holds:
            raise Misfit

    def pick(self, *choices: T) -> T:
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def size(self, low: int, high: int) -> int:
        self.need(low <= high)
        return int(self.draw(st.integers(low, high)))

    def each(self, low: int, high: int, count: int) -> list[int]:
        return [self.size(low, high) for _ in range(count)]

    def weight(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> str:
        return self.store(self.random.standard_normal(shape) * scale + shift, np.float32)

    def store(self, value: Any, kind: Any = np.int64) -> str:
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(value, kind)
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> None:
        """A node that reads `value` and then `inputs`; its first output is the new `value`.

        Raises:
            Misfit: inference refuses it, or its output is empty or large.
        """
        self.join(operator, self.value, *inputs, outputs=outputs, **attributes)

    def join(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> None:
        """A node that reads `inputs` alone."""
        index = len(self.nodes)
        names = [f"t{index}", *(f"t{index}_{extra}" for extra in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, inputs, names, f"{operator}_{index}", **attributes))
        try:
            seen = onnx.shape_inference.infer_shapes(self.model(names), strict_mode=True, data_prop=True)
        except Exception as error:  # whatever inference says: this attribute does not fit
            raise Misfit from error
        for value in seen.graph.output:
            kind = value.type.tensor_type
            self.need(kind.HasField("shape") and all(dim.dim_value > 0 for dim in kind.shape.dim))
            self.shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
            self.need(int(np.prod(self.shapes[value.name])) <= MOST_ELEMENTS)
        self.value = names[0]

    def earlier(self, fits: Callable[[tuple[int, ...]], bool]) -> list[str]:
        """Tensors of the graph whose shape fits."""
        return [name for name, shape in self.shapes.items() if fits(shape)]

    def model(self, outputs: Sequence[str]) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shapes["x"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes.get(name)) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)

    def attempt(self, step: Callable[[Draft], None]) -> bool:
        """Take a step, or leave no trace of it."""
        value, nodes, names = self.value, len(self.nodes), len(self.arrays)
        shapes = dict(self.shapes)
        try:
            step(self)
        except Misfit:
            self.value, self.shapes = value, shapes
            del self.nodes[nodes:]
            self.arrays = dict(list(self.arrays.items())[:names])
            return False
        return True


@dataclass(frozen=True)
class Drawn:
    """A model with one input `x` and one output, and a seed for its inputs."""

    model: ModelProto
    seed: int

    def text(self) -> str:
        """The graph in ONNX's text form."""
        return str(onnx.printer.to_text(self.model))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.dim_value for dim in self.model.graph.input[0].type.tensor_type.shape.dim)

    @property
    def output(self) -> str:
        return str(self.model.graph.output[0].name)

    def inputs(self) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(self.seed).standard_normal(self.shape).astype(np.float32)}


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[Any]], Any], steps: Sequence[Callable[[Draft], None]]) -> Drawn:
    """One to six of `steps` on a map of one to three dimensions, or on vectors; batch 1 to 3."""
    axes = draw(st.sampled_from((2, 2, 1, 0, 3)))
    space = [draw(st.integers(3, 7 if axes < 3 else 4)) for _ in range(axes)]
    channels = draw(st.sampled_from((1, 2, 4, 6, 8)))
    draft = Draft(draw, draw(st.sampled_from(OPSETS)), [draw(st.integers(1, 3)), channels, *space])
    wanted = draw(st.sampled_from(range(1, MOST_STEPS + 1)))
    taken = 0
    for _ in range(TRIES * wanted):
        taken += taken < wanted and draft.attempt(draw(st.sampled_from(steps)))
    if not taken:
        draft.add("Tanh")
    return Drawn(draft.model([draft.value]), draw(st.integers(0, 99)))
