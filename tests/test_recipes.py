"""Optimizers, schedules and the moving average of weights, against their formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino.finetune import MAX_GRADIENT_NORM, Arrays, Example, Trainer, fine_tune
from onnxneutrino.losses import Loss
from onnxneutrino.schedules import Schedule, averaged, peak

LOSS = Loss("values", ("y",))
NAMES = ["w1", "b1", "w2"]


def network() -> ModelProto:
    model = parse_model(
        """<ir_version: 8, opset_import: ["": 17]> net (float[4, 6] x) => (float[4, 3] y) {
        h = Gemm (x, w1, b1)  t = Tanh (h)  y = MatMul (t, w2) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (6, 5)), ("b1", (5,)), ("w2", (5, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


def examples(size: float = 1.0) -> Iterator[Example]:
    for seed in itertools.count():
        rng = np.random.default_rng(seed)
        x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 6), (4, 3)))
        yield Example({"x": x}, [np.float32(size) * y], None)


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_a_step_of_sgd_is_the_rate_times_the_clipped_gradient(size: float) -> None:
    with Trainer(network(), NAMES, LOSS, 1, "sgd") as trainer:
        for example in itertools.islice(examples(size), 3):
            before, gradients = trainer.arrays(), trainer.gradients(example)
            norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values()))
            scale = min(1.0, MAX_GRADIENT_NORM / norm)
            trainer.step(example, 0.05)
            for name, array in trainer.arrays().items():
                wanted = before[name] - 0.05 * scale * gradients[name]
                np.testing.assert_allclose(array, wanted, rtol=1e-6, atol=1e-7)
                assert not np.array_equal(array, before[name])


@pytest.mark.parametrize("steps", [1, 2, 40, 1000])
def test_schedules_warm_up_alike_and_then_differ(steps: int) -> None:
    kinds: dict[str, Any] = {kind: Schedule(steps, 8, 0.1, kind) for kind in ("cosine", "step", "constant")}
    rates = {kind: np.array([own.rate(step) for step in range(steps)]) for kind, own in kinds.items()}
    warmup = max(1, round(0.05 * steps))
    for own in rates.values():
        np.testing.assert_allclose(own[:warmup], 0.1 * np.arange(1, warmup + 1) / warmup)
    np.testing.assert_allclose(rates["constant"][warmup:], 0.1)
    share = np.arange(steps) / steps
    tenths = (share >= 0.5).astype(int) + (share >= 0.75)
    np.testing.assert_allclose(rates["step"][warmup:], 0.1 * 0.1 ** tenths[warmup:])
    assert np.array_equal(rates["cosine"], [Schedule(steps, 8, 0.1).rate(step) for step in range(steps)])


def test_the_average_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    seen = [{"w": rng.standard_normal(7).astype(np.float32)} for _ in range(30)]
    average: Arrays = seen[0]
    wanted = seen[0]["w"].astype(np.float64)
    for step, arrays in enumerate(seen[1:]):
        average = averaged(average, arrays, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * arrays["w"]
    np.testing.assert_allclose(average["w"], wanted, rtol=1e-5, atol=1e-6)


def test_what_is_looked_at_and_returned_is_the_average_of_the_weights_that_training_had() -> None:
    """The averaging itself changes nothing in the training."""

    class Recorded:
        """A trainer that keeps its arrays after every step."""

        def __init__(self, trainer: Trainer) -> None:
            self.trainer, self.batch, self.seen = trainer, trainer.batch, [trainer.arrays()]

        def step(self, example: Example, rate: float) -> float:
            loss = self.trainer.step(example, rate)
            self.seen.append(self.trainer.arrays())
            return loss

        def arrays(self) -> Arrays:
            return self.trainer.arrays()

    looked: dict[int, Arrays] = {}

    def look(arrays: Arrays, step: int, share: float) -> bool:
        looked[step] = arrays
        return False

    with Trainer(network(), NAMES, LOSS, 1) as trainer:
        own: Any = Recorded(trainer)
        trained = fine_tune(own, examples(), seconds=0, learning_rate=0.01, weight_average=0.7, steps=12, look=look)
    wanted = [own.seen[0]]
    for step, arrays in enumerate(own.seen[1:]):
        decay = min(0.7, (1 + step) / (10 + step))
        wanted.append({name: decay * wanted[-1][name] + (1 - decay) * arrays[name] for name in arrays})
    for name in NAMES:
        np.testing.assert_allclose(trained.arrays[name], wanted[-1][name], rtol=1e-5, atol=1e-6)
        for step, arrays in looked.items():
            np.testing.assert_allclose(arrays[name], wanted[step][name], rtol=1e-5, atol=1e-6)
    assert sorted(looked) == [3, 6, 9]
    with Trainer(network(), NAMES, LOSS, 1) as trainer:
        plain = fine_tune(trainer, examples(), seconds=0, learning_rate=0.01, steps=12)
    assert plain.losses == trained.losses
    for name in NAMES:
        np.testing.assert_array_equal(plain.arrays[name], own.seen[-1][name])


def test_a_short_fine_tune_peaks_at_a_lower_rate() -> None:
    assert [peak(0.01, steps, 1600) for steps in (1, 100, 400, 1600, 6400)] == pytest.approx(
        [0.01 / 1600, 0.000625, 0.0025, 0.01, 0.01]
    )
    with Trainer(network(), NAMES, LOSS, 1) as trainer:
        trained = fine_tune(trainer, examples(), seconds=0, learning_rate=0.01, long_run=400, steps=4)
        assert trained.schedule == Schedule(4, 4, peak(0.01, 4, 400))
        assert fine_tune(trainer, examples(), seconds=0, learning_rate=0.01, steps=4).schedule.learning_rate == 0.01


@pytest.mark.parametrize("shape", ["cosine", "step", "constant"])
def test_a_fine_tune_steps_at_the_rates_of_its_schedule(shape: str) -> None:
    rates: list[float] = []
    with Trainer(network(), NAMES, LOSS, 1) as trainer:
        original = trainer.step

        def step(example: Example, rate: float) -> float:
            rates.append(rate)
            return original(example, rate)

        trainer.step = step  # type: ignore[method-assign]
        result = fine_tune(trainer, examples(), seconds=0, learning_rate=0.01, shape=shape, steps=20)
    assert result.schedule == Schedule(20, 4, 0.01, shape)
    assert rates == [replace(result.schedule).rate(step) for step in range(20)]
