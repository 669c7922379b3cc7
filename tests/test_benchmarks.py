"""The baselines of benchmarks/quality.py: their mathematics, and their networks at a cost."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import baseline_greedy as greedy  # noqa: E402
import quality  # noqa: E402
import quality_table  # noqa: E402
from baseline_bench import Baseline, UniformSvd, VbmfTucker, layer_cost, shrunk  # noqa: E402
from baseline_factors import weight_factors  # noqa: E402
from baseline_vbmf import evbmf_rank, noise_variance, threshold  # noqa: E402

from onnxneutrino import conductor, figures, prepare  # noqa: E402
from onnxneutrino.config import load_config  # noqa: E402
from onnxneutrino.data import deciding  # noqa: E402
from onnxneutrino.finetune import Trainer, fine_tune  # noqa: E402
from onnxneutrino.graph import load  # noqa: E402
from onnxneutrino.losses import Loss, loss_inputs, softmax  # noqa: E402
from onnxneutrino.marking import mark  # noqa: E402
from onnxneutrino.plan import Choice  # noqa: E402
from onnxneutrino.runtime import Runner  # noqa: E402
from onnxneutrino.search import Candidate  # noqa: E402
from onnxneutrino.task import Network, Task, build  # noqa: E402
from onnxneutrino.teaching import Lessons, examples  # noqa: E402
from onnxneutrino.training_plan import TrainingPlan  # noqa: E402

DIGITS = ROOT / "fixtures" / "digits.onnx"
SHAPE = (12, 8, 3, 3)


def weight(shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def low_rank(rows: int, columns: int, rank: int, noise: float) -> NDArray[np.float64]:
    rng = np.random.default_rng(rows + 7 * columns + rank)
    signal = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)) / np.sqrt(max(rank, 1))
    return signal + noise * rng.standard_normal((rows, columns))


# --- variational Bayes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 200, 7), (200, 60, 7), (100, 100, 12), (64, 576, 20)])
def test_vbmf_finds_the_planted_rank(rows: int, columns: int, rank: int) -> None:
    assert evbmf_rank(low_rank(rows, columns, rank, 0.3)) == rank


@pytest.mark.parametrize("shape", [(60, 200), (100, 100), (16, 400)])
def test_vbmf_finds_nothing_in_noise(shape: tuple[int, int]) -> None:
    assert evbmf_rank(low_rank(*shape, 0, 1.0)) == 0
    assert evbmf_rank(np.zeros(shape)) == 0


def test_vbmf_finds_the_variance_of_the_noise() -> None:
    matrix = low_rank(80, 240, 6, 0.5)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    found = noise_variance(squares, 240, 80 / 240, threshold(80 / 240))
    assert found == pytest.approx(0.25, rel=0.05)
    assert evbmf_rank(matrix, 0.25) == evbmf_rank(matrix) == 6


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_threshold_is_where_keeping_costs_as_much_as_dropping(alpha: float) -> None:
    """At `x̲` the free energy of a kept singular value equals that of a dropped one: the added term is zero."""
    x = threshold(alpha)
    tau = (x - (1 + alpha) + np.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha)) / 2
    assert np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau == pytest.approx(0.0, abs=1e-9)
    assert x > (1 + np.sqrt(alpha)) ** 2  # above all that noise alone gives


# --- factors of a weight ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "shape"),
    [
        (Choice("channel", (12,)), SHAPE),
        (Choice("spatial_hv", (24,)), SHAPE),
        (Choice("tucker2", (8, 12)), SHAPE),
        (Choice("svd", (6,)), (9, 6, 1, 1)),
    ],
)
def test_full_rank_is_the_weight(choice: Choice, shape: tuple[int, ...]) -> None:
    own = weight_factors(choice, weight(shape), np.arange(shape[0], dtype=np.float32))
    np.testing.assert_allclose(own.product(), weight(shape), atol=2e-5)
    np.testing.assert_array_equal(own.bias, np.arange(shape[0]))


@pytest.mark.parametrize("form", ["channel", "spatial_hv"])
def test_error_is_what_the_discarded_singular_values_hold(form: Any) -> None:
    full = weight()
    outputs, inputs, kh, kw = SHAPE
    unfolded = {
        "channel": full.reshape(outputs, -1),
        "spatial_hv": full.transpose(1, 2, 0, 3).reshape(inputs * kh, outputs * kw),
    }[form]
    lost = np.sum((weight_factors(Choice(form, (5,)), full, np.zeros(12, np.float32)).product() - full) ** 2)
    assert lost == pytest.approx(np.sum(np.linalg.svd(unfolded, compute_uv=False)[5:] ** 2), rel=1e-4)


def test_tucker_finds_a_tensor_of_its_ranks_and_beats_neither_bound_of_another() -> None:
    rng = np.random.default_rng(1)
    core = rng.standard_normal((4, 3, 3, 3))
    exact = np.einsum("rsab,or,is->oiab", core, rng.standard_normal((12, 4)), rng.standard_normal((8, 3)))
    own = weight_factors(Choice("tucker2", (3, 4)), exact.astype(np.float32), np.zeros(12, np.float32))
    np.testing.assert_allclose(own.product(), exact, atol=1e-3)
    full = weight()
    lost = np.sum((weight_factors(Choice("tucker2", (3, 4)), full, np.zeros(12, np.float32)).product() - full) ** 2)
    tails = [
        np.sum(np.linalg.svd(unfolded, compute_uv=False)[rank:] ** 2)
        for unfolded, rank in ((full.reshape(12, -1), 4), (np.moveaxis(full, 1, 0).reshape(8, -1), 3))
    ]
    # Each mode alone loses its tail at least; truncating one after the other (HOSVD) loses no more than both.
    assert max(tails) <= lost <= sum(tails)


# --- networks at a cost -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> Task:
    config = load_config(DIGITS, {"threads": 1})
    opened = prepare.open_model(load(DIGITS).model, "digits", config)
    config, metric, dataset = prepare.settled(opened, config)
    marked = mark(opened, prepare.first_examples(dataset.test, 3), config)
    judges = deciding(dataset, 0, "digits")
    rows = prepare.evaluate(marked.batched, judges.test, metric, 128, 1, marked.batched)
    return conductor.make_task(marked, config, metric, dataset, judges, rows, 128)


def bench(task: Task, method: Any) -> Baseline:
    return Baseline(task, lambda what, share: None, lambda own: [method(own)])


@pytest.mark.parametrize("method", [UniformSvd, lambda own: VbmfTucker(own, True), greedy.GreedySpatial])
def test_a_proposal_costs_what_its_graph_counts_and_at_most_what_was_asked(task: Task, method: Any) -> None:
    own = bench(task, method)
    assert own.full_cost == figures.total_cost(task.model, task.types, "params")
    found = own.propose(None, own.full_cost / 3, "third")
    graph = build(task, found.network)
    assert figures.total_cost(graph, task.types, "params") == found.cost <= own.full_cost / 3
    assert own.least_cost < found.cost
    smaller = own.propose(found, found.cost / 1.5, "from there")
    assert smaller.cost <= found.cost / 1.5
    again = own.propose(None, own.full_cost / 3, "third")
    assert again.cost == found.cost


def test_all_but_the_last_layer_have_one_share_of_their_rank(task: Task) -> None:
    own = bench(task, UniformSvd)
    found = own.propose(None, own.full_cost / 4, "quarter")
    *others, last = task.layers
    assert last.name not in found.network.factors
    shares = [found.network.factors[layer.name].ranks[0] / min(len(layer.weight), layer.patch) for layer in others[1:]]
    assert max(shares) - min(shares) < 0.02


def test_a_step_down_truncates_the_trained_product(task: Task) -> None:
    own = bench(task, UniformSvd)
    found = own.propose(None, own.full_cost / 2, "half")
    factors = {
        name: weight_factors(Choice(old.form, old.ranks), 2 * old.product(), old.bias + 1)
        for name, old in found.network.factors.items()
    }
    trained = Candidate("trained", Network(factors), found.choices, found.cost, 0.0, trained=1.0)
    smaller = own.propose(trained, found.cost / 1.5, "smaller")
    for name, own_factors in smaller.network.factors.items():
        if own_factors.ranks == factors[name].ranks:
            assert own_factors is factors[name]
            continue
        wanted = weight_factors(
            Choice(own_factors.form, own_factors.ranks), factors[name].product(), factors[name].bias
        )
        np.testing.assert_allclose(own_factors.product(), wanted.product(), atol=1e-5)
        np.testing.assert_array_equal(own_factors.bias, found.network.factors[name].bias + 1)


@pytest.mark.parametrize("weakened", [False, True])
def test_ranks_by_vbmf_move_together(task: Task, weakened: bool) -> None:
    method = VbmfTucker(task, weakened)
    at = [method.choices(setting) for setting in (0.0, 0.25, 0.5, 0.75, 1.0)]
    *others, last = task.layers
    for layer in others:
        ranks = np.array([own[layer.name].ranks for own in at])
        assert (ranks[0] == np.minimum(1, ranks[-1])).all()
        assert (np.diff(ranks, axis=0) >= 0).all()
    assert at[0][last.name].ranks == (10,)
    conv = next(layer for layer in others if layer.weight.shape[:2] == (128, 64))
    unfolded = np.moveaxis(conv.weight, 1, 0).reshape(64, -1), conv.weight.reshape(128, -1)
    if weakened:
        assert list(at[2][conv.name].ranks) == [max(1, evbmf_rank(own)) for own in unfolded]
    assert at[4][conv.name].ranks == (64, 128)


def test_of_two_methods_the_network_nearer_to_the_original_is_taken(task: Task) -> None:
    both = [VbmfTucker(task, weakened) for weakened in (False, True)]
    alone = [bench(task, lambda own, one=one: one) for one in both]
    cost = alone[0].full_cost / 2
    divergences = [own.propose(None, cost, "half").divergence for own in alone]
    together = Baseline(task, lambda what, share: None, lambda own: both)
    assert divergences[0] != divergences[1]
    assert together.propose(None, cost, "half").divergence == min(divergences)


# --- the greedy choice ------------------------------------------------------------------------------------------


def test_scores_rise_and_stay_as_near_as_they_can() -> None:
    np.testing.assert_allclose(greedy.rising(np.array([1.0, 3.0, 2.0, 5.0])), [1.0, 2.5, 2.5, 5.0])


def test_every_layer_takes_its_smallest_ratio_that_scores_enough() -> None:
    rng = np.random.default_rng(0)
    table = {name: np.sort(rng.random(len(greedy.RATIOS))) for name in "abc"}
    thresholds = sorted({float(score) for own in table.values() for score in own})
    before: Mapping[str, float] = dict.fromkeys(table, 0.0)
    for place, least in enumerate([*thresholds, 2.0]):
        found = greedy.ratios_at(table, thresholds, place)
        for name, scores in table.items():
            enough = [ratio for ratio, score in zip(greedy.RATIOS, scores, strict=True) if score >= least]
            assert found[name] == min(enough, default=1.0)
            assert found[name] >= before[name]
        before = found


def test_a_ratio_is_met_by_the_largest_rank(task: Task) -> None:
    for layer in task.layers[1:]:
        for objective in ("params", "macs"):
            (rank,) = (choice := greedy.ratio_choice(layer, 0.3, objective)).ranks
            allowed = 0.3 * layer_cost(layer, None, objective)
            assert layer_cost(layer, choice, objective) <= allowed
            assert layer_cost(layer, Choice(choice.form, (rank + 1,)), objective) > allowed


def test_one_layer_alone_is_compressed_for_a_score(task: Task) -> None:
    layer = task.layers[1]
    own = shrunk(layer, Network(), greedy.ratio_choice(layer, 0.5, "params"))
    assert list(own.factors) == [layer.name]


# --- pruning ----------------------------------------------------------------------------------------------------


def test_a_pruned_network_is_written_as_it_computes_in_pytorch(task: Task) -> None:
    pytest.importorskip("torch", reason="pruning runs in an environment with PyTorch")
    pytest.importorskip("torch_pruning", reason="pruning runs in an environment with Torch-Pruning")
    import baseline_pruning as pruning
    import torch

    plan = TrainingPlan(task.loss, ())
    own = pruning.Pruning(dataclasses.replace(task, training=plan), lambda what, share: None, load(DIGITS).model)
    found = own.propose(None, own.full_cost / 3, "third")
    assert own.full_cost / 4 < found.cost <= own.full_cost / 3
    inputs = next(iter(task.train.batches(8))).inputs
    (outside,) = Runner(found.network.batched)(inputs)
    with torch.no_grad():
        inside = found.network.net(torch.from_numpy(next(iter(inputs.values())))).numpy()
    np.testing.assert_allclose(outside, inside, atol=1e-4)


def test_the_loss_in_pytorch_is_that_of_the_training_graph() -> None:
    torch = pytest.importorskip("torch", reason="pruning runs in an environment with PyTorch")
    pytest.importorskip("torch_pruning", reason="pruning runs in an environment with Torch-Pruning")
    import baseline_pruning as pruning

    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 5, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0])
    given = loss_inputs(Loss("classes", ("logits",)), [teacher], labels)
    found = pruning.distillation(torch.from_numpy(student), given, 3.0)
    hard = -np.log(softmax(student))[np.arange(5), labels].mean()
    soft = -(softmax(teacher / 3) * np.log(softmax(student / 3))).sum(-1).mean()
    assert float(found) == pytest.approx(0.3 * hard + 0.7 * 9 * soft, rel=1e-5)


def test_training_in_pytorch_brings_back_what_pruning_lost(task: Task) -> None:
    pytest.importorskip("torch", reason="pruning runs in an environment with PyTorch")
    pytest.importorskip("torch_pruning", reason="pruning runs in an environment with Torch-Pruning")
    import baseline_pruning as pruning

    plan = TrainingPlan(task.loss, ())
    with pruning.in_place(DIGITS):
        own = pruning.Pruning(dataclasses.replace(task, training=plan), lambda what, share: None, load(DIGITS).model)
        found = own.measured(own.propose(None, own.full_cost / 3, "third"))
        before = {name: value.clone() for name, value in found.network.net.state_dict().items()}
        trainer = pruning.TorchTrainer(found.network.net, task.loss, next(iter(own._batch())), task.batch)
        teacher = Runner(task.batched, task.loss.outputs, threads=1)
        drawn = examples(task.train, task.batch, 0, Lessons(teacher, None), labels=True)
        fine_tune(cast(Trainer, trainer), drawn, seconds=0.0, learning_rate=1e-3, steps=60)
        trained = own.measured(dataclasses.replace(found, network=own._pruned(trainer.net)))
    assert found.drop is not None
    assert trained.drop is not None
    assert trained.drop.value < found.drop.value / 4
    assert all(bool((value == before[name]).all()) for name, value in found.network.net.state_dict().items())


# --- the table --------------------------------------------------------------------------------------------------


def row(method: str, **entries: Any) -> dict[str, Any]:
    before = {"metric": 90.0, "params": 4000, "macs": 9000, "size_bytes": 16000, "latency_ms": 2.0}
    after = {"metric": 89.5, "params": 1000, "macs": 3000, "size_bytes": 5000, "latency_ms": 1.0}
    made = {
        "method": method,
        "model": "net",
        "original": before,
        "result": after,
        "drop": 0.5,
        "drop_interval": {"value": 0.5, "low": 0.25, "high": 0.75},
        "compressed": True,
        "report": {"warnings": [], "metric_name": "top1"},
        "versions": {"onnx": "1"},
        "process_seconds": 90.0,
    }
    return {**made, **entries}


def test_the_table_holds_what_the_cells_hold() -> None:
    skipped = {"method": "pruning", "model": "net", "skipped": "needs torch"}
    settings = vars(quality.Settings(8, "params", 1, 0, 2))
    text = quality_table.document([row("ours"), skipped], settings)
    line = "| onnxneutrino | 1 000 | 4.00x | 3 000 | 3.00x | 5 | 3.20x | 2.00x | 0.50 | 0.25 to 0.75 | 1.5 |"
    assert line in text.splitlines()
    assert "- filter pruning: needs torch" in text
    lines = [own for own in text.splitlines() if own.startswith("|")]
    assert len({own.count("|") for own in lines}) == 1


def test_a_cell_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []

    def made(arguments: list[str]) -> None:
        runs.append(arguments)
        Path(arguments[5]).write_text(json.dumps(row("ours")), encoding="utf-8")

    monkeypatch.setattr(quality, "run", made)
    for minutes in (1.0, 1.0, 2.0):
        settings = quality.Settings(minutes, "params", 1, 0, 2)
        found = quality.cell("ours", DIGITS, None, tmp_path, settings, None)
        assert found["settings"]["minutes"] == minutes
    assert len(runs) == 2


def test_a_cell_that_fails_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "run", lambda arguments: "it broke")
    settings = quality.Settings(1, "params", 1, 0, 2)
    assert quality.cell("svd", DIGITS, None, tmp_path, settings, None)["failed"] == "it broke"
    assert not list(tmp_path.iterdir())


def test_pruning_without_its_environment_is_skipped(tmp_path: Path) -> None:
    settings = quality.Settings(1, "params", 1, 0, 2)
    found = quality.cell("pruning", DIGITS, None, tmp_path, settings, str(tmp_path / "none"))
    assert "torch" in found["skipped"]


def test_a_model_stands_beside_the_data_that_its_toml_names(tmp_path: Path) -> None:
    models, data, work = (tmp_path / name for name in ("given", "elsewhere", "work"))
    for folder in (models, data, work):
        folder.mkdir()
    (models / "net.onnx").write_bytes(b"model")
    (models / "net.toml").write_text("[data]\npath = '../data/net.npz'\n", encoding="utf-8")
    (data / "net.npz").write_bytes(b"data")
    for _ in range(2):
        placed = quality.placed(models / "net.onnx", data, work)
        assert placed.read_bytes() == b"model"
        config = load_config(placed, {})
        assert (config.data.base / config.data.path).read_bytes() == b"data"
