"""List every operator of fixtures/operators: what the training runtime does with it alone, and with the project.

Each case is a small graph with a trained zero added to its input, built as `tests/test_operators.py` builds it. Its
gradient is compared with finite differences twice: of the stock runtime's artifacts for the graph as it is, and of
the project's training copy. Cases run in child processes, many in each; behind one that a kernel ends, a new child
goes on. Exit code 1 where the project's gradient of a case is neither right nor refused. `docs/operators.md` is this
table.

    python benchmarks/operator_table.py [--output docs/operators.md] [--only OPERATOR]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import ModelProto

from onnxneutrino import finetune
from onnxneutrino.differentiable import untrainable
from onnxneutrino.errors import NeutrinoError
from onnxneutrino.finetune import Example
from onnxneutrino.gradcheck import Derivative, derivatives
from onnxneutrino.losses import Loss
from onnxneutrino.runtime import Runner
from onnxneutrino.training_copy import training_copy

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-2  # relative, of a directional derivative
CLOSE = 1e-4  # relative, of an output
DIRECTIONS = 3
TIMEOUT = 300.0


@dataclass(frozen=True)
class Outcome:
    """One measurement of one case.

    Attributes:
        kind: `right`, `wrong`, `no gradient`, `no kernel`, `fails`, `crashes`, `outputs differ` or `refused`.
        detail: by how much, why, or with which signal; empty for none.
        error: largest relative difference of a directional derivative, NaN where there is none.
    """

    kind: str
    detail: str = ""
    error: float = math.nan


@dataclass(frozen=True)
class Row:
    """One case: its operator, name and opset, both outcomes, and what the operator became in the training copy."""

    operator: str
    name: str
    opset: int
    stock: Outcome
    own: Outcome
    lowered: tuple[str, ...]


def cases() -> ModuleType:
    """The module that reads the cases and builds their graphs."""
    spec = importlib.util.spec_from_file_location("test_operators", ROOT / "tests" / "test_operators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stock(model: ModelProto, inputs: dict[str, Any]) -> Outcome:
    """The gradient that the training runtime gives for the graph as it is, whatever the project knows of it."""
    with mock.patch.object(finetune, "check_gradients"):
        return _compared(model, model, inputs)


def own(model: ModelProto, inputs: dict[str, Any], operator: str) -> tuple[Outcome, tuple[str, ...]]:
    """The same for the project's training copy, and the operators that stand in the copy and not in the graph."""
    try:
        copy = training_copy(model, len(inputs["given"]))
    except NeutrinoError as error:
        return Outcome("refused", str(error)), ()
    before, after = (Counter(node.op_type for node in graph.graph.node) for graph in (model, copy))
    lowered = tuple(sorted(after - before)) if after[operator] < before[operator] or after - before else ()
    wanted, got = (Runner(graph)(inputs)[0].astype(np.float64) for graph in (model, copy))
    difference = float(np.max(np.abs(wanted - got)) / max(float(np.abs(wanted).max()), 1e-6))
    if not difference <= CLOSE:
        return Outcome("outputs differ", f"by {difference:.1e}"), lowered
    faults = untrainable(copy, ["zero"], ["y"])
    if faults:
        others = sorted({kind for _, kind in faults} - {operator})
        return Outcome("refused", ", ".join(others)), lowered
    return _compared(model, copy, inputs), lowered


def _compared(model: ModelProto, copy: ModelProto, inputs: dict[str, Any]) -> Outcome:
    (wanted,) = Runner(model)(inputs)
    target = wanted + np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)
    try:
        found: list[Derivative] = derivatives(
            model, copy, [["zero"]] * DIRECTIONS, Loss("values", ("y",)), Example(inputs, [target], None)
        )
    except Exception as error:  # of the runtime, of the artifact builder: all are what is measured
        return _failure(str(error))
    worst = max(entry.error for entry in found)
    if worst < TOLERANCE:
        return Outcome("right", error=worst)
    return Outcome("wrong", "zero" if all(entry.analytic == 0 for entry in found) else f"by {worst:.1g}", worst)


def _failure(text: str) -> Outcome:
    line = text.removeprefix("ONNX Runtime training refuses the model: ").strip().splitlines()[0]
    if re.search(r"gradient.*(not registered|no.*registered)|no gradient builder", line, re.IGNORECASE):
        return Outcome("no gradient")
    if "NOT_IMPLEMENTED" in line:
        return Outcome("no kernel")
    return Outcome("fails", _reason(line))


def _reason(line: str) -> str:
    """What the runtime says at the end of a line, without its source position, function and error code."""
    if line.startswith("/"):
        line = re.sub(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : |^.*\) const |^/\S+ [^)]*\) ", "", line)
    return re.sub(r"^.*(, Error |Status Message: )", "", line)[:LONGEST]


def _child(which: str, numbers: Sequence[int]) -> None:
    """Measure these cases, one line of JSON for each as soon as it is known."""
    listed = cases()
    for number in numbers:
        print("\n" + json.dumps({"begun": number}), flush=True)  # the runtime prints too, and not whole lines
        case = listed.CASES[number]
        model = listed.with_zero(case)
        inputs = listed.given(model, case)
        found, lowered = (stock(model, inputs), ()) if which == "stock" else own(model, inputs, case["operator"])
        print("\n" + json.dumps({"done": number, **dataclasses.asdict(found), "lowered": lowered}), flush=True)


def measured(which: str, numbers: Iterable[int]) -> dict[int, tuple[Outcome, tuple[str, ...]]]:
    """Outcomes by number of the case; a case that ends its child crashes, and the next child starts behind it."""
    left = list(numbers)
    found: dict[int, tuple[Outcome, tuple[str, ...]]] = {}
    while left:
        command = [sys.executable, __file__, "--measure", which, *map(str, left)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            output, how = done.stdout, f"signal {-done.returncode}" if done.returncode < 0 else _last(done.stderr)
        except subprocess.TimeoutExpired as late:
            output, how = (late.stdout or b"").decode(), f"no end within {TIMEOUT:g} s"
        begun = None
        for line in (line for line in output.splitlines() if line.startswith("{")):
            entry = json.loads(line)
            begun = entry.get("begun", begun)
            if "done" in entry:
                outcome = Outcome(entry["kind"], entry["detail"], entry["error"])
                found[entry["done"]] = outcome, tuple(entry["lowered"])
        if begun is None:
            sys.exit(f"no case could be measured: {how}")
        if begun not in found:
            found[begun] = Outcome("crashes", how), ()
        left = [number for number in left if number not in found]
        print(f"{which}: {len(left)} cases left", file=sys.stderr, flush=True)
    return found


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def table(rows: Sequence[Row]) -> str:
    """One line for each operator."""
    lines = [
        "| operator | cases | opsets | stock runtime | in the training copy | with onnxneutrino | largest error |",
        "|---|---:|---|---|---|---|---:|",
    ]
    for operator in sorted({row.operator for row in rows}):
        own_rows = [row for row in rows if row.operator == operator]
        opsets = sorted({row.opset for row in own_rows})
        span = str(opsets[0]) if len(opsets) == 1 else f"{opsets[0]}-{opsets[-1]}"
        chains = Counter(name for row in own_rows for name in row.lowered)
        errors = [row.own.error for row in own_rows if not math.isnan(row.own.error)]
        worst = f"{max(errors):.0e}" if errors else "n/a"
        cells = (
            operator,
            str(len(own_rows)),
            span,
            _summary([(row.name, row.stock) for row in own_rows]),
            ", ".join(sorted(chains)) or "as it is",
            _summary([(row.name, row.own) for row in own_rows]),
            worst,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _summary(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """How many cases end in each way, and behind all but `right` which cases and in what detail."""
    kinds = list(dict.fromkeys(outcome.kind for _, outcome in outcomes))
    parts = []
    for kind in sorted(kinds, key=lambda entry: (entry != "right", entry)):
        members = [(name, outcome) for name, outcome in outcomes if outcome.kind == kind]
        text = f"{kind} {len(members)}"
        names = [name for name in dict.fromkeys(name for name, _ in members) if name]
        details = [detail for detail in dict.fromkeys(outcome.detail for _, outcome in members) if detail]
        told = [] if kind == "right" or len(kinds) == 1 else names[:LISTED] + ["..."] * (len(names) > LISTED)
        told += details[:1] if kind != "right" else []
        parts.append(text + (f" ({'; '.join(told)})" if told else ""))
    return ", ".join(parts)


def main() -> None:
    """Print the table, or write it; exit code 1 where a case is neither right nor refused."""
    parser = argparse.ArgumentParser(description="Gradients of every operator, stock and in the training copy.")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write Markdown with a heading to a file")
    parser.add_argument("--only", metavar="OPERATOR", help="cases of one operator")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _child(arguments.measure[0], [int(number) for number in arguments.measure[1:]])
        return
    listed = cases().CASES
    numbers = [index for index, case in enumerate(listed) if arguments.only in (None, case["operator"])]
    before, after = measured("stock", numbers), measured("own", numbers)
    rows = [
        Row(listed[n]["operator"], listed[n].get("name", ""), listed[n]["opset"], before[n][0], *after[n])
        for n in numbers
    ]
    text = table(rows)
    if arguments.output:
        arguments.output.write_text(f"{heading(rows)}\n{text}\n", encoding="utf-8")
    else:
        print(text)
    wrong = [row for row in rows if row.own.kind not in ("right", "refused")]
    for row in wrong:
        print(f"{row.operator} {row.name} (opset {row.opset}): {row.own.kind} {row.own.detail}", file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} cases are neither right nor refused")


def heading(rows: Sequence[Row]) -> str:
    """Title, command, versions, what the columns say and how many cases end in which way."""
    runtime, library = version("onnxruntime-training-cpu"), onnx.__version__
    counts = [
        ", ".join(f"{number} {kind}" for kind, number in Counter(kinds).most_common())
        for kinds in ([row.stock.kind for row in rows], [row.own.kind for row in rows])
    ]
    return HEADING.format(runtime=runtime, library=library, stock=counts[0], own=counts[1], total=len(rows))


LISTED = 3
LONGEST = 120
HEADING = """# Operators and their gradients

Made by `python benchmarks/operator_table.py --output docs/operators.md` with onnxruntime-training-cpu {runtime} and
onnx {library}, from the {total} cases in `fixtures/operators`: a gradient through the operator against finite
differences in three directions, right where they differ by less than 1 %.

- **stock runtime**: the graph as it is. *wrong*: artifacts are made and their gradient is not the derivative; *no
  gradient*: none is registered; *no kernel*: for the operator or its gradient; *crashes*: the process ends.
- **in the training copy**: operators that the project's copy has instead or beside it.
- **with onnxneutrino**: *refused* cases are named and cut out of training; their block learns by reconstruction.
- **largest error**: relative, of all right cases.

Stock runtime: {stock}. With onnxneutrino: {own}.
"""


if __name__ == "__main__":
    main()
