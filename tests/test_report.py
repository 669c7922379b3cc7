from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from onnxneutrino import console, formats
from onnxneutrino.cost import NodeCost
from onnxneutrino.errors import UsageError
from onnxneutrino.plan import Choice
from onnxneutrino.report import (
    CandidateRow,
    DecidingImages,
    Interval,
    LayerRow,
    Report,
    SixMetrics,
    TargetRow,
    TrainedBlock,
    Training,
    enhancement,
)

ORIGINAL = SixMetrics(85.47, 3_251_274, 13_011_738, 41_079_808, 13_136_184, 1.234)
STAGE1 = SixMetrics(84.9, 300_000, 1_200_000, 9_000_000, 1_400_000, 0.532)
STAGE2 = SixMetrics(84.6, 162_563, 650_586, 7_000_000, 900_000, 0.41)
DROP = Interval(0.87, 0.52, 1.22)


def full_report() -> Report:
    return Report(
        model="net.onnx",
        data="cifar10.npz",
        metric_name="top1",
        original=ORIGINAL,
        stage1=STAGE1,
        stage2=STAGE2,
        enhancement=enhancement(ORIGINAL, STAGE2, 0.87),
        drop=0.87,
        drop_interval=DROP,
        drop_select=Interval(0.81, 0.3, 1.32),
        drop_report=Interval(0.93, 0.44, 1.42),
        deciding=DecidingImages("half of the test split", 5000),
        delta=1.0,
        objective="params",
        compressed=True,
        layers=(
            LayerRow("conv1", "Conv", (64, 3, 3, 3), "tucker2", (3, 20), 1792, 900, 7000, 3500, None),
            LayerRow("fc", "Gemm", (10, 3), None, (), 40, 40, 30, 30, "no form has fewer parameters"),
        ),
        normalization=("BatchNormalization bn1 folded into Conv conv1",),
        candidates=(
            CandidateRow("stage 1 plan", {"conv1": Choice("tucker2", (3, 20))}, 1e5, None, 0.5, True, 12.5, None),
            CandidateRow("stage 2 plan", {}, 2e5, 84.6, 0.87, True, 60.0, True, "smallest within delta"),
        ),
        training=(Training("stage 1 plan", 400, 128, 2, 1e-3),),
        seconds={"calibrate": 4.25, "search": 80.0},
        seed=3,
        settings={"stage": 2, "exclude": ["head*"], "time_limit": 1800.0, "max_params": None},
        versions={"onnx": "1.23.2"},
        warnings=("the data says nothing about real data",),
    )


def text_of(view: RenderableType, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(view)
    return file.getvalue()


# --- values and JSON ------------------------------------------------------------------------------------


def test_enhancement_divides_costs_and_keeps_the_drop() -> None:
    gain = enhancement(ORIGINAL, STAGE2, 0.87)
    assert gain.drop == 0.87
    for name in ("params", "size_bytes", "macs", "memory_bytes", "latency_ms"):
        assert getattr(gain, name) * getattr(STAGE2, name) == pytest.approx(getattr(ORIGINAL, name))
    assert math.isnan(enhancement(ORIGINAL, dataclasses.replace(STAGE2, macs=0), None).macs)


def test_json_has_the_fields_of_the_specification() -> None:
    keys = set(json.loads(full_report().to_json()))
    assert keys >= {
        "original",
        "stage1",
        "stage2",
        "enhancement",
        "drop",
        "drop_interval",
        "drop_select",
        "drop_report",
        "delta",
        "objective",
        "compressed",
        "layers",
        "normalization",
        "candidates",
        "seconds",
        "seed",
        "versions",
        "warnings",
    }
    assert list(json.loads(full_report().to_json())["original"]) == [
        "metric",
        "params",
        "size_bytes",
        "macs",
        "memory_bytes",
        "latency_ms",
    ]


def test_json_comes_back_equal_and_in_the_same_order() -> None:
    report = full_report()
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    smallest = Report("m", "d", "top1", ORIGINAL, 1.0, "params", False)
    assert Report.from_json(smallest.to_json()) == smallest


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_json_keeps_every_digit(value: float) -> None:
    report = dataclasses.replace(full_report(), drop=value, seconds={"all": value})
    again = Report.from_json(report.to_json())
    assert (again.drop, again.seconds["all"]) == (value, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_never_holds_what_is_not_json(value: float) -> None:
    unmeasured = dataclasses.replace(ORIGINAL, latency_ms=value)
    text = dataclasses.replace(full_report(), original=unmeasured, delta=value).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)
    assert json.loads(text)["original"]["latency_ms"] is None
    assert math.isnan(Report.from_json(text).original.latency_ms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'report.extra'"),
        ({"seed": "three"}, "'report.seed' cannot be \"three\""),
        ({"seed": True}, "'report.seed' cannot be true"),
        ({"layers": 3}, "'report.layers' cannot be 3"),
        ({"layers": [{"name": "conv1"}]}, r"'report\.layers\[0\]\.op' is missing"),
        ({"original": None}, "'report.original' must be an object"),
        ({"seconds": {"all": "long"}}, "'report.seconds.all' cannot be"),
    ],
)
def test_a_wrong_report_is_refused_by_key(change: dict[str, object], message: str) -> None:
    broken = {**json.loads(full_report().to_json()), **change}
    with pytest.raises(UsageError, match=rf"^old\.json: {message}"):
        Report.from_json(json.dumps(broken), "old.json")


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^old\.json: is not JSON"):
        Report.from_json("{", "old.json")


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.format_count(3_251_274), "3.25 M"),
        (formats.format_count(0), "0"),
        (formats.format_count(999), "999"),
        (formats.format_count(1000), "1.00 k"),
        (formats.format_count(99_949), "99.9 k"),
        (formats.format_count(999_499), "999 k"),
        (formats.format_count(999_500), "1.00 M"),
        (formats.format_count(20_353_167_360), "20.4 G"),
        (formats.format_count(None), "-"),
        (formats.format_bytes(131), "131 B"),
        (formats.format_bytes(13_011_738), "13.0 MB"),
        (formats.format_ms(0.4119), "0.412 ms"),
        (formats.format_ms(99.97), "100 ms"),
        (formats.format_ms(1234.0), "1.23 s"),
        (formats.format_ms(math.nan), "-"),
        (formats.format_ratio(12.41), "12.4\N{MULTIPLICATION SIGN}"),
        (formats.format_ratio(0.987), "0.987\N{MULTIPLICATION SIGN}"),
        (formats.format_percent(0.154), "15.4 %"),
        (formats.format_metric(85.471), "85.47"),
        (formats.format_metric(-0.5), "-0.500"),
        (formats.format_metric(0.9996), "1.00"),
        (formats.format_metric(0.000012), "1.20e-05"),
        (formats.format_metric(None), "-"),
        (formats.format_seconds(8.24), "8.2 s"),
        (formats.format_seconds(59.7), "1 min 00 s"),
        (formats.format_seconds(245), "4 min 05 s"),
        (formats.format_seconds(3725), "1 h 02 min"),
        (formats.format_shape((64, 3, 3, 3)), "64x3x3x3"),
        (formats.format_shape(()), "scalar"),
    ],
)
def test_numbers_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


@given(st.integers(1, 10**14))
def test_a_count_is_right_to_three_digits(value: int) -> None:
    number, _, prefix = formats.format_count(value).partition(" ")
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(number) * factor == pytest.approx(value, rel=0.00501)
    assert len(number.replace(".", "")) <= 3


# --- views ----------------------------------------------------------------------------------------------


def test_summary_has_the_shape_of_table_1() -> None:
    lines = text_of(console.summary(full_report())).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["top1", "Size", "MACs", "#Params", "Memory", "Latency"]
    assert [line[:8].strip() for line in lines[1:5]] == ["Original", "Stage 1", "Stage 2", "Enh."]
    assert "85.47" in lines[1]
    assert "3.25 M" in lines[1]
    assert "drop 0.870" in lines[4]
    assert "20.0\N{MULTIPLICATION SIGN}" in lines[4]
    assert "whole test split: 0.870 (95 % interval 0.520 to 1.22), delta 1.00." in lines[5]
    assert "half of the test split: 0.810" in lines[6]
    assert "other images: 0.930" in lines[7]
    assert lines[8].startswith("Warning: the data says")


def test_summary_of_stage_1_has_no_second_row_and_failure_is_a_sentence() -> None:
    first = text_of(console.summary(dataclasses.replace(full_report(), stage2=None)))
    assert "Stage 1" in first
    assert "Stage 2" not in first
    assert "No smaller model" not in first
    kept = " ".join(text_of(console.summary(dataclasses.replace(full_report(), compressed=False))).split())
    assert "No smaller model stays within delta 1.00: the normalized original was written." in kept


def test_hard_targets_are_compared_with_what_was_written() -> None:
    rows = (TargetRow("params", 162_563, 1000.0), TargetRow("size", 650_585, 2000.0), TargetRow("latency", 0.3, None))
    report = dataclasses.replace(full_report(), targets=rows)
    assert [row.name for row in report.missed()] == ["size", "latency"]
    assert Report.from_json(report.to_json()) == report
    line = console.missed(report)
    assert line == (
        "hard targets not met within delta 1.00: size 651 kB instead of 651 kB, latency 0.410 ms instead of 0.300 ms; "
        "the best model found was written"
    )
    assert console.missed(full_report()) == ""
    out_of_reach = dataclasses.replace(report, delta=None, targets=(TargetRow("macs", 1e6, 2e6),))
    assert console.missed(out_of_reach) == (
        "hard target not met: macs 7.00 M instead of 1.00 M (the smallest plan has about 2.00 M); "
        "the best model found was written"
    )


def test_summary_without_delta_says_what_was_kept() -> None:
    report = dataclasses.replace(full_report(), delta=None, compressed=False, targets=(TargetRow("macs", 1e7, None),))
    text = " ".join(text_of(console.summary(report)).split())
    assert "The original meets all hard targets: the normalized original was written." in text
    assert "0.520 to 1.22)." in text
    assert "delta" not in text


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (0.98, "for the hard targets meets them, untrained with a drop of 0.500."),
        (1.25, "comes to 1.25 times"),
    ],
)
def test_outlook_with_hard_targets(cost: float, words: str) -> None:
    row = dataclasses.replace(full_report().candidates[0], cost=cost)
    settings = {"trainer": "ort", "time_limit": 60.0}
    report = dataclasses.replace(
        full_report(), delta=None, candidates=(row,), targets=(TargetRow("macs", 1e7, 1e6),), settings=settings
    )
    assert words in " ".join(text_of(console.outlook(report)).split())


def test_outlook_for_latency_compares_times() -> None:
    row = dataclasses.replace(full_report().candidates[0], cost=0.617)
    settings = {"trainer": "ort", "time_limit": 60.0}
    report = dataclasses.replace(full_report(), objective="latency", candidates=(row,), settings=settings)
    assert "Roughly within reach: 2.00\N{MULTIPLICATION SIGN} fewer ms" in text_of(console.outlook(report))


def test_a_metric_function_does_not_break_the_table() -> None:
    report = dataclasses.replace(full_report(), metric_name="some/where/metrics.py:mean_average_precision")
    lines = text_of(console.summary(report)).splitlines()
    assert lines[0].split()[0] == "mean_average"
    assert len(lines[0]) <= 80


def test_layer_table_shows_forms_or_reasons_and_names_as_they_are() -> None:
    layers = [
        console.AnalyzedLayer("block[0]/conv", "Conv", (64, 3, 3, 3), 1792, 1_769_472, ("cp",), 0.25, None),
        console.AnalyzedLayer("fc", "MatMul", (10, 3), 40, 30, (), None, "excluded"),
    ]
    text = text_of(console.layer_table(layers))
    conv, gemm = text.splitlines()[1:3]
    assert conv.split() == ["block[0]/conv", "Conv", "64x3x3x3", "1.79", "k", "1.77", "M", "0.250", "cp"]
    assert gemm.split() == ["fc", "MatMul", "10x3", "40", "30", "-", "frozen:", "excluded"]
    assert "1 of 2 layers marked, 1.79 k of 1.83 k params in them." in text


def test_profile_table_puts_a_chain_beside_the_layer_it_replaces() -> None:
    before = [
        NodeCost("conv1", "Conv", 1000, 2000, (1, 3, 4, 4)),
        NodeCost("relu", "Relu", 0, 0, (1, 3, 4, 4)),
        NodeCost("old", "Gemm", 10, 20, (1, 10)),
    ]
    after = [
        NodeCost("conv1/tucker2.0", "Conv", 100, 200, (1, 2, 4, 4)),
        NodeCost("conv1/tucker2.1", "Conv", 150, 300, (1, 3, 4, 4)),
    ]
    text = text_of(console.profile_table("top1", ORIGINAL, before, STAGE2, after))
    times = "\N{MULTIPLICATION SIGN}"
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["conv1"] == ["Conv", "1.00", "k", "250", f"4.00{times}", "2.00", "k", "500", f"4.00{times}"]
    assert rows["old"] == ["Gemm", "10", "-", "-", "20", "-", "-"]
    assert rows["#Params"] == ["3.25", "M", "163", "k", f"20.0{times}"]
    assert "relu" not in rows
    assert "Ratio" not in text_of(console.profile_table("top1", ORIGINAL, before))


def test_summary_says_what_learned_by_reconstruction() -> None:
    blocks = (
        TrainedBlock(("a", "b"), "reconstruction", ("t",), ("Sign",)),
        TrainedBlock(("c",), "reconstruction", ("u",), ("If", "Sign")),
        TrainedBlock(("d",), "end to end", ("y",), ()),
    )
    told = "3 layers in 2 blocks learned the original's tensors, because no gradient passes If, Sign."
    trained = dataclasses.replace(full_report(), blocks=blocks, training=(Training("one", 5, 64, 2, 1e-3),))
    assert told in " ".join(text_of(console.summary(trained)).split())
    assert "learned the original" not in text_of(console.summary(dataclasses.replace(trained, training=())))
    only_whole = dataclasses.replace(full_report(), blocks=blocks[2:])
    assert "learned the original" not in text_of(console.summary(only_whole))
