"""List every ONNX file of a folder: what `analyze` marks and freezes, and params and MACs counted twice.

Costs are those of the file as it is, at batch 1, next to the count of `independent_count.py`, which shares no
code with the package. Marked and frozen layers are those of the normalized graph. A file that is refused is
listed with its one line. `docs/models.md` is this table for the models the project is measured on.

    python benchmarks/model_table.py FOLDER [--output docs/models.md]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from independent_count import count

from onnxneutrino import cost, inspection, prepare
from onnxneutrino.config import load_config
from onnxneutrino.console import AnalyzedLayer
from onnxneutrino.errors import NeutrinoError
from onnxneutrino.graph import load

# Sizes for inputs that the files leave free, by file name and input.
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "ocr_ppocrv2_det_paddle": {"x": (1, 3, 64, 64)},
    "vad_silero_op18": {"input": (1, 288), "state": (2, 1, 128)},
    "vad_silero_spox": {"input": (1, 288), "state": (2, 1, 128)},
}
INSIDE = "inside the body of "


@dataclass(frozen=True)
class Row:
    """One model: a refusal, or what was found.

    Attributes:
        name: of the file without its suffix.
        refusal: the one line, or None.
        nodes: of the main graph as it is.
        marked: layers that can be factorized.
        frozen: reasons and how many layers each keeps.
        counts: params and MACs, the project's.
        independent: the same, counted by a run.
        bodies: some layers are inside If, Loop or Scan: their MACs are not known without running that branch.
    """

    name: str
    refusal: str | None
    nodes: int = 0
    marked: int = 0
    frozen: Mapping[str, int] | None = None
    counts: tuple[int, int] = (0, 0)
    independent: tuple[int, int] = (0, 0)
    bodies: bool = False


def examine(path: Path) -> Row:
    """Analyze one file and count it in both ways."""
    shapes = SHAPES.get(path.stem, {})
    config = load_config(None, {"input_shape": dict(shapes), "seed": 0})
    try:
        opened = prepare.open_model(load(path).model, path.name, config)
        layers = inspection.analyze(path, config)
        counts = cost.params(opened.model), cost.macs(opened.model, opened.types)
    except NeutrinoError as error:
        return Row(path.stem, str(error).replace(str(path), path.name))
    return Row(
        name=path.stem,
        refusal=None,
        nodes=len(opened.model.graph.node),
        marked=sum(layer.reason is None for layer in layers),
        frozen=_reasons(layers),
        counts=counts,
        independent=count(path, shapes),
        bodies=any(layer.reason is not None and layer.reason.startswith(INSIDE) for layer in layers),
    )


def _reasons(layers: Sequence[AnalyzedLayer]) -> dict[str, int]:
    """How many layers are frozen for each reason, the commonest first; names of nodes are left out."""
    texts = [layer.reason for layer in layers if layer.reason is not None]
    short = (" ".join(text.split(" ")[:5]) if text.startswith(INSIDE) else text for text in texts)
    return dict(Counter(short).most_common())


def table(rows: Sequence[Row]) -> str:
    """The models as a Markdown table, and the refused ones below it."""
    lines = [
        "| model | nodes | marked | frozen | params | MACs | equal to the independent count |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for row in (row for row in rows if row.refusal is None):
        reasons = ", ".join(f"{number} {reason}" for reason, number in (row.frozen or {}).items())
        total = sum((row.frozen or {}).values())
        frozen = f"{total}: {reasons}" if total else "0"
        params, macs = (f"{value:,}".replace(",", " ") for value in row.counts)
        macs = "n/a" if row.bodies else macs
        lines.append(f"| {row.name} | {row.nodes} | {row.marked} | {frozen} | {params} | {macs} | {_equal(row)} |")
    refused = [f"- {row.name}: {row.refusal}" for row in rows if row.refusal is not None]
    return "\n".join([*lines, *(["", "Refused:", "", *refused] if refused else [])])


def _equal(row: Row) -> str:
    """Yes or no; where a run cannot see the layers in bodies, the params alone are compared."""
    pairs = dict(zip(("params", "MACs"), zip(row.counts, row.independent, strict=True), strict=True))
    if row.bodies:
        del pairs["MACs"]
    different = [f"{name} {other}" for name, (own, other) in pairs.items() if own != other]
    if different:
        return f"no: {', '.join(different)}"
    return "params yes, MACs n/a" if row.bodies else "yes"


def main() -> None:
    """Print the table, or write it; exit code 1 where a count differs."""
    parser = argparse.ArgumentParser(description="Marked layers, params and MACs of every ONNX file of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write Markdown with a heading to a file")
    arguments = parser.parse_args()
    rows = []
    for path in sorted(arguments.folder.glob("*.onnx")):
        print(path.name, file=sys.stderr, flush=True)
        rows.append(examine(path))
    text = table(rows)
    if arguments.output:
        arguments.output.write_text(f"{HEADING}\n{text}\n", encoding="utf-8")
    else:
        print(text)
    if any(_equal(row).startswith("no") for row in rows if row.refusal is None):
        sys.exit("a count differs from the independent one")


HEADING = """# The models it is measured on

Made by `python benchmarks/model_table.py FOLDER --output docs/models.md`. Nodes, params and MACs are those of the
file as it is, at batch 1; marked and frozen layers those of its normalized graph. The independent count
(`benchmarks/independent_count.py`) walks the file for params and runs it for MACs. Layers inside If, Loop and Scan
stay as they are, and their MACs depend on what the run takes: n/a.
"""


if __name__ == "__main__":
    main()
