"""Kill real runs at random moments, go on with each, and compare what they end with; the table `kill`.

The digits are compressed with `--resume`. Every process but the last of a run gets SIGKILL after a random time, two of
them while the result is verified and written. After each kill `out.onnx` must be absent, the old file or a whole
new one, and the next process must go on. A run that came to its end is repeated from its report without interruption
(`--replay`): the same bytes must come out.

    python benchmarks/kill.py --work FOLDER [--kills 50] [--time-limit 60] [--output FILE.md] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from cells import FIXTURES, STARTING, machine, versions_line, write_row, written

from onnxneutrino.report import Report
from onnxneutrino.summary import versions

KILLS = 8  # in one run, after which it may come to its end
LONGEST = 0.4  # of the time limit, that a process is left alive
LATE = 2  # the last kills of a run come while the result is verified and written
SECONDS = {"verify": 2.0, "write": 0.3}  # that these take, about


@dataclass
class Run:
    """What became of one run.

    Attributes:
        seed: of the run.
        absent: kills after which there was no `out.onnx`.
        old: kills after which the old one was there.
        whole: kills after which a whole new one was there.
        lost: kills after which something else was there, or after which the run did not go on.
        equal: whether the repetition without interruption gave the same bytes; None while there was none.
        fine_tunes: in the report.
    """

    seed: int
    absent: int = 0
    old: int = 0
    whole: int = 0
    lost: int = 0
    equal: bool | None = None
    fine_tunes: int = 0

    @property
    def kills(self) -> int:
        """All of them."""
        return self.absent + self.old + self.whole + self.lost


def main() -> None:
    """Kill until there were enough kills; exit code 1 where anything was lost."""
    parser = argparse.ArgumentParser(description="Kill runs and go on with them.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--time-limit", type=float, default=60.0, help="of a run, in seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    runs: list[Run] = []
    while (left := options.kills - sum(run.kills for run in runs)) > 0:
        folder = options.work / str(len(runs))
        run = killed(folder, options.seed + len(runs), min(left, KILLS), options.time_limit, options.threads)
        runs.append(run)
        print(json.dumps(asdict(run)), flush=True)
        if options.json is not None:
            write_row(options.json, row(runs, options))
    written(document(row(runs, options)), options.output)
    if any(run.lost or not run.equal for run in runs):
        sys.exit("a run was lost")


def killed(folder: Path, seed: int, kills: int, time_limit: float, threads: int) -> Run:
    """One run, killed so often, and its repetition; every other run has an old `out.onnx` in its way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for suffix in ("onnx", "toml", "npz"):
        shutil.copy(FIXTURES / f"digits.{suffix}", folder)
    target = folder / "out.onnx"
    if seed % 2:
        shutil.copy(FIXTURES / "digits.onnx", target)
    command = [sys.executable, "-m", "onnxneutrino", "compress", "digits.onnx", "out.onnx", "--resume"]
    command += ["--time-limit", f"{time_limit:g}s", "--threads", str(threads), "--seed", str(seed)]
    drawn = random.Random(seed)
    run = Run(seed)
    for index in range(kills):
        phase = "" if index < kills - LATE else "verify" if index % 2 else "write"
        after = drawn.uniform(0, SECONDS.get(phase, LONGEST * time_limit))
        code = stopped(command, folder, after, phase)
        if code == 0:
            break
        if code > 0:
            run.lost += 1  # it ended by itself, with an error
            continue
        found = state(target)
        setattr(run, found, getattr(run, found) + 1)
    if finished(command, folder) != 0:
        run.lost += 1
        return run
    report = Report.from_json((folder / "out.report.json").read_text(encoding="utf-8"))
    run.fine_tunes = len(report.training)
    again = [*command[:5], "again.onnx", "--replay", "out.report.json", "--threads", str(threads)]
    run.equal = finished(again, folder) == 0 and digest(target) == digest(folder / "again.onnx") == report.sha256
    return run


def stopped(command: Sequence[str], folder: Path, after: float, phase: str) -> int:
    """Start a process and kill it `after` seconds, counted from the beginning of a phase where one is given."""
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=file)
        end = time.monotonic() + STARTING
        while not begun(phase, folder) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def begun(phase: str, folder: Path) -> bool:
    """Whether a run verifies its result, or writes it; true without a phase."""
    if phase == "write":
        return any(folder.glob(".out.*.tmp"))
    return phase.encode() in (folder / "log").read_bytes()


def finished(command: Sequence[str], folder: Path) -> int:
    """Run a process to its end; its exit code."""
    with (folder / "log").open("wb") as file:
        return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode


def state(target: Path) -> str:
    """What stands where the result goes: `absent`, the `old` file, a `whole` new one, or else `lost`."""
    if not target.exists():
        return "absent"
    if digest(target) == digest(FIXTURES / "digits.onnx"):
        return "old"
    try:
        onnx.checker.check_model(onnx.load(target), full_check=True)
    except Exception:
        return "lost"
    return "whole"


def digest(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def row(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    return {
        "settings": {"time_limit": options.time_limit, "threads": options.threads, "seed": options.seed},
        "runs": [asdict(run) for run in runs],
        "kills": sum(run.kills for run in runs),
        "survived": sum(run.kills - run.lost for run in runs),
        "resumes": len(runs),
        "equal": sum(run.equal is True for run in runs),
        "versions": versions(),
        "machine": machine(options.threads),
    }


def document(found: Mapping[str, Any]) -> str:
    """The table."""
    lines = [
        "# Killed runs",
        "",
        f"Kills survived: {found['survived']} of {found['kills']}. Runs that ended in the bytes of their repetition "
        f"without interruption: {found['equal']} of {found['resumes']}.",
        "",
        "| seed | kills | out.onnx absent | old | whole | lost | fine-tunes | equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for own in found["runs"]:
        kills = own["absent"] + own["old"] + own["whole"] + own["lost"]
        cells = (own["seed"], kills, own["absent"], own["old"], own["whole"], own["lost"], own["fine_tunes"])
        lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if own['equal'] else 'no'} |")
    limit, threads = found["settings"]["time_limit"], found["settings"]["threads"]
    lines += ["", f"Digits, `--time-limit {limit:g}s --threads {threads}`. {versions_line([found])}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
