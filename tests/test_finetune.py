"""Fine-tuning through the real artifacts: gradients against finite differences, AdamW against NumPy."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

from onnxneutrino import clock, finetune, range_test
from onnxneutrino.errors import TrainingError
from onnxneutrino.finetune import Example, Trainer, fine_tune
from onnxneutrino.graph import arrays, with_arrays
from onnxneutrino.losses import Loss, loss_inputs, teacher_loss
from onnxneutrino.prefetch import prefetched
from onnxneutrino.schedules import Schedule
from onnxneutrino.training_copy import training_copy

BATCH = 4
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'

NETS = {
    "small": """
        net (float[N,3,8,8] x) => (float[N,5] y)
        <float[6,3,3,3] w0, float[6] b0, float[5,96] w1, float[5] b1>
        {
            c = Conv <pads = [1,1,1,1]> (x, w0, b0)  r = Relu (c)
            m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
            f = Flatten (m)  y = Gemm <transB = 1> (f, w1, b1)
        }
    """,
    # 1x1, kx1 and 1xk with stride, asymmetric padding and dilation, depthwise of both kinds, 1x1.
    "chain": """
        net (float[N,3,9,10] x) => (float[N,5] y)
        <float[4,3,1,1] w0, float[5,4,3,1] w1, float[6,5,1,3] w2, float[6,1,3,1] w3, float[6,1,1,3] w4,
         float[5,6,1,1] w5, float[5] b5>
        {
            a = Conv (x, w0)
            b = Conv <kernel_shape = [3,1], strides = [2,1], pads = [1,0,2,0]> (a, w1)
            c = Conv <kernel_shape = [1,3], strides = [1,1], pads = [0,2,0,1], dilations = [1,2]> (b, w2)
            d = Conv <kernel_shape = [3,1], group = 6, pads = [1,0,1,0]> (c, w3)
            e = Conv <kernel_shape = [1,3], group = 6, strides = [1,2]> (d, w4)
            f = Conv (e, w5, b5)
            t = Tanh (f)
            g = GlobalAveragePool (t)  y = Flatten (g)
        }
    """,
    "relu6 and residual": """
        net (float[N,4,6,6] x) => (float[N,4] y)
        <float[4,4,3,3] w0, float[4] b0, float[4,4,3,3] w1, float low = {0.0}, float high = {6.0}>
        {
            c = Conv <pads = [1,1,1,1]> (x, w0, b0)
            r = Clip (c, low, high)
            d = Conv <pads = [1,1,1,1]> (r, w1)
            s = Add (d, x)
            a = AveragePool <kernel_shape = [2,2], strides = [2,2]> (s)
            g = GlobalAveragePool (a)  y = Flatten (g)
        }
    """,
    "batch normalization": """
        net (float[N,4,6,6] x) => (float[N,4] y)
        <float[4,4,3,3] w0, float[4] gamma, float[4] offset, float[4] mean, float[4] var, float[4,4,1,1] w1>
        {
            c = Conv (x, w0)  r = Tanh (c)
            n = BatchNormalization <epsilon = 0.01> (r, gamma, offset, mean, var)
            d = Conv (n, w1)
            g = GlobalAveragePool (d)  y = Flatten (g)
        }
    """,
    "auto_pad": """
        net (float[N,4,7,8] x) => (float[N,4] y)
        <float[4,4,3,3] w0, float[4,4,3,3] w1, float[4,4,2,2] w2>
        {
            a = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w0)
            b = Sigmoid (a)
            c = Conv <auto_pad = "SAME_LOWER"> (b, w1)
            m = MaxPool <auto_pad = "SAME_UPPER", kernel_shape = [2,2], strides = [2,2]> (c)
            d = Conv <auto_pad = "VALID", kernel_shape = [2,2]> (m, w2)
            g = GlobalAveragePool (d)  y = Flatten (g)
        }
    """,
    "matmul and constants": """
        net (float[N,6,5] x) => (float[N,4] y)
        <float[5,7] w0, float[7] b0, float[7,4] w1, float[4] s1>
        {
            a = MatMul (x, w0)  b = Add (a, b0)
            c = LeakyRelu <alpha = 0.1> (b)
            d = ReduceMean <axes = [1], keepdims = 0> (c)
            e = MatMul (d, w1)  y = Mul (e, s1)
        }
    """,
    "conv1d": """
        net (float[N,3,11] x) => (float[N,4] y)
        <float[5,3,3] w0, float[4,5,3] w1>
        {
            a = Conv <strides = [2], pads = [1,2]> (x, w0)
            b = Relu (a)  c = Conv <dilations = [2], pads = [2,2]> (b, w1)
            g = GlobalAveragePool (c)  y = Flatten (g)
        }
    """,
}


def filled(text: str, seed: int = 0) -> ModelProto:
    """The model with every declared tensor that has no value drawn at random; `var*` is positive."""
    model = parse_model(HEADER + text)
    rng = np.random.default_rng(seed)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        array = np.abs(array) + 0.5 if value.name.startswith("var") else array
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), value.name))
    del model.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def weights_of(model: ModelProto) -> list[str]:
    return [name for name in arrays(model) if name[0] in "wbs"]


def example(model: ModelProto, labels: bool, seed: int = 3) -> Example:
    rng = np.random.default_rng(seed)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    x = rng.standard_normal((BATCH, *shape[1:])).astype(np.float32)
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    teacher = 2 * rng.standard_normal((BATCH, classes)).astype(np.float32)
    return Example({"x": x}, [teacher], rng.integers(0, classes, BATCH) if labels else None)


def reference(model: ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    """The first output, by ONNX's reference, in the type of `x`."""
    found = ReferenceEvaluator(model).run(None, {"x": x})
    assert isinstance(found, list)
    return np.asarray(found[0])


def exact_loss(
    model: ModelProto, loss: Loss, own: Example, name: str = "", move: NDArray[np.float64] | float = 0.0
) -> float:
    """The loss of the model as it was given (not of its training copy) in float64, by ONNX's reference.

    The initializer `name` is moved by `move`.
    """
    double = with_arrays(model, {})
    for tensor in double.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            value = np.asarray(value.astype(np.float64) + (move if tensor.name == name else 0.0))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    y = reference(double, own.inputs["x"].astype(np.float64))
    assert y.dtype == np.float64
    targets = loss_inputs(loss, own.teacher, own.labels)
    if loss.kind == "values":
        return float(np.mean((y - targets["onnxneutrino/target0"]) ** 2))

    def log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True)))

    hard = targets["onnxneutrino/hard"] * log_softmax(y)
    soft = targets["onnxneutrino/soft"] * log_softmax(y / loss.temperature)
    return float(-np.sum(hard + soft) / len(y))


def slope(model: ModelProto, name: str, direction: NDArray[np.float64], loss: Loss, own: Example) -> float:
    """Central difference of the loss along `direction` of one initializer."""
    ahead, behind = (exact_loss(model, loss, own, name, step * direction) for step in (1e-5, -1e-5))
    return (ahead - behind) / 2e-5


CLASSES = Loss("classes", ("y",), label_weight=0.4, temperature=2.5)
VALUES = Loss("values", ("y",))


@pytest.mark.parametrize(
    ("net", "loss", "labels"),
    [(net, CLASSES, True) for net in NETS] + [("small", VALUES, False), ("chain", VALUES, False)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients_equal_finite_differences(net: str, loss: Loss, labels: bool) -> None:
    model = filled(NETS[net])
    names = weights_of(model)
    own = example(model, labels)
    with Trainer(training_copy(model, BATCH), names, loss, 1) as trainer:
        gradients = trainer.gradients(own)
        least = teacher_loss(loss, own.teacher, loss_inputs(loss, own.teacher, own.labels))
        assert trainer.step(own, 0.0) == pytest.approx(exact_loss(model, loss, own) - least, rel=1e-4)
    assert sorted(gradients) == sorted(names)
    rng = np.random.default_rng(5)
    held = arrays(model)
    for name in names:
        assert gradients[name].shape == held[name].shape
        norm = float(np.linalg.norm(gradients[name]))
        assert norm > 1e-4, f"{name}: no gradient arrives, so the comparison would say nothing"
        # Along itself the slope is the norm, which a wrong direction or scale misses; and two more directions.
        directions = [gradients[name] / norm, *(rng.standard_normal((2, *held[name].shape)))]
        for direction in directions:
            direction = np.asarray(direction, np.float64)
            expected = slope(model, name, direction, loss, own)
            scale = norm * float(np.linalg.norm(direction))
            assert float(np.sum(gradients[name] * direction)) == pytest.approx(expected, abs=2e-3 * scale), name


def test_gradients_and_steps_at_rate_zero_change_nothing() -> None:
    model = filled(NETS["small"])
    own = example(model, True)
    with Trainer(training_copy(model, BATCH), weights_of(model), CLASSES, 1) as trainer:
        before, first = trainer.arrays(), trainer.gradients(own)
        trainer.gradients(example(model, True, seed=9))
        trainer.step(example(model, True, seed=9), 0.0)
        second = trainer.gradients(own)
        for name, array in trainer.arrays().items():
            np.testing.assert_array_equal(array, before[name])
            np.testing.assert_array_equal(first[name], second[name])
            np.testing.assert_array_equal(array, arrays(model)[name])


def test_steps_are_adamw_on_clipped_gradients() -> None:
    """Adam does not see a constant scale of the gradient, so its norm is made to vary between the steps."""
    model = filled(NETS["small"])
    names = weights_of(model)
    batches = []
    for seed, error in enumerate((200, 0.01, 5, 0.02)):
        drawn = example(model, False, seed=seed)
        near = reference(model, drawn.inputs["x"]) + error * drawn.teacher[0]
        batches.append(replace(drawn, teacher=[near]))
    rate, beta1, beta2, epsilon = 1e-3, 0.9, 0.999, 1e-6
    with Trainer(training_copy(model, BATCH), names, VALUES, 1) as trainer:
        wanted = {name: array.astype(np.float64) for name, array in trainer.arrays().items()}
        first, second = ({name: np.zeros(wanted[name].shape) for name in names} for _ in range(2))
        norms = []
        for step, own in enumerate(batches, start=1):
            gradients = trainer.gradients(own)
            norms.append(float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values()))))
            scale = min(1.0, finetune.MAX_GRADIENT_NORM / norms[-1])
            trainer.step(own, rate)
            for name in names:
                g = scale * gradients[name].astype(np.float64)
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g * g
                # The runtime's AdamW adds epsilon before the bias correction, as Hugging Face's does.
                corrected = np.sqrt(1 - beta2**step) / (1 - beta1**step)
                wanted[name] -= rate * corrected * first[name] / (np.sqrt(second[name]) + epsilon)
        assert max(norms) > 10 * finetune.MAX_GRADIENT_NORM
        assert min(norms) < finetune.MAX_GRADIENT_NORM
        for name, array in trainer.arrays().items():
            moved = np.abs(wanted[name] - np.asarray(arrays(model)[name], np.float64)).max()
            np.testing.assert_allclose(array, wanted[name], atol=2e-3 * moved, err_msg=name)


def test_the_same_steps_give_the_same_bits() -> None:
    """With two threads, and gradients that are clipped."""
    model = filled(NETS["chain"])
    ended = []
    for _ in range(2):
        with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 2) as trainer:
            for seed in range(6):
                drawn = example(model, False, seed=seed)
                trainer.step(replace(drawn, teacher=[50 * drawn.teacher[0]]), 1e-3)
            ended.append(trainer.arrays())
    for name, array in ended[0].items():
        np.testing.assert_array_equal(array, ended[1][name])


def test_training_lowers_the_loss_and_arrays_come_back_by_name() -> None:
    model = filled(NETS["small"])
    teacher = filled(NETS["small"], seed=1)
    frozen = "b0"
    names = [name for name in weights_of(model) if name != frozen]

    def examples() -> Iterator[Example]:
        for seed in range(10_000):
            drawn = example(model, False, seed=seed % 8)
            yield replace(drawn, teacher=[reference(teacher, drawn.inputs["x"])])

    with Trainer(training_copy(model, BATCH), names, VALUES, 1) as trainer:
        trained = fine_tune(trainer, examples(), seconds=0.0, learning_rate=1e-2, steps=60)
    assert len(trained.losses) == trained.schedule.steps == 60
    assert np.mean(trained.losses[-8:]) < 0.3 * np.mean(trained.losses[:8])
    assert sorted(trained.arrays) == sorted(names)
    moved = with_arrays(model, trained.arrays)
    for name, array in trained.arrays.items():
        assert not np.array_equal(array, arrays(model)[name])
        np.testing.assert_array_equal(arrays(moved)[name], array)
    np.testing.assert_array_equal(arrays(moved)[frozen], arrays(model)[frozen])
    batch = next(examples())
    assert exact_loss(moved, VALUES, batch) < 0.3 * exact_loss(model, VALUES, batch)


def test_the_rate_found_is_lower_where_steps_do_more_harm() -> None:
    """Beside its teacher a network loses by large steps at once, and the sooner the larger its inputs are."""
    model = filled(NETS["small"])

    def near(scale: float) -> Iterator[Example]:
        for seed in itertools.count():
            drawn = example(model, False, seed=seed)
            x = scale * drawn.inputs["x"]
            yield replace(drawn, inputs={"x": x}, teacher=[reference(model, x) + 0.1 * drawn.teacher[0]])

    found = []
    for scale in (1.0, 100.0):
        with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer:
            found.append(range_test.find_rate(trainer, near(scale), 60.0))
    low, high = range_test.RATES
    assert low <= found[1] < 0.5 * found[0] <= high
    with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer:
        assert range_test.find_rate(trainer, near(1.0), 0.0) == range_test.DEFAULT_RATE


def test_a_fine_tune_is_looked_at_after_each_quarter_and_ends_where_that_says_so() -> None:
    model = filled(NETS["small"])
    for ending, steps, shares in ((2.0, 10, [0.25, 0.5, 0.75]), (0.5, 5, [0.25, 0.5])):
        asked: list[tuple[int, int, float]] = []

        def look(
            arrays: finetune.Arrays, step: int, share: float, ending: float = ending, asked: list[Any] = asked
        ) -> bool:
            asked.append((len(arrays), step, share))
            return share >= ending

        with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer:
            drawn = (example(model, False, seed=seed) for seed in itertools.count())
            trained = fine_tune(trainer, drawn, seconds=0.0, learning_rate=1e-3, steps=10, look=look)
        assert len(trained.losses) == steps
        assert asked == [(len(weights_of(model)), int(10 * share), share) for share in shares]


def test_the_step_count_follows_from_the_seconds() -> None:
    model = filled(NETS["small"])

    def slow() -> Iterator[Example]:
        while True:
            time.sleep(0.02)
            yield example(model, False)

    with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer:
        trained = fine_tune(trainer, slow(), seconds=1.0, learning_rate=1e-3)
        assert 2 <= trained.schedule.steps <= 50
        assert fine_tune(trainer, slow(), seconds=-1.0, learning_rate=1e-3).schedule.steps == 1


@pytest.mark.parametrize(("pace", "expected"), [(0.1, 100), (0.2, 50), (0.05, 200)])
def test_the_schedule_follows_the_clock(pace: float, expected: int) -> None:
    """Four steps of 0.1 s promise 100 in ten seconds; then a step takes `pace`."""
    model = filled(NETS["small"])
    readings = [0.0, 0.1, 0.5, 0.5, *(0.5 + 2 * (i + 1) * pace for i in range(200))]
    drawn = (example(model, False, seed=seed) for seed in itertools.count())
    with (
        Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer,
        clock.recording(readings) as tape,
    ):
        trained = fine_tune(trainer, drawn, seconds=10.5, learning_rate=1e-3)
    assert len(trained.losses) == trained.schedule.steps == pytest.approx(expected, abs=2)
    assert trained.seconds == tape.readings[-1]


@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_schedule_warms_up_and_falls_as_a_cosine(steps: int) -> None:
    rates = [Schedule(steps, 64, 0.01).rate(step) for step in range(steps)]
    warmup = max(1, round(0.05 * steps))
    assert max(rates) == rates[warmup - 1] == pytest.approx(0.01)
    assert rates[: warmup - 1] == sorted(rates[: warmup - 1])
    np.testing.assert_allclose(np.diff(rates[:warmup]), 0.01 / warmup, rtol=1e-9)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates) > 0
    if steps == 200:
        middle = warmup + (steps - warmup) // 2
        assert rates[middle] == pytest.approx(0.005, rel=0.02)
        assert rates[-1] < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_raises(value: float) -> None:
    model = filled(NETS["small"])
    own = example(model, False)
    with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer:
        broken = replace(own, teacher=[np.full_like(own.teacher[0], value)])
        with pytest.raises(TrainingError, match=r"loss became (nan|inf)") as caught:
            trainer.step(broken, 1e-3)
        assert "\n" not in str(caught.value)


def test_weights_that_leave_the_finite_numbers_raise() -> None:
    """The last step's own damage shows in no loss: the weights must be looked at."""
    model = filled(NETS["small"])
    own = iter([example(model, False)])
    with (
        Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer,
        pytest.raises(TrainingError, match="not finite"),
    ):
        fine_tune(trainer, own, seconds=0.0, learning_rate=np.inf, steps=1)


def test_prefetched_gives_the_same_examples_and_its_thread_ends() -> None:
    model = filled(NETS["small"])
    made = [example(model, False, seed=seed) for seed in range(7)]
    before = threading.active_count()
    assert list(prefetched(iter(made))) == made
    assert threading.active_count() == before


def test_prefetched_ends_its_thread_when_the_reader_stops_early() -> None:
    model = filled(NETS["small"])
    own = example(model, False)
    taken = 0

    def endless() -> Iterator[Example]:
        nonlocal taken
        while True:
            taken += 1
            yield own

    before = threading.active_count()
    ahead = prefetched(endless(), depth=2)
    assert next(ahead) is own
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    assert taken <= 1 + 2 + 2


def test_prefetched_passes_errors_on_after_what_came_before() -> None:
    model = filled(NETS["small"])
    own = example(model, False)

    def breaks() -> Iterator[Example]:
        yield own
        raise TrainingError("the data ended in a fire")

    before = threading.active_count()
    ahead = prefetched(breaks())
    assert next(ahead) is own
    with pytest.raises(TrainingError, match="fire"):
        next(ahead)
    assert threading.active_count() == before


def test_a_training_step_needs_no_torch() -> None:
    """In a process of its own, in which torch cannot be imported."""
    script = """
import sys
sys.modules["torch"] = None
import numpy as np
from onnx.parser import parse_model
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.losses import Loss
model = parse_model('<ir_version: 8, opset_import: ["" : 17]> net (float[2,2] x) => (float[2,2] y) '
    '<float[2,2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }')
one = np.ones((2, 2), np.float32)
with Trainer(model, ["w"], Loss("values", ("y",)), 1) as trainer:
    trainer.step(Example({"x": one}, [one], None), 0.1)
    assert np.abs(trainer.arrays()["w"].reshape(-1) - [1, 2, 3, 4]).max() > 0.05
assert [name for name in sys.modules if name.split(".")[0] == "torch"] == ["torch"]
print("stepped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stepped\n"
    assert done.stderr == "", "the gradient builder's lines reached the user"


LIMITED = """
import resource, sys
import numpy as np
from onnx import numpy_helper, parser
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.losses import Loss

model = parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[512, 1, 64, 64] x) => (float[512, 8, 64, 64] y) '
    "{ h = Conv <pads = [1, 1, 1, 1]> (x, v)  r = Relu (h)  y = Conv <pads = [1, 1, 1, 1]> (r, w) }"
)
for name, shape in {"v": (8, 1, 3, 3), "w": (8, 8, 3, 3)}.items():
    model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
batch = Example({"x": np.zeros((512, 1, 64, 64), np.float32)}, [np.zeros((512, 8, 64, 64), np.float32)], None)
with Trainer(model, ["v", "w"], Loss("values", ("y",)), 1) as trainer:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
    try:
        trainer.step(batch, 1e-3)
    except MemoryError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is limited as on Linux")
def test_a_step_that_does_not_fit_in_memory_says_so() -> None:
    own = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=False)
    assert own.stdout == "for a training step of 512\n", own.stderr


def test_a_full_disk_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("checkpoint.cc:231 Failed to save checkpoint. error:No space left on device errno:28")

    model = filled(NETS["small"])
    with Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1) as trainer, monkeypatch.context() as patch:
        patch.setattr(trainer, "_state", SimpleNamespace(save_checkpoint=lambda *given, **options: full()))
        with pytest.raises(OSError, match="No space left on device") as state:
            trainer.state()
    monkeypatch.setattr(finetune, "_artifacts", full)
    with pytest.raises(OSError, match="No space left on device") as made:
        Trainer(training_copy(model, BATCH), weights_of(model), VALUES, 1)
    assert state.value.filename == made.value.filename == tempfile.gettempdir()
