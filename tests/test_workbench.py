"""The workbench on a small network: what it builds, refits, measures and trains is what it says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.parser import parse_model

from onnxneutrino import conductor, cost, finetune, metrics, prepare, sensitivity, tuning
from onnxneutrino.allocate import Option
from onnxneutrino.bench import Candidate
from onnxneutrino.chain_latency import measure
from onnxneutrino.config import Config, DataConfig
from onnxneutrino.data import IndexedSplit, deciding
from onnxneutrino.figures import figures, rest_cost, total_cost
from onnxneutrino.forms import full_ranks
from onnxneutrino.graph import TensorType, arrays, check, with_arrays
from onnxneutrino.layer_options import GOAL, Target
from onnxneutrino.marking import mark
from onnxneutrino.passes.factorize import stage_names
from onnxneutrino.plan import Choice, Form
from onnxneutrino.probe import divergence
from onnxneutrino.runtime import Runner
from onnxneutrino.sensitivity import Curve
from onnxneutrino.task import Network, Task, build, trainable_names
from onnxneutrino.training_copy import training_copy
from onnxneutrino.workbench import Workbench

# A Conv without bias, one with stride, one left out by the user, a Gemm on a flattened map.
NET = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,4,8,8] x) => (float[N,8] y)
    <float[16,4,3,3] w0, float[16,16,3,3] w1, float[16] b1, float[16,16,1,1] w2, float[16] b2, float[8,256] w3,
     float[8] b3>
    {
        [first] c0 = Conv <pads = [1,1,1,1]> (x, w0)
        [relu0] r0 = Relu (c0)
        [second] c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (r0, w1, b1)
        [relu1] r1 = Relu (c1)
        [kept] c2 = Conv (r1, w2, b2)
        [relu2] r2 = Relu (c2)
        [flat] f = Flatten (r2)
        [head] y = Gemm <transB = 1> (f, w3, b3)
    }
"""
IMAGES = 640


def network() -> ModelProto:
    """Weights whose spectra fall, as those of trained layers do."""
    model = parse_model(NET)
    rng = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape)
        if len(shape) > 1:
            left, values, right = np.linalg.svd(array.reshape(shape[0], -1), full_matrices=False)
            array = ((left * (values / np.arange(1, len(values) + 1))) @ right).reshape(shape)
        model.graph.initializer.append(numpy_helper.from_array((0.7 * array).astype(np.float32), value.name))
    del model.graph.value_info[:]
    return model


def images(count: int, seed: int) -> NDArray[np.float32]:
    """Smooth random maps, N x H x W x C."""
    noise = np.random.default_rng(seed).standard_normal((count, 10, 10, 4))
    return ((noise[:, :-2, :-2] + noise[:, 1:-1, 1:-1] + noise[:, 2:, 2:]) / 1.7).astype(np.float32)


def make_task(folder: Path, model: ModelProto, **changes: Any) -> Task:
    """The task of a run on `model`, as the conductor makes it."""
    run = Runner(model)
    held = {f"x_{split}": images(count, seed) for seed, (split, count) in enumerate((("train", IMAGES), ("test", 120)))}
    for split in ("train", "test"):
        dtype = np.float16 if model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16 else np.float32
        held[f"y_{split}"] = run({"x": held[f"x_{split}"].transpose(0, 3, 1, 2).astype(dtype)})[0].argmax(axis=1)
    np.savez(folder / "data.npz", allow_pickle=False, **held)
    data = DataConfig(path="data.npz", base=folder, validation=changes.pop("validation", 0.1))
    config = dataclasses.replace(
        Config(data=data, metric="top1", threads=1, exclude=("kept",), labels=False), **changes
    )
    metric = metrics.resolve(config.metric, config.metric_base)
    opened = prepare.open_model(model, "net", config)
    dataset = prepare.open_dataset(opened, metric, config)
    judges = deciding(dataset, config.seed)
    marked = mark(opened, prepare.first_examples(dataset.test, 3), config)
    assert marked.freed
    batch = prepare.evaluation_batch(opened)
    rows = prepare.evaluate(marked.batched, judges.test, metric, batch, config.threads, marked.batched)
    warnings: list[str] = []
    made = conductor.make_task(marked, config, metric, dataset, judges, rows, batch)
    task = conductor.with_training(made, config, warnings)
    assert not warnings
    return task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("data"), network(), validation=0.0)


@pytest.fixture(scope="module")
def bench(task: Task) -> Workbench:
    return Workbench(task, 60.0)


def some_choices(bench: Workbench, source: Candidate | None = None, error: float = 0.1) -> dict[str, Option]:
    """For every layer the cheapest option that loses at most `error`."""
    options, _ = bench.options(source)
    return {
        name: min((option for option in own if option.loss <= error), key=lambda option: option.cost)
        for name, own in options.items()
    }


@pytest.fixture(scope="module")
def candidate(bench: Workbench) -> Candidate:
    return bench.realize(None, some_choices(bench), "plan")


@pytest.fixture(scope="module")
def trained(bench: Workbench, candidate: Candidate) -> Candidate:
    found = bench.trained(candidate, 2.0, "trained")
    assert found is not None
    return found


def inputs(count: int = 16) -> dict[str, NDArray[np.float32]]:
    return {"x": images(count, 9).transpose(0, 3, 1, 2)}


def outputs(model: ModelProto, feed: Mapping[str, NDArray[Any]] | None = None) -> NDArray[Any]:
    return Runner(model, threads=1)(inputs() if feed is None else feed)[0]


def test_the_task_holds_the_layers_that_may_change(task: Task) -> None:
    assert [layer.name for layer in task.layers] == ["first", "second", "head"]
    assert [layer.kind for layer in task.layers] == ["conv2d", "conv2d", "map"]
    assert {"w0", "w1", "b1", "w3", "b3"} == set(task.trainable), "the excluded layer's own are not trained"


def test_what_stands_before_all_that_was_changed_is_not_trained(bench: Workbench) -> None:
    task = bench.task
    chain = {"second": bench._original["second"].fits["channel"].factors((2,))}
    network = Network(chain)
    names = trainable_names(task, network, build(task, network, batched=True))
    assert set(names) == {*stage_names(task.layers[1], chain["second"]), "w3", "b3"}
    assert set(trainable_names(task, Network(), task.batched)) == set(task.trainable)
    early = Network(chain, {"w0": np.zeros((1,), np.float32)})  # was trained, and is so again
    graph = build(task, Network(chain), batched=True)
    assert {"w0", "w3", "b3"} < set(trainable_names(task, early, graph))


def test_an_empty_network_is_the_model_itself(task: Task) -> None:
    assert build(task, Network()).SerializeToString() == task.model.SerializeToString()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", ["channel", "interpolative", "input", "spatial_hv", "spatial_vh", "tucker2"])
def test_full_rank_equals_the_original(bench: Workbench, form: Form, batched: bool) -> None:
    task = bench.task
    factors = {
        layer.name: bench._original[layer.name].fits[form].factors(full_ranks(form, layer.weight.shape))
        for layer in task.layers
    }
    built = build(task, Network(factors), batched)
    check(built, "built")
    wanted = outputs(task.model)
    np.testing.assert_allclose(outputs(built), wanted, atol=2e-4 * np.abs(wanted).max())


def test_arrays_replace_initializers_that_are_still_there(task: Task, candidate: Candidate) -> None:
    arrays_of = {"b2": np.arange(16, dtype=np.float32), "w1": np.zeros((16, 16, 3, 3), np.float32)}
    assert candidate.network.factors.keys() >= {"second"}
    built = build(task, Network(candidate.network.factors, arrays_of))
    np.testing.assert_array_equal(arrays(built)["b2"], arrays_of["b2"])
    assert "w1" not in arrays(built)


def real_cost(task: Task, model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    if task.objective == "macs":
        return cost.macs(model, prepare.types_of(model, shapes))
    return cost.params(model)


@pytest.mark.parametrize("objective", ["params", "macs"])
def test_costs_are_those_of_the_graph_that_is_built(tmp_path: Path, objective: str) -> None:
    task = make_task(tmp_path, network(), objective=objective)
    bench = Workbench(task, 60.0, images=64)
    shapes = {"x": (1, 4, 8, 8)}
    assert bench.full_cost == real_cost(task, task.model, shapes)
    for error in (0.5, 0.1, 0.02, 0.0):
        choices = some_choices(bench, error=error)
        made = bench.realize(None, choices, "plan")
        assert made.cost == real_cost(task, build(task, made.network), shapes), error
        assert (made.cost == bench.full_cost) is all(option.choice is None for option in choices.values())


def test_refit_brings_the_network_nearer_to_the_original(bench: Workbench, candidate: Candidate) -> None:
    unfitted = {
        name: bench._original[name].factors(option.choice)
        for name, option in candidate.choices.items()
        if option.choice is not None
    }
    assert len(unfitted) == 3
    before = bench._divergence(Network(unfitted), bench.probe)
    assert 0 < candidate.divergence < before
    fresh = {"x": images(400, 77).transpose(0, 3, 1, 2)}
    wanted = outputs(bench.task.model, fresh)

    def away(network: Network) -> float:
        return divergence(bench.task.loss, [[wanted]], [[outputs(build(bench.task, network), fresh)]])

    assert away(candidate.network) < away(Network(unfitted)), "inputs that no refit has seen agree"


def test_divergence_is_zero_for_the_original_and_grows_with_the_error(bench: Workbench) -> None:
    whole = {name: own.whole for name, own in bench._original.items()}
    assert bench.realize(None, whole, "whole").divergence == 0.0
    found = [bench.realize(None, some_choices(bench, error=error), "plan").divergence for error in (0.6, 0.2, 0.03)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0


def test_sensitivities_are_the_divergence_of_one_layer_alone(bench: Workbench) -> None:
    found = bench.sensitivities()
    assert list(found) == [layer.name for layer in bench.task.layers]
    for name, own in bench._original.items():
        assert found[name].points
        errors, lost = zip(*found[name].points, strict=True)
        assert list(lost) == sorted(lost)
        choices = {option.loss: option.choice for option in own.options}
        batch = {name: array[: sensitivity.IMAGES] for name, array in bench.probe.batches[0].items()}
        outputs_of = bench.task.loss.outputs
        wanted = [Runner(bench.task.batched, outputs_of)(batch)]
        for error, expected in zip(errors, lost, strict=True):
            choice = choices[error]
            assert choice is not None
            alone = build(bench.task, Network({name: own.factors(choice)}), batched=True)
            got = divergence(bench.task.loss, wanted, [Runner(alone, outputs_of)(batch)])
            assert expected == pytest.approx(got, rel=1e-3, abs=1e-6)


def test_a_curve_goes_through_its_points_and_on() -> None:
    curve = Curve(((0.1, 0.02), (0.4, 0.32)))
    assert [curve(error) for error in (0.1, 0.4)] == pytest.approx([0.02, 0.32])
    assert curve(0.2) == pytest.approx(0.08)  # a square between its points
    assert curve(0.05) == pytest.approx(0.005)
    assert curve(0.8) == pytest.approx(1.28)
    assert curve(0.0) == 0.0
    steep = Curve(((0.1, 1e-6), (0.4, 1.0)))
    assert steep(0.05) == pytest.approx(0.25e-6)  # no steeper than a square outside
    assert Curve()(0.3) == 0.3
    assert Curve(((0.1, 0.02),))(0.3) == pytest.approx(0.06)


def test_making_a_candidate_twice_gives_the_same(bench: Workbench, candidate: Candidate) -> None:
    again = bench.realize(None, candidate.choices, "plan")
    assert (again.cost, again.divergence) == (candidate.cost, candidate.divergence)
    np.testing.assert_array_equal(
        outputs(build(bench.task, again.network)), outputs(build(bench.task, candidate.network))
    )


def test_the_original_drops_by_exactly_nothing(bench: Workbench) -> None:
    whole = {name: own.whole for name, own in bench._original.items()}
    drop = bench.measured(bench.realize(None, whole, "whole")).drop
    assert drop is not None
    assert (drop.value, drop.standard_error) == (0.0, 0.0)


def test_the_drop_is_that_of_the_deployable_graph_on_the_deciding_images(bench: Workbench) -> None:
    rough = bench.measured(bench.realize(None, some_choices(bench, error=0.5), "rough"))
    task = bench.task
    assert rough.drop is not None
    right = []
    for batch in task.select.batches(1000):
        assert batch.targets is not None
        own = outputs(build(task, rough.network), batch.inputs).argmax(axis=1) == batch.targets
        right.append(own)
    share = float(np.mean(np.concatenate(right)))
    assert rough.drop.value == pytest.approx(100 * (1 - share)), "labels are the original's own answers"
    assert rough.drop.value > 0


def test_training_changes_the_network_for_the_better(
    bench: Workbench, candidate: Candidate, trained: Candidate
) -> None:
    assert not bench.tuner.warnings
    assert trained.trained > 0
    assert (trained.cost, trained.choices) == (candidate.cost, candidate.choices)
    before, after = (outputs(build(bench.task, own.network)) for own in (candidate, trained))
    assert np.abs(after - before).max() > 1e-3
    assert bench._divergence(trained.network, bench.probe) < candidate.divergence
    (record,) = (tune for tune in bench.tuner.fine_tunes if tune.name == "trained")
    assert np.mean(record.losses[-20:]) < np.mean(record.losses[:20])
    assert record.steps > 10


def test_training_leaves_what_is_excluded_and_what_is_factorized(
    bench: Workbench, candidate: Candidate, trained: Candidate
) -> None:
    built = build(bench.task, trained.network)
    check(built, "trained")
    for name in ("w2", "b2"):
        np.testing.assert_array_equal(arrays(built)[name], arrays(bench.task.model)[name])
    before, after = (arrays(build(bench.task, own.network)) for own in (candidate, trained))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name for name in before if "/" in name} <= moved, "every stage and bias of every chain is trained"
    for name, own in trained.network.factors.items():
        assert (own.form, own.ranks) == (candidate.network.factors[name].form, candidate.network.factors[name].ranks)


@pytest.fixture
def kept(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is kept, whether it helped or not."""
    monkeypatch.setattr(bench.tuner, "_better", lambda before, after: after)


@pytest.mark.usefixtures("kept")
def test_a_layer_left_whole_is_trained_too(bench: Workbench, candidate: Candidate) -> None:
    choices = {**candidate.choices, "second": bench._original["second"].whole}
    found = bench.trained(bench.realize(None, choices, "partly"), 1.0, "partly")
    assert found is not None
    assert {"w1", "b1"} <= set(found.network.arrays)
    built = arrays(build(bench.task, found.network))
    assert not np.array_equal(built["w1"], arrays(bench.task.model)["w1"])


def test_options_from_a_trained_network_start_at_its_own_chains(bench: Workbench, trained: Candidate) -> None:
    options, rest = bench.options(trained)
    assert rest == bench.task.rest
    for name, own in options.items():
        factors = trained.network.factors[name]
        itself = max(own, key=lambda option: option.cost)
        assert itself.choice == Choice(factors.form, factors.ranks)
        assert itself.loss == 0.0
        assert itself.cost == trained.choices[name].cost
        assert len(own) > 1
        assert all(option.choice is not None and option.choice.form == factors.form for option in own)
    unchanged = {name: max(own, key=lambda option: option.cost) for name, own in options.items()}
    same = bench.realize(trained, unchanged, "unchanged")
    assert same.cost == trained.cost
    assert same.trained == trained.trained
    assert same.divergence < 1e-5, "from the trained network, wherever training took it"
    assert bench._divergence(same.network, bench.probe) > 1e-3


def test_truncating_trained_weights_is_nearer_than_starting_anew(bench: Workbench, trained: Candidate) -> None:
    options, _ = bench.options(trained)
    choices = {
        name: max((o for o in own if o.cost <= 0.9 * trained.choices[name].cost), key=lambda o: o.cost, default=own[0])
        for name, own in options.items()
    }
    smaller = bench.realize(trained, choices, "smaller")
    assert smaller.cost < trained.cost
    assert smaller.trained == trained.trained
    np.testing.assert_array_equal(arrays(build(bench.task, smaller.network))["b2"], arrays(bench.task.model)["b2"])
    anew = bench.realize(None, choices, "anew")
    assert smaller.cost == anew.cost
    fresh = {"x": images(400, 77).transpose(0, 3, 1, 2)}
    wanted = outputs(build(bench.task, trained.network), fresh)

    def away(candidate: Candidate) -> float:
        return divergence(bench.task.loss, [[wanted]], [[outputs(build(bench.task, candidate.network), fresh)]])

    assert smaller.divergence == pytest.approx(away(smaller), rel=0.5)
    assert away(smaller) < 0.7 * away(anew)


@pytest.mark.usefixtures("kept")
def test_a_layer_whole_in_a_trained_network_is_refactored_from_its_trained_weight(
    bench: Workbench, candidate: Candidate
) -> None:
    choices = {**candidate.choices, "second": bench._original["second"].whole}
    source = bench.trained(bench.realize(None, choices, "partly"), 1.0, "partly")
    assert source is not None
    fitted = bench._fitted(source)["second"]
    np.testing.assert_array_equal(fitted.layer.weight, source.network.arrays["w1"])
    np.testing.assert_array_equal(fitted.layer.bias, source.network.arrays["b1"])
    assert fitted.whole in fitted.options


def test_a_training_that_fails_is_none_with_a_warning(
    bench: Workbench, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(bench.tuner.warnings)
    monkeypatch.setattr(bench.tuner, "_rate", np.inf)
    assert bench.trained(candidate, 0.5, "broken") is None
    again, dropped = bench.tuner.warnings[len(before) :]
    for warning, end in ((again, "tried again at half the learning rate"), (dropped, "the candidate is dropped")):
        assert warning.startswith("broken: ")
        assert "loss became nan" in warning or "not finite" in warning
        assert warning.endswith(f"; {end}")
        assert "\n" not in warning
    del bench.tuner.warnings[len(before) :]


def test_a_training_that_fails_once_is_tried_at_half_the_rate(
    task: Task, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Workbench(task, 60.0, images=64)
    rates: list[float] = []
    original = finetune.fine_tune

    def once(*args: Any, learning_rate: float, **options: Any) -> finetune.Trained:
        rates.append(learning_rate)
        if len(rates) == 1:
            raise finetune.NotFiniteError("the training loss became nan")
        return original(*args, learning_rate=learning_rate, **options)

    monkeypatch.setattr(finetune, "fine_tune", once)
    monkeypatch.setattr(own.tuner, "_rate", 1e-3)
    for name in ("first", "second"):
        assert own.trained(candidate, 0.3, name) is not None
    assert rates == [1e-3, 5e-4, 5e-4]  # what follows begins with what went well
    assert [entry.name for entry in own.tuner.fine_tunes] == ["first", "second"]
    assert own.tuner.warnings[0].startswith("first: the training loss became nan; tried again at half")


def test_without_memory_for_one_example_nothing_is_trained(
    task: Task, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> float:
        raise RuntimeError("std::bad_alloc")

    own = Workbench(task, 60.0, images=64)
    monkeypatch.setattr(finetune.Trainer, "_run", short)
    assert own.tuner.step_seconds(candidate.network) == np.inf
    assert own.trained(candidate, 0.5, "first") is None
    batches = [task.batch >> halvings for halvings in range(task.batch.bit_length())]
    assert batches[-1] == own.tuner.task.batch == 1
    lack = "there is not enough memory for a training step of"
    assert own.tuner.warnings == [
        *(f"{lack} {a} examples; {b} from now on" for a, b in itertools.pairwise(batches)),
        f"first: {lack} one example; the candidate is dropped",
    ]


def test_a_training_that_makes_it_worse_is_taken_back(
    task: Task, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.stop is None  # with no images held out for it, the deciding ones say it alone
    for stop in (None, task.select):
        judged = Workbench(dataclasses.replace(task, stop=stop), 60.0, images=64)
        monkeypatch.setattr(judged.tuner, "_rate", 3.0)
        found = judged.trained(candidate, 0.5, "worse")
        assert found is not None
        assert build(task, found.network) == build(task, candidate.network)
        assert judged.tuner.warnings == ["worse: the metric fell; the weights before it were kept"]


def test_what_only_memorised_images_lose_is_kept(
    bench: Workbench, candidate: Candidate, trained: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(bench.task, stop=bench.task.train)
    monkeypatch.setattr(bench.tuner, "task", task)
    for memorised, judged, kept in ((True, False, trained), (False, True, trained), (True, True, candidate)):
        loses = {id(task.stop): memorised, id(task.select): judged}
        monkeypatch.setattr(bench.tuner, "_loses", lambda before, after, split, loses=loses: loses[id(split)])
        assert bench.tuner._better(candidate.network, trained.network) is kept.network


def test_labels_are_used_where_they_are_wanted(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = finetune.Trainer.step

    def step(self: Any, own: Any, rate: float) -> float:
        seen.append(own.labels is not None)
        return float(original(self, own, rate))

    monkeypatch.setattr(finetune.Trainer, "step", step)
    for labels in (True, False):
        seen.clear()
        bench = Workbench(dataclasses.replace(task, labels=labels), 60.0, images=64)
        made = bench.realize(None, some_choices(bench), "plan")
        assert bench.trained(made, 0.2, "labels") is not None
        assert seen
        assert all(value is labels for value in seen)


@pytest.mark.parametrize(("bound", "given_up"), [(-1e6, True), (1e6, False)])
def test_training_is_hopeless_above_a_drop(
    bench: Workbench, candidate: Candidate, monkeypatch: pytest.MonkeyPatch, bound: float, given_up: bool
) -> None:
    answers = []
    original = finetune.fine_tune

    def asked(trainer: finetune.Trainer, *args: Any, **options: Any) -> finetune.Trained:
        answers.append(options["look"](trainer.arrays(), 1, 0.5))
        return original(trainer, *args, **options)

    monkeypatch.setattr(finetune, "fine_tune", asked)
    assert bench.trained(candidate, 0.5, "judged", bound) is not None
    assert answers == [given_up]


@pytest.mark.parametrize(("wrong", "weight"), [(0.0, 0.1), (0.25, 0.5), (1.0, 0.8)])
def test_labels_count_twice_the_originals_error_on_training_images(task: Task, wrong: float, weight: float) -> None:
    split = task.train
    assert isinstance(split, IndexedSplit)
    assert split.targets is not None
    shift = np.random.default_rng(0).random(len(split.targets)) < wrong
    classes = int(split.targets.max()) + 1
    labelled = dataclasses.replace(split, targets=(split.targets + shift) % classes)
    own = dataclasses.replace(task, train=labelled, labels=True)
    tuner = tuning.Tuner(own, Runner(own.batched, own.loss.outputs), None, lambda what, share: None)
    assert tuner.loss.label_weight == pytest.approx(weight, abs=0.08)
    assert dataclasses.replace(tuner.loss, label_weight=0.0) == dataclasses.replace(own.loss, label_weight=0.0)


def test_a_copy_that_computes_something_else_drops_the_candidate(
    bench: Workbench, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: ModelProto, batch: int, types: Mapping[str, TensorType]) -> ModelProto:
        name = "first/channel.0/weight"
        larger = 1.1 * np.asarray(arrays(model)[name], np.float32)
        return with_arrays(training_copy(model, batch, types), {name: larger})

    assert candidate.network.factors["first"].form == "channel"
    monkeypatch.setattr(tuning, "training_copy", wrong)
    assert bench.trained(candidate, 0.5, "wrong copy") is None
    assert "wrong copy: output" in bench.tuner.warnings[-1]
    assert "differs" in bench.tuner.warnings[-1]


def test_reconstruction_brings_every_block_nearer_to_the_original(tmp_path: Path) -> None:
    task = make_task(tmp_path, network(), validation=0.0, trainer="reconstruct")
    assert task.training is not None
    assert [block.layers for block in task.training.blocks] == [("first",), ("second",), ("head",)]
    assert [block.learns for block in task.training.blocks] == [("r0",), ("r2",), ("y",)]
    assert task.training.loss.fed == ("r0", "r2")
    bench = Workbench(task, 60.0, images=128)
    made = bench.realize(None, some_choices(bench), "plan")
    found = bench.trained(made, 2.0, "blocks")
    assert found is not None
    assert not bench.tuner.warnings
    assert found.divergence == made.divergence, "known before training, for the record"
    assert bench._divergence(found.network, bench.probe) < made.divergence
    (record,) = bench.tuner.fine_tunes
    assert np.mean(record.losses[-20:]) < np.mean(record.losses[:20])
    for name in ("r0", "r2"):  # fitted to just that before, on the same inputs: no more can be asked than to stay
        wanted, before, after = (
            Runner(build(task, own, batched=True), [name], threads=1)(inputs())[0]
            for own in (Network(), made.network, found.network)
        )
        assert np.mean((after - wanted) ** 2) < 1.05 * np.mean((before - wanted) ** 2)


def test_float16_weights_are_trained_as_float32_and_written_as_float16(tmp_path: Path) -> None:
    task = make_task(tmp_path, halved(network()), validation=0.0)
    assert all(layer.half for layer in task.layers)
    bench = Workbench(task, 60.0, images=128)
    made = bench.realize(None, some_choices(bench), "plan")
    found = bench.trained(made, 2.0, "halves")
    assert found is not None
    assert not bench.tuner.warnings
    assert bench._divergence(found.network, bench.probe) < bench._divergence(made.network, bench.probe)
    written = build(task, found.network)
    check(written, "halves")
    assert {array.dtype for array in arrays(written).values() if array.dtype.kind == "f"} == {np.dtype(np.float16)}
    assert all(stage.weight.dtype == np.float32 for own in found.network.factors.values() for stage in own.stages)


def halved(model: ModelProto) -> ModelProto:
    """The same in float16, its input and output too."""
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


LIMITS = {"params": 3000.0, "macs": 60_000.0, "size": 13_000.0, "memory": 16_000.0}


def targeted(task: Task, names: Sequence[str]) -> Task:
    """The same task under hard targets."""
    targets = tuple(Target(name, LIMITS[name], name, rest_cost(task, name)) for name in names)
    return dataclasses.replace(task, objective=targets, rest=sum(own.rest / own.limit for own in targets))


def test_figures_are_what_the_finished_network_costs(task: Task, bench: Workbench) -> None:
    own = targeted(task, list(LIMITS))
    assert isinstance(own.objective, tuple)
    choices = {name: option.choice for name, option in some_choices(bench).items() if option.choice is not None}
    assert choices
    network = bench.realize(None, some_choices(bench), "plan").network
    for plan, model in ((choices, build(task, network)), ({}, task.model)):
        types = prepare.types_of(model, {"x": (1, 4, 8, 8)})
        found = figures(own, own.objective, plan)
        for share, target in zip(found, own.objective, strict=True):
            assert share * target.limit == pytest.approx(total_cost(model, types, target.name), rel=1e-9)


@pytest.mark.parametrize("names", [["params"], ["macs"], ["size"], ["memory"], ["params", "macs"], list(LIMITS)])
def test_what_is_proposed_meets_the_hard_targets(task: Task, names: list[str]) -> None:
    own = targeted(task, names)
    bench = Workbench(own, 60.0)
    assert bench.full_cost > GOAL
    made = bench.propose(None, GOAL, "plan")
    model = build(task, made.network)
    types = prepare.types_of(model, {"x": (1, 4, 8, 8)})
    used = [total_cost(model, types, name) / LIMITS[name] for name in names]
    assert 0.8 < max(used) <= GOAL
    assert made.cost == pytest.approx(max(used))
    for name, least in zip(names, bench.least_of_targets, strict=True):
        assert least <= total_cost(model, types, name) * (1.02 if name in ("size", "memory") else 1)
    smaller = bench.propose(made, 0.8 * GOAL, "cut")
    assert smaller.cost <= 0.8 * GOAL


def test_a_latency_target_is_measured_on_the_network(task: Task) -> None:
    example = prepare.first_examples(task.select, 1)[0]
    table = measure(task.model, task.layers, example, 1, 0.5)
    targets = (Target("latency", 1e3, table, table.rest), Target("params", 1e6, "params", rest_cost(task, "params")))
    time, share = figures(dataclasses.replace(task, objective=targets), targets, {})
    assert share == total_cost(task.model, task.types, "params") / 1e6
    assert 0 < time < 0.1
