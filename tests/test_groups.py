"""A large network is compressed within its budgets, and trained a few blocks at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxneutrino
from onnxneutrino import conductor, graph, large, tuning, weights
from onnxneutrino.blocks import Block
from onnxneutrino.config import Config, DataConfig
from onnxneutrino.delivery import compress_file
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.groups import Group, as_inputs, cut_out, grouped, loss_of
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.spool import Spool

WIDTH, DEPTH = 128, 4


def chain(batch: int | str = "N") -> ModelProto:
    """MatMul and Relu, with spectra that fall."""
    generator = np.random.default_rng(0)
    nodes, held = [], []
    for index in range(DEPTH):
        left, _, right = np.linalg.svd(generator.standard_normal((WIDTH, WIDTH)))
        value = (left * (15 * np.exp(-0.1 * np.arange(WIDTH)) + 0.02)) @ right / 2
        held.append(numpy_helper.from_array(value.astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"y{index}"], f"fc{index}"))
        if index < DEPTH - 1:
            nodes.append(helper.make_node("Relu", [f"y{index}"], [f"h{index + 1}"], f"relu{index}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, WIDTH]) for name in ("h0", f"y{DEPTH - 1}")]
    made = helper.make_graph(nodes, "chain", ends[:1], ends[1:], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


LOSS = Loss("values", ("y3",), reconstructed=("h1", "h2", "h3"), fed=("h1", "h2", "h3"), scales=(4.0, 1.0, 2.0, 3.0))
BLOCKS = [Block((f"fc{index}",), (goal,), True) for index, goal in enumerate(("h1", "h2", "h3", "y3"))]
NAMES = [f"w{index}" for index in range(DEPTH)]
BYTES = 4 * WIDTH * WIDTH


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (0, [Group(("h1",), ()), Group(("h2",), ("h1",)), Group(("h3",), ("h2",)), Group(("y3",), ("h3",))]),
        (2.5 * BYTES, [Group(("h1", "h2"), ("h1",)), Group(("h3", "y3"), ("h2", "h3"))]),
        (100 * BYTES, [Group(("h1", "h2", "h3", "y3"), ("h1", "h2", "h3"))]),
    ],
)
def test_consecutive_blocks_share_a_group_up_to_the_limit(limit: int, found: list[Group]) -> None:
    assert grouped(chain(4), BLOCKS, LOSS, NAMES, limit) == found


def test_a_group_has_the_gradients_of_the_whole() -> None:
    """Each gradient of a part is that of the whole loss, whose mean is over four terms instead of the part's."""
    model = chain(4)
    generator = np.random.default_rng(1)
    x = generator.standard_normal((4, WIDTH)).astype(np.float32)
    values = {name: generator.standard_normal((4, WIDTH)).astype(np.float32) for name in ("y3", "h1", "h2", "h3")}
    with Trainer(model, NAMES, LOSS, 1) as trainer:
        wanted = trainer.gradients(Example({"h0": x}, [values[name] for name in LOSS.tensors], None))
    seen: set[str] = set()
    for group in grouped(model, BLOCKS, LOSS, NAMES, int(2.5 * BYTES)):
        given = {"h0": x, **values}
        part, own = cut_out(model, group, given), loss_of(group, LOSS)
        held = [tensor.name for tensor in part.graph.initializer]
        assert len(held) == 2
        with Trainer(part, held, own, 1) as trainer:
            example = Example(as_inputs(group, given), [values[name] for name in own.tensors], None)
            found = trainer.gradients(example)
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient / 2, wanted[name], rtol=1e-4, atol=1e-7)
        seen.update(found)
    assert seen == set(NAMES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored chain that counts as large, trained two blocks at a time at most."""
    for module in ("weights", "normalize"):
        monkeypatch.setattr(f"onnxneutrino.{module}.LARGE_MODEL_BYTES", 2 * BYTES)
    monkeypatch.setattr(tuning, "GROUP_BYTES", BYTES // 4)
    onnx.save(chain(), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=100)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.mark.parametrize("trainer", ["ort", "reconstruct", "none"])
def test_compress_a_large_model(folder: Path, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    kept = Trainer.__init__

    def watched(self: Trainer, model: ModelProto, *rest: object, **named: object) -> None:
        steps.append(graph.data_bytes(model))
        kept(self, model, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", watched)
    given = graph.load(folder / "in.onnx").model
    x = np.random.default_rng(2).standard_normal((64, WIDTH)).astype(np.float32)
    before = Runner(given)({"h0": x})[0]
    delta = float(np.var(before)) / 10
    config = Config(
        data=DataConfig(path="random"), metric="mse", delta=delta, trainer=trainer, time_limit=12.0, threads=1
    )
    report = compress_file(folder / "in.onnx", folder / "out.onnx", config)
    assert any("rows per dimension" in warning for warning in report.warnings)
    if trainer == "none":
        assert not steps
        assert not report.blocks
    else:
        assert report.training
        assert {own.how for own in report.blocks} == {"reconstruction"}
        assert len(report.blocks) == DEPTH
        assert len(steps) >= 2
        assert max(steps) <= 1.2 * BYTES
    made = graph.load(folder / "out.onnx").model
    assert graph.data_bytes(made) < 0.9 * graph.data_bytes(given)
    assert np.mean((before - Runner(made)({"h0": x})[0]) ** 2) < 2 * delta
    gc.collect()
    assert not list((folder / "temporary").iterdir())


def test_the_result_keeps_the_files_of_its_model(folder: Path) -> None:
    result = onnxneutrino.compress(
        folder / "in.onnx", data="random", metric="mse", delta=1e6, trainer="none", time_limit=6.0, threads=1
    )
    gc.collect()
    assert result.model is not None
    x = np.zeros((1, WIDTH), np.float32)
    assert np.isfinite(Runner(result.model)({"h0": x})[0]).all()
    assert isinstance(result, conductor.Result)


def test_budgets_bind_large_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers.made()
    assert not large.is_large(layers)
    assert large.calibration_rows(layers) == 5
    assert large.probe_rows(layers) == 8192
    assert large.notes(layers, True) == []
    monkeypatch.setattr(weights, "LARGE_MODEL_BYTES", 2 * BYTES)
    assert large.calibration_rows(layers) == pytest.approx(0.25)
    assert large.probe_rows(layers) == 64
    assert len(large.notes(layers, True)) == 1


class Layers:
    """The layers of the chain."""

    @staticmethod
    def made() -> list:
        from onnxneutrino.passes.find_layers import find_layers
        from onnxneutrino.plan import Layer
        from onnxneutrino.prepare import types_of

        model = chain()
        return [own for own in find_layers(model, types_of(model, {"h0": (1, WIDTH)})) if isinstance(own, Layer)]


def test_fits_that_were_forgotten_come_back_alike() -> None:
    from onnxneutrino.factors import Moments
    from onnxneutrino.layer_options import LayerOptions

    layer = Layers.made()[1]
    rows = np.random.default_rng(3).standard_normal((WIDTH // 4, WIDTH)).astype(np.float32)
    moments = Moments(np.zeros(WIDTH, np.float32), len(rows), rows=rows)
    plain, kept = LayerOptions(layer, moments, "params"), LayerOptions(layer, moments, "params", keep=Spool().keep)
    assert plain.options == kept.options
    choice = next(own.choice for own in plain.options if own.choice is not None)
    one, other = plain.factors(choice), kept.factors(choice)
    assert one.error == pytest.approx(other.error)
    np.testing.assert_allclose(one.product(), other.product(), rtol=1e-3, atol=1e-5)
