"""The HTML report: its text, its drawings' geometry, and the page in a real browser."""

from __future__ import annotations

import ast
import dataclasses
import html
import itertools
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from onnxneutrino import formats, html_report, html_style, plots_agreement, plots_curves, plots_layers, plots_search
from onnxneutrino.formats import TIMES
from onnxneutrino.html_result import headline
from onnxneutrino.plan import Choice
from onnxneutrino.report import (
    Agreement,
    CandidateRow,
    Confusion,
    CurvePoint,
    DecidingImages,
    Interval,
    LayerRow,
    Report,
    Sensitivity,
    SensitivityPoint,
    SixMetrics,
    TargetRow,
    TrainedBlock,
    Training,
    enhancement,
)

ORIGINAL = SixMetrics(85.47, 3_251_274, 13_011_738, 41_079_808, 13_136_184, 1.234)
STAGE1 = SixMetrics(84.9, 300_000, 1_200_000, 9_000_000, 1_400_000, 0.532)
STAGE2 = SixMetrics(85.2, 106_900, 430_000, 2_196_000, 600_000, 0.41)
NASTY = 'a/<script>alert("1")</script>&amp; id="x" #5e1f00 $x^2$ \'\u5c42\x07' + "/very_long" * 12
PLAN = {"conv1": Choice("tucker2", (12, 20))}
MINIMAL = Report("net.onnx", "", "top1", ORIGINAL, None, "params", False)


def layer(index: int, name: str = "") -> LayerRow:
    name = name or f"conv{index}"
    if index % 3 == 2:
        return LayerRow(name, "Conv", (32, 1, 3, 3), None, (), 320, 320, 9000, 9000, "depthwise: group is 32")
    form, ranks = ("tucker2", (12, 20)) if index % 3 == 1 else (None, ())
    after = 1000 if form else 4000
    return LayerRow(name, "Conv", (64, 32, 3, 3), form, ranks, 4000, after, 1_000_000, 250 * after, None)


def curve(steps: int = 600) -> tuple[CurvePoint, ...]:
    ends = range(10, steps + 1, 10)
    return tuple(CurvePoint(end, 2 / end + 0.1, 80 + end / 100 if end % 100 == 0 else None) for end in ends)


def full_report(layers: int = 30) -> Report:
    return Report(
        model="net.onnx",
        data="cifar10.npz",
        metric_name="top1",
        original=ORIGINAL,
        stage1=STAGE1,
        stage2=STAGE2,
        enhancement=enhancement(ORIGINAL, STAGE2, 0.223),
        drop=0.223,
        drop_interval=Interval(0.223, -0.1, 0.546),
        drop_select=Interval(0.31, -0.2, 0.82),
        drop_report=Interval(0.14, -0.3, 0.58),
        deciding=DecidingImages("half of the test split", 5000),
        delta=1.0,
        objective="params",
        compressed=True,
        layers=tuple(layer(index) for index in range(layers)),
        normalization=("19 BatchNormalization folded into Conv",),
        sensitivities=tuple(
            Sensitivity(f"conv{i}", tuple(SensitivityPoint(e, e * e * (i + 1)) for e in (0.02, 0.1, 0.4)))
            for i in range(layers)
        ),
        agreement=Agreement(2000, 95.5, 1640, 52, 38, 270, 10, (Confusion(0, 0, 187), Confusion(3, 5, 9))),
        candidates=(
            CandidateRow("ladder 1.5x", {}, 2_000_000.0, 85.4, 0.07, False, 1.5, True, "divergence 0.01, untrained"),
            CandidateRow("ladder 30x", {}, 100_000.0, 45.4, 40.07, False, 1.5, False),
            CandidateRow("stage 1, first", {}, 300_000.0, 84.9, 0.57, True, 60.0, None),
            CandidateRow("stage 2, a", {row.name: PLAN["conv1"] for row in map(layer, range(layers)) if row.form},
                         106_900.0, 85.2, 0.31, True, 300.0, True),
            CandidateRow("stage 2, trimmed", {}, 90_000.0, 84.2, 1.3, True, 2.0, False),
        ),
        training=tuple(Training(f"stage 2, {i}", 600, 64, 2, 1e-3, curve(), 84.0) for i in range(6)),
        blocks=(TrainedBlock(("conv1",), "reconstruction", ("t1",), ("Resize",)),),
        seconds={"calibrate": 4.25, "search": 80.0},
        seed=3,
        command="onnxneutrino compress net.onnx small.onnx --delta 1",
        settings={"stage": 2, "exclude": ["head*"], "max_params": None, "data": {"layout": "NHWC", "scale": 0.5}},
        versions={"onnxneutrino": "0.1.0", "onnx": "1.23.2"},
        machine="Linux x86_64, 2 cores",
        warnings=("a <b>warning</b>",),
        sha256="ab12",
    )  # fmt: skip


FULL = full_report()
SMALL = dataclasses.replace(
    FULL, layers=FULL.layers[:6], sensitivities=FULL.sensitivities[:3], training=FULL.training[:1]
)
# Result and search only: what the page has of them is all that these change.
BARE = dataclasses.replace(SMALL, sensitivities=(), training=(), agreement=None)
BOTH = f"30.4{TIMES} fewer parameters, 18.7{TIMES} fewer MACs"
TARGETS = (TargetRow("params", 100_000, 90_000), TargetRow("latency", 2.0, None))
REPORTS = {
    "full": FULL,
    "minimal": MINIMAL,
    "not compressed": dataclasses.replace(SMALL, compressed=False, layers=(layer(0), layer(2))),
    "by hand": dataclasses.replace(MINIMAL, compressed=True, drop=0.5),
    "untrained": dataclasses.replace(SMALL, training=(), candidates=FULL.candidates[:2], deciding=None),
    "hard targets": dataclasses.replace(BARE, targets=TARGETS, delta=None),
    "lower is better": dataclasses.replace(BARE, metric_name="loader.py:a_long_error_measure", drop=-0.01, delta=0.05),
    "delta zero": dataclasses.replace(BARE, delta=0.0, drop=0.0),
    "many layers": full_report(130),
    "no latency": dataclasses.replace(
        BARE, original=dataclasses.replace(ORIGINAL, metric=None, latency_ms=math.nan), objective="latency"
    ),
    "1000 classes": dataclasses.replace(
        BARE,
        agreement=Agreement(2000, 90.0, classes=1000, confusions=tuple(Confusion(i, i + 1, 90 - i) for i in range(50))),
    ),
    "no classes": dataclasses.replace(BARE, agreement=Agreement(2000, 99.25)),
    "nasty": dataclasses.replace(
        SMALL,
        model=NASTY,
        data=NASTY,
        metric_name=NASTY,
        layers=(layer(0, NASTY), layer(1, NASTY + "2")),
        sensitivities=(Sensitivity(NASTY, (SensitivityPoint(0.1, 0.2), SensitivityPoint(0.2, math.nan))),),
        candidates=(CandidateRow(NASTY, {}, math.nan, None, math.nan, True, math.nan, None, NASTY),),
        training=(Training(NASTY, 1, 1, 1, 1e-9, (CurvePoint(1, math.inf, math.nan), CurvePoint(2, 0.5))),),
        settings={NASTY: {NASTY: NASTY}},
        seconds={NASTY: math.nan},
        versions={NASTY: NASTY},
        normalization=(NASTY,),
        command=NASTY,
        machine=NASTY,
        warnings=(NASTY,),
    ),
}
PAGES: dict[str, str] = {}


def page(name: str) -> str:
    """The page of a report, made once."""
    if name not in PAGES:
        PAGES[name] = html_report.to_html(REPORTS[name])
    return PAGES[name]


class Reader(HTMLParser):
    """Reads a page: fails where tags do not balance; keeps texts, tags, ids, and what the ids are asked for."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> outside of a drawing"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [own[attribute] or "" for name, own in self.tags if name == tag and attribute in own]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def titles(text: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", text)


# --- the page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_well_formed_stands_alone_and_has_no_active_content(name: str) -> None:
    read = Reader(page(name))
    kinds = {tag for tag, _ in read.tags}
    assert not kinds & {"script", "b", "iframe", "object", "link", "img", "a", "form", "base", "foreignobject"}
    attributes = [(key, value or "") for _, own in read.tags for key, value in own.items()]
    assert not any(key.startswith("on") or key in ("src", "srcset", "action") for key, _ in attributes)
    assert all(value.startswith("#") for key, value in attributes if key.endswith("href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page(name)))
    assert not re.search(r"https?:|@import|//[a-z]", page(name))
    assert ("http-equiv", "Content-Security-Policy") in attributes
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in attributes


@pytest.mark.parametrize("name", REPORTS)
def test_ids_are_unique_and_found_and_every_drawing_has_a_name(name: str) -> None:
    read = Reader(page(name))
    ids = [own["id"] for _, own in read.tags if "id" in own]
    assert len(ids) == len(set(ids))
    asked = re.findall(r'(?:href="#|url\(#)([^")]+)', page(name))
    assert set(asked) == set(ids)
    drawings = [own for tag, own in read.tags if tag == "svg"]
    assert all(own["role"] == "img" and own["aria-label"] for own in drawings)
    assert page(name).count("<title>") == 1 + len(drawings)


@pytest.mark.parametrize("name", REPORTS)
def test_drawings_use_colours_of_the_style_sheet_only(name: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", page(name), re.S):
        styles = " ".join(own["style"] or "" for _, own in Reader(drawing).tags if "style" in own)
        assert "#" not in styles.replace("url(#", "")
        assert set(re.findall(r"var\(--(\w+)\)", styles)) <= {"font", *html_style.PALETTE}
        assert "DejaVu" not in styles


def test_the_same_report_gives_the_same_bytes_whatever_matplotlib_is_set_to() -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        again = html_report.to_html(full_report())
        assert dict(matplotlib.rcParams) == before
    assert again == page("full")


def test_names_are_text_in_full_and_never_markup() -> None:
    read = Reader(page("nasty"))
    shown = NASTY.replace("\x07", "\N{REPLACEMENT CHARACTER}")
    assert read.texts.count(shown) >= 8
    assert not re.search("[\x00-\x08\x0e-\x1f]", page("nasty"))
    bars = next(own for own in re.findall(r"<svg.*?</svg>", page("nasty"), re.S) if "Parameters of" in own)
    assert "\N{HORIZONTAL ELLIPSIS}" in Reader(bars).text


def test_all_sections_stand_in_order_and_empty_ones_are_left_out() -> None:
    everything = ["Result", "Path of the search", "Layers", "Sensitivity", "Fine-tuning", "Agreement with the original"]
    assert titles(page("full")) == [*everything, "This run"]
    assert titles(page("minimal")) == ["Result", "This run"]
    for field, title in (("candidates", 1), ("layers", 2), ("sensitivities", 3), ("training", 4)):
        left = titles(html_report.to_html(dataclasses.replace(SMALL, agreement=None, **{field: ()})))
        assert left == [*(own for own in everything[:5] if own != everything[title]), "This run"]


def test_page_states_what_the_report_holds() -> None:
    text = Reader(page("full")).text
    for told in (
        "3.25 M", f"30.4{TIMES}", "85.20", "-0.100 to 0.546", "half of the test split, 5,000 examples",
        "tucker2 12, 20", "depthwise: group is 32", "95.5 %", "1,640 (82.0 %)", "stage 2, trimmed",
        "refused", "written",
        "a <b>warning</b>", "onnxneutrino compress net.onnx small.onnx --delta 1", "Linux x86_64, 2 cores", "ab12",
        "onnxneutrino 0.1.0, onnx 1.23.2", "19 BatchNormalization folded into Conv", "data.layout", "head*",
        "1 min 20 s", "95.0 %", "Resize", "600 steps, batch 64, learning rate 0.00100",
    ):  # fmt: skip
        assert told in text, told
    assert "drop not measured" not in text
    many = Reader(page("1000 classes")).text
    assert "Most frequent disagreements" in many
    assert page("1000 classes").count("Classes of the original against") == 0
    assert ("19\n20\n71" in many, "20\n21\n70" in many) == (True, False)  # the twenty most frequent


def test_page_of_30_layers_is_small() -> None:
    assert len(page("full").encode()) < 500_000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, f"{BOTH}, drop 0.223 of 1.00 allowed"),
        ({"drop": 1.3}, f"{BOTH}, drop 1.30, more than the 1.00 allowed"),
        ({"drop": None}, f"{BOTH}, drop not measured"),
        ({"drop": -0.2}, f"{BOTH}, top1 better by 0.200"),
        ({"drop": 0.0}, f"{BOTH}, no drop"),
        ({"delta": None}, f"{BOTH}, drop 0.223"),
        ({"compressed": False}, "Not compressed: no smaller network within delta 1.00"),
        ({"compressed": False, "delta": None}, "Not compressed: no smaller network"),
        ({"targets": TARGETS}, f"Hard target not met: {BOTH}, drop 0.223 of 1.00 allowed"),
        ({"compressed": False, "targets": TARGETS[1:]}, "Not compressed: the original meets all hard targets"),
        (
            {"enhancement": enhancement(STAGE1, dataclasses.replace(STAGE1, macs=18_000_000), 0.1)},
            f"2.00{TIMES} more MACs, drop 0.223 of 1.00 allowed",
        ),
        (
            {"enhancement": None, "stage1": None, "stage2": None},
            "no fewer parameters or MACs, drop 0.223 of 1.00 allowed",
        ),
    ],
)  # fmt: skip
def test_headline_is_honest(changes: dict[str, object], told: str) -> None:
    assert headline(dataclasses.replace(FULL, **changes)) == told


def test_missed_targets_and_the_drop_beyond_delta_are_said_on_top() -> None:
    text = Reader(page("hard targets")).text
    assert text.index("Hard target not met: params 107 k instead of 100 k") < text.index("Result")
    assert "not met" in text.split("Smallest plan, about")[1][:60]


# --- the drawings ---------------------------------------------------------------------------------------


def test_the_written_candidate_has_the_plan_of_the_layers() -> None:
    assert plots_search.written_candidate(FULL) == 3
    twice = dataclasses.replace(
        FULL, candidates=(*FULL.candidates[3:], dataclasses.replace(FULL.candidates[3], accepted=False))
    )
    assert plots_search.written_candidate(twice) == 0  # of two with its plan the accepted one
    assert plots_search.written_candidate(dataclasses.replace(FULL, compressed=False)) is None
    assert plots_search.written_candidate(dataclasses.replace(FULL, layers=())) is None


def marked(drawing: str) -> list[tuple[float, float, str]]:
    """Marks of a drawing: place and style."""
    found = [own for tag, own in Reader(drawing).tags if tag == "use" and "fill" in (own["style"] or "")]
    return [(float(own["x"] or ""), float(own["y"] or ""), own["style"] or "") for own in found]


def test_candidates_stand_at_the_logarithm_of_their_ratio_and_their_drop() -> None:
    sizes, drops = (2.0, 4.0, 16.0), (0.1, 0.3, 0.9)
    rows = tuple(
        CandidateRow(f"c{size}", {}, ORIGINAL.params / size, None, drop, trained, 1.0, ok)
        for size, drop, trained, ok in zip(sizes, drops, (True, True, False), (True, False, True), strict=True)
    )
    report = dataclasses.replace(FULL, candidates=rows)
    (x1, y1, one), (x2, y2, two), (x3, y3, three) = marked(plots_search.search_path(report, "k"))
    assert (x3 - x1) / (x2 - x1) == pytest.approx(math.log(8) / math.log(2), rel=1e-3)
    assert (y3 - y1) / (y2 - y1) == pytest.approx(0.8 / 0.2, rel=2e-3)
    assert x1 < x2
    assert y1 > y2  # SVG counts downwards
    assert ["fill: var(--blue)" in one, "fill: var(--vermillion)" in two] == [True, True]
    assert "fill: var(--bg); stroke: var(--blue)" in three  # untrained: hollow
    assert "delta 1.00" in Reader(plots_search.search_path(report, "k")).text


def test_with_hard_targets_the_share_that_is_used_falls_to_the_right() -> None:
    rows = tuple(CandidateRow("c", {}, share, None, 0.1, True, 1.0, True) for share in (2.0, 1.0, 0.5))
    drawing = plots_search.search_path(dataclasses.replace(FULL, candidates=rows, targets=TARGETS, delta=None), "k")
    xs = [x for x, _, _ in marked(drawing)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], rel=1e-3)
    assert xs[0] < xs[1]
    assert "targets met" in Reader(drawing).text


def test_marks_differ_in_shape_and_fill() -> None:
    kinds = plots_search.MARKS
    assert len({mark.marker for mark in kinds.values()}) == len({mark.letter for mark in kinds.values()}) == len(kinds)
    assert {kinds[True, ok].colour == kinds[False, ok].colour for ok in (True, False, None)} == {True}
    assert len({kinds[True, ok].colour for ok in (True, False, None)}) == 3


def test_bars_are_as_long_as_the_numbers() -> None:
    rows = [layer(0), layer(1), layer(2)]
    drawing = plots_layers.params_bars(rows, "k")
    paths = [
        (own["style"] or "", own["d"] or "") for tag, own in Reader(drawing).tags if tag == "path" and "style" in own
    ]
    lengths = {}
    for colour in ("before", "blue", "kept"):
        ends = [
            [float(x) for x in re.findall(r"[ML] (\S+)", d)] for style, d in paths if style == f"fill: var(--{colour})"
        ]
        lengths[colour] = [max(xs) - min(xs) for xs in ends]
    unit = lengths["before"][0] / 4000
    assert lengths["before"] == pytest.approx([4000 * unit, 4000 * unit, 320 * unit], abs=0.02)
    assert lengths["blue"] == pytest.approx([1000 * unit], abs=0.02)
    assert lengths["kept"] == pytest.approx([4000 * unit, 320 * unit], abs=0.02)
    assert "tucker2 12, 20" in Reader(drawing).text


def test_of_many_layers_the_forty_largest_are_drawn_in_their_order() -> None:
    rows = [dataclasses.replace(layer(0, f"n{i}"), params_before=i, macs_before=0) for i in range(60)]
    assert plots_layers.largest(rows) == rows[20:]
    assert "Drawn are the 40 largest" in page("many layers")
    assert all(f">conv{i}<" in page("many layers") for i in range(130))  # in the table


def test_the_most_sensitive_layers_are_named() -> None:
    def straight(name: str, slope: float, at_one: float) -> Sensitivity:
        return Sensitivity(name, tuple(SensitivityPoint(e, at_one * e**slope) for e in (0.01, 0.1, 1.0)))

    crossing = [straight("steep", 3.0, 9.0), straight("flat", 1.0, 1.0), Sensitivity("none", (SensitivityPoint(0, 0),))]
    # At the middle, error 0.1: 9e-3 against 0.1.
    assert plots_curves.by_sensitivity(crossing) == ["flat", "steep"]
    many = [straight(f"l{i}", 2.0, 1.0 + i) for i in range(11)]
    assert [own.layer for own in plots_curves.named(many)] == [f"l{i}" for i in range(10, 3, -1)]
    ten = plots_curves.named(many[:10])
    assert len(ten) == len({own.letter for own in ten}) == len({(own.colour, own.marker) for own in ten}) == 10
    assert plots_curves.sensitivity_curves(crossing[2:], "k") == ""


def test_disagreements_stand_out_from_the_diagonal() -> None:
    pairs = (Confusion(0, 0, 900), Confusion(0, 2, 4), Confusion(1, 2, 2), Confusion(7, 7, 1))
    drawing = plots_agreement.confusion_map(Agreement(907, 99.0, classes=3, confusions=pairs), "k")
    styles = [
        own["style"] or "" for tag, own in Reader(drawing).tags if tag == "path" and "opacity" in (own["style"] or "")
    ]
    opacity = {style.split("opacity: ")[1]: style for style in styles}
    assert sorted(opacity) == ["0.28", "0.31", "0.5"]
    assert "var(--kept)" in opacity["0.28"]
    assert "var(--vermillion)" in opacity["0.5"]
    assert plots_agreement.confusion_map(Agreement(9, 99.0, classes=33, confusions=pairs), "k") == ""


def test_the_floor_is_inside_its_drawing() -> None:
    points = (CurvePoint(10, 0.5, 80.0), CurvePoint(20, 0.4, 80.5))
    text = Reader(plots_curves.training_curves(Training("t", 20, 8, 1, 0.1, points, floor=84.0), "top1", "k")).text
    assert "floor 84.00" in text
    assert {"80", "84"} <= set(text.split("\n"))  # the axis reaches it
    assert plots_curves.training_curves(Training("t", 20, 8, 1, 0.1), "top1", "k") == ""


def luminance(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2.2: ratio of the relative luminances of two sRGB colours."""

    def light(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1])
def test_contrast_suffices_in_light_and_dark(mode: int) -> None:
    colours = {name: luminance(pair[mode]) for name, pair in html_style.PALETTE.items()}

    def over(name: str, opacity: float) -> list[float]:
        return [opacity * c + (1 - opacity) * b for c, b in zip(colours[name], colours["bg"], strict=True)]

    for text, ground in itertools.product(("ink", "muted"), (colours["bg"], colours["panel"], over("green", 0.08))):
        assert contrast(colours[text], ground) >= 4.5
    assert contrast(colours["ink"], over("vermillion", plots_agreement.STRONGEST)) >= 4.5
    assert contrast(colours["muted"], over("kept", plots_agreement.DIAGONAL)) >= 4.5
    for name in ("blue", "vermillion", "green", "purple", "orange", "sky", "plum", "kept"):
        assert contrast(colours[name], colours["bg"]) >= 3


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (2500, "2.5 k"), (100_000, "100 k"), (2e6, "2 M"), (0.05, "0.05"), (1e-6, "1e-06"), (-0.0, "0")],
)
def test_ticks_take_few_digits(value: float, told: str) -> None:
    assert formats.format_tick(value) == told
    assert formats.format_exact(1234567) == "1,234,567"


def test_one_module_knows_matplotlib_and_none_pyplot() -> None:
    package = Path(html_report.__file__).parent
    uses = {}
    for path in package.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [n for node in tree if isinstance(node, ast.Import) for n in (alias.name for alias in node.names)]
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names += [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
        uses[path.stem] = [name for name in names if name.split(".")[0] == "matplotlib"]
    assert [module for module, names in uses.items() if names] == ["plots"]
    assert not any("pyplot" in name for name in uses["plots"])


# --- in a browser ---------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
MEASURE = """
const inner = frame.contentDocument, root = inner.documentElement, found = [];
for (const own of inner.querySelectorAll('details')) own.open = true;
found.push('width ' + root.scrollWidth);
for (const svg of inner.querySelectorAll('svg')) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const own = text.getBoundingClientRect();
    if (own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2 || own.bottom > box.bottom + 2)
      found.push('outside ' + text.textContent);
  }
  if (box.width < 200 || box.height < 60) found.push('small ' + svg.getAttribute('aria-label'));
}
document.title = found.join('; ');
"""


def browse(folder: Path, address: Path, *options: str) -> tuple[str, str]:
    """What headless Chromium writes to standard output, and what pages said on its console."""
    assert BROWSER is not None
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    logged = ("--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}")
    command = [BROWSER, *fixed, *logged, *options, address.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_browser
def test_page_shows_in_light_and_in_dark_without_a_complaint(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page("full"), encoding="utf-8")
    shots = []
    for mode, scheme in enumerate(("1", "0")):
        picture = tmp_path / f"{mode}.png"
        options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,1500")
        _, console = browse(tmp_path, file, *options, f"--screenshot={picture}")
        assert console == ""
        with Image.open(picture) as image:
            shots.append(image.convert("RGB"))
        ground, ink, mark = (
            tuple(int(html_style.PALETTE[name][mode][i : i + 2], 16) for i in (1, 3, 5))
            for name in ("bg", "ink", "vermillion")
        )
        assert shots[mode].getpixel((2, 700)) == ground
        colours = {colour for _, colour in shots[mode].getcolors(1 << 24)}
        assert {ink, mark} <= colours  # text and the drawing
    assert shots[0].tobytes() != shots[1].tobytes()


@needs_browser
@pytest.mark.parametrize("name", ["many layers", "nasty"])
def test_nothing_is_wider_than_a_phone_and_no_text_leaves_its_drawing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "frame.html"
    frame = f'<iframe id="frame" style="width:360px;height:700px;border:0" srcdoc="{html.escape(page(name))}"></iframe>'
    script = f"<script>frame.onload = () => {{{MEASURE}}}</script>"
    file.write_text(f"<!DOCTYPE html><meta charset='utf-8'><title>not run</title>{frame}{script}", encoding="utf-8")
    dom, console = browse(tmp_path, file, "--dump-dom")
    assert console == ""
    found = re.search(r"<title>([^<]*)</title>", dom)
    assert found is not None
    assert found[1] == "width 360"
