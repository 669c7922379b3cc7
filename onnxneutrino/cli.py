"""The command line: parse, call, print, exit code; no logic.

What takes long to import is imported inside the commands: `--help` answers at once, and an interrupt while
onnx and ONNX Runtime are being loaded ends as any other.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxneutrino import heap
from onnxneutrino.cli_options import Duration, common_options, data_options, train_options
from onnxneutrino.cli_output import as_json, emit, messages, run, show
from onnxneutrino.cli_zoo import zoo
from onnxneutrino.config import OBJECTIVES, Config, load_config
from onnxneutrino.errors import UsageError

if TYPE_CHECKING:
    from onnxneutrino.report import Report

FILE = click.Path(path_type=Path)
LIMIT_MISSED = 3  # exit code: a hard target could not be met within delta (the best model is written), or --max-drop


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="onnxneutrino")
def main() -> None:
    """Make an ONNX model smaller and faster, its metric at most delta worse."""
    heap.return_large_blocks()


main.add_command(zoo)


@main.command()
@click.argument("source", metavar="IN.ONNX", type=FILE, help="The model; IN.toml beside it describes the data.")
@click.argument("target", metavar="OUT.ONNX", type=FILE, help="The smaller model; OUT.report.* go beside it.")
@click.option("--delta", type=float, help="Largest drop, in the metric's units; default 1, any with a --max option.")
@click.option("--stage", type=click.IntRange(1, 2), help="Stop after stage 1, or go through both; default 2.")
@click.option("--objective", type=click.Choice(OBJECTIVES), help="What to make small; default params.")
@click.option("--max-params", metavar="COUNT", help="Hard target, such as 200k: the least drop at that many.")
@click.option("--max-macs", metavar="COUNT", help="Hard target, such as 5M; several targets hold together.")
@click.option("--max-size", metavar="BYTES", help="Hard target, such as 500KB or 1.5MiB.")
@click.option("--max-memory", metavar="BYTES", help="Hard target, such as 1MB, weights and activations.")
@click.option("--max-latency", metavar="TIME", help="Hard target, such as 2ms, on this machine.")
@click.option("--time-limit", type=Duration(), help="For everything, such as 15m; default 30m.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave nodes such as conv* alone; repeatable.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Factorize nodes such as conv* only; repeatable.")
@click.option("--labels/--no-labels", default=None, help="Train against labels and teacher, or teacher alone.")
@click.option(
    "--trainer",
    metavar="TRAINER",
    help="ort; reconstruct: block by block, without labels. none: factors and refit, no fine-tuning. "
    "Or your own: file.py:function, or 'command: PROGRAM ARGS {candidate} {trained} {original} {seconds}'.",
)
@click.option("--confidence", type=float, help="One-sided, that a drop is within delta; default 0.8.")
@click.option("--dry-run", is_flag=True, default=None, help="Everything up to the first training step; writes nothing.")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--verbose", is_flag=True, help="More lines: what was normalized, frozen, trained.")
@click.option(
    "--replay",
    metavar="REPORT",
    type=click.Path(path_type=Path),
    help="Repeat the run of this report bit for bit.",
)
@click.option(
    "--run-dir", metavar="DIR", type=FILE, help="The run's own folder while it goes on; default OUT.ONNX.run."
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted run that lies there, if there is one.")
@train_options
@data_options
@common_options
def compress(
    source: Path,
    target: Path,
    quiet: bool,
    verbose: bool,
    replay: Path | None,
    run_dir: Path | None,
    resume: bool,
    json_file: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Write a smaller OUT.ONNX, OUT.report.json and OUT.report.html. IN.toml beside IN.ONNX describes the data."""

    def work() -> None:
        from onnxneutrino import console, delivery
        from onnxneutrino.progress import Progress
        from onnxneutrino.replay import check_repeated

        if replay is not None and (resume or run_dir):
            raise UsageError("--replay keeps no run directory; give it without --resume and --run-dir")
        before = None if replay is None else read_report(replay)
        config = configured(source, options, before)
        progress = Progress(quiet, sys.stderr.isatty(), verbose=verbose)
        with progress, messages():
            report = delivery.compress_file(source, target, config, progress, command_line(), run_dir, resume)
        if before is not None:
            check_repeated(before, report, target)
        show(console.outlook(report) if config.dry_run else console.summary(report), json_file)
        if not config.dry_run and json_file != "-":
            reports = (target.with_suffix(f".report.{kind}") for kind in ("json", "html"))
            click.echo(f"Wrote {target}, {' and '.join(map(str, reports))}.")
        emit(json_file, report.to_json())
        missed = "" if config.dry_run else console.missed(report)
        if missed:
            click.echo(f"onnxneutrino: {missed}", err=True)
            sys.exit(LIMIT_MISSED)

    run(work, json_file, debug)


@main.command()
@click.argument("source", metavar="IN.ONNX", type=FILE, help="The model; IN.toml beside it describes the data.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave nodes such as conv* alone; repeatable.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Factorize nodes such as conv* only; repeatable.")
@data_options
@common_options
def analyze(source: Path, json_file: str | None, debug: bool, **options: Any) -> None:
    """List every layer: marked with its forms, or frozen and why; with data also its sensitivity."""

    def work() -> None:
        from onnxneutrino import console, inspection

        with messages():
            layers = inspection.analyze(source, configured(source, options))
        show(console.layer_table(layers), json_file)
        emit(json_file, as_json([dataclasses.asdict(layer) for layer in layers]))

    run(work, json_file, debug)


@main.command()
@click.argument("source", metavar="IN.ONNX", type=FILE, help="The model; IN.toml beside it describes the data.")
@click.option("--compare", metavar="OTHER.ONNX", type=FILE, help="Show this model beside it.")
@data_options
@common_options
def profile(source: Path, compare: Path | None, json_file: str | None, debug: bool, **options: Any) -> None:
    """Show the six metrics, in all and by node; the user's metric where there is data."""

    def work() -> None:
        from onnxneutrino import console, inspection

        config = configured(source, options)
        with messages():
            profiles = inspection.profile([source] if compare is None else [source, compare], config)
        other = profiles[1] if compare is not None else None
        table = console.profile_table(
            profiles[0].metric_name,
            profiles[0].metrics,
            profiles[0].nodes,
            other.metrics if other else None,
            other.nodes if other else (),
        )
        show(table, json_file)
        emit(json_file, as_json([dataclasses.asdict(entry) for entry in profiles]))

    run(work, json_file, debug)


@main.command()
@click.argument("source", metavar="ORIGINAL.ONNX", type=FILE, help="The model as it was.")
@click.argument("other", metavar="OTHER.ONNX", type=FILE, help="The model to compare with it.")
@click.option("--max-drop", type=float, metavar="DROP", help="Exit with code 3 where the metric drops by more.")
@data_options
@common_options
def compare(
    source: Path, other: Path, max_drop: float | None, json_file: str | None, debug: bool, **options: Any
) -> None:
    """Measure how much worse OTHER.ONNX is on the test split, and what it saves; for pipelines."""

    def work() -> None:
        from onnxneutrino import console, inspection
        from onnxneutrino.formats import format_metric

        with messages():
            found = inspection.compare(source, other, configured(source, options))
        one, two = found.profiles
        table = console.comparison_table(
            one.metrics, two.metrics, one.metric_name, found.drop, found.examples, found.agreement
        )
        show(table, json_file)
        emit(json_file, as_json(dataclasses.asdict(found)))
        if max_drop is not None and found.drop.value > max_drop:
            allowed = f"more than --max-drop {format_metric(max_drop)}"
            click.echo(f"onnxneutrino: {other}: drops by {format_metric(found.drop.value)}, {allowed}", err=True)
            sys.exit(LIMIT_MISSED)

    run(work, json_file, debug)


@main.command()
@click.argument("source", metavar="IN.ONNX", type=FILE, help="The model; IN.toml beside it describes the data.")
@data_options
@common_options
def evaluate(source: Path, json_file: str | None, debug: bool, **options: Any) -> None:
    """Measure the metric on the test split."""

    def work() -> None:
        from onnxneutrino import formats, inspection

        with messages():
            found = inspection.evaluate(source, configured(source, options))
        for warning in found.warnings:
            click.echo(f"onnxneutrino: {warning}", err=True)
        if json_file != "-":
            click.echo(f"{found.metric} {formats.format_metric(found.value)} on {found.examples} test examples")
        emit(json_file, as_json(dataclasses.asdict(found)))

    run(work, json_file, debug)


def read_report(path: Path) -> Report:
    """The report in a file."""
    from onnxneutrino.report import Report

    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: cannot be read as a report: it is a folder, device or pipe")
    try:
        return Report.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a report: {error}") from error


def configured(source: Path, options: dict[str, Any], before: Report | None = None) -> Config:
    """The configuration from the TOML file beside `source`, the run to be repeated and the options that were given."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "input_shape" in given:
        given["input_shape"] = dict(given["input_shape"])
    if given.get("validation", "file") != "file":
        try:
            given["validation"] = float(given["validation"])
        except ValueError:
            raise UsageError(f"--validation {given['validation']}: must be a share such as 0.1, or file") from None
    if before is not None:
        from onnxneutrino.replay import repeated

        return repeated(source, before, given)
    return load_config(source, given)


def command_line() -> str:
    """The command as it was given, to be pasted into a shell again."""
    program = Path(sys.argv[0]).name
    return shlex.join([*(["python", "-m", "onnxneutrino"] if program == "__main__.py" else [program]), *sys.argv[1:]])
