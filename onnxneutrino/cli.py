"""The command line: parse, call, print, exit code; no logic.

What takes long to import is imported inside the commands: `--help` answers at once, and an interrupt while
onnx and ONNX Runtime are being loaded ends as any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxneutrino import heap
from onnxneutrino.cli_options import Duration, common_options, data_options
from onnxneutrino.config import OBJECTIVES, Config, load_config
from onnxneutrino.errors import NeutrinoError, OutputError, UsageError

if TYPE_CHECKING:
    from onnxneutrino.report import Report

FILE = click.Path(path_type=Path)
PIPE_WIDTH = 240
ERROR_TEXT = 240
LONGEST_LINE = 2000
LIMIT_MISSED = 3  # exit code: a hard target could not be met within delta (the best model is written), or --max-drop


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="onnxneutrino")
def main() -> None:
    """Make an ONNX model smaller and faster, its metric at most delta worse."""
    heap.return_large_blocks()


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
    type=click.Choice(["ort", "reconstruct", "none"]),
    help="reconstruct: block by block, without labels. none: factors and refit, no fine-tuning.",
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
@data_options
@common_options
def compress(
    source: Path,
    target: Path,
    quiet: bool,
    verbose: bool,
    replay: Path | None,
    json_file: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Write a smaller OUT.ONNX, OUT.report.json and OUT.report.html. IN.toml beside IN.ONNX describes the data."""

    def work() -> None:
        from onnxneutrino import console, delivery
        from onnxneutrino.progress import Progress
        from onnxneutrino.replay import check_repeated

        before = None if replay is None else read_report(replay)
        config = configured(source, options, before)
        progress = Progress(quiet, sys.stderr.isatty(), verbose=verbose)
        with progress, messages():
            report = delivery.compress_file(source, target, config, progress, command_line())
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


def messages() -> contextlib.AbstractContextManager[Any]:
    """What a user's own loader or metric prints goes to standard error: standard output holds results."""
    return contextlib.redirect_stdout(sys.stderr)


def show(renderable: Any, json_file: str | None) -> None:
    """Print a table, unless standard output carries JSON; not on a terminal it is never cut or wrapped."""
    from rich.console import Console

    if json_file == "-":
        return
    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    console = Console(highlight=False, width=PIPE_WIDTH)
    with console.capture() as shown:
        console.print(renderable)
    click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))


def emit(json_file: str | None, text: str) -> None:
    """Write JSON where it was asked for."""
    if json_file == "-":
        click.echo(text, nl=False)
    elif json_file is not None:
        try:
            Path(json_file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{json_file}: cannot be written: {error.strerror or error}") from error


def as_json(value: Any) -> str:
    """JSON with a line feed at the end; NaN as null."""
    from onnxneutrino.json_values import plain

    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


def check_json(json_file: str | None) -> None:
    """Find out before the work whether the JSON file can be written; devices and pipes can."""
    from onnxneutrino.storage import check_writable

    if json_file not in (None, "-") and (not Path(json_file).exists() or Path(json_file).is_dir()):
        check_writable(Path(json_file))


def one_line(error: object) -> str:
    """What an error says, on one line: names out of a file may hold line feeds, escape sequences or a megabyte."""
    text = " ".join(str(error).split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]} ..."


def run(work: Callable[[], None], json_file: str | None, debug: bool) -> None:
    """Do the work; an error becomes one line and its exit code, a traceback only with --debug."""
    try:
        check_json(json_file)
        work()
    except BrokenPipeError:
        raise  # the reader of standard output has gone, such as `| head`: click ends quietly
    except NeutrinoError as error:
        if debug:
            raise
        click.echo(f"onnxneutrino: {one_line(error)}", err=True)
        sys.exit(error.exit_code)
    except MemoryError as error:
        if debug:
            raise
        what = "give a smaller --input-shape or smaller data, or use a machine with more"
        click.echo(f"onnxneutrino: not enough memory ({one_line(error) or 'no size is known'}); {what}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if debug:
            raise
        click.echo("onnxneutrino: interrupted; nothing was written", err=True)
        sys.exit(1)
    except OSError as error:  # of the system: a full disk under TMPDIR, a name that is too long, too many open files
        if debug:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"onnxneutrino: {one_line(where + (error.strerror or str(error)))}", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        line = one_line(error)[:ERROR_TEXT]
        click.echo(f"onnxneutrino: internal error, {type(error).__name__}: {line}; run again with --debug", err=True)
        sys.exit(1)
