"""The commands `zoo list`, `zoo fetch` and `zoo train`: parse, call, print; no logic."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import click

from onnxneutrino.cli_options import SEED, THREADS, Duration, result_options
from onnxneutrino.cli_output import as_json, emit, messages, run, show

FOLDER = click.Path(path_type=Path)
TIME_LIMIT = 1800.0


@click.group()
def zoo() -> None:
    """Networks to begin with: list recipes, fetch network and data, train the network."""


@zoo.command("list")
@result_options
def list_recipes(json_file: str | None, debug: bool) -> None:
    """List the recipes, each a family of networks and a data set, with what the network costs."""

    def work() -> None:
        from onnxneutrino.zoo.recipes import RECIPES, listed, recipe_table

        found = [listed(recipe) for recipe in RECIPES]
        show(recipe_table(found), json_file)
        emit(json_file, as_json([dataclasses.asdict(own) for own in found]))

    run(work, json_file, debug)


@zoo.command()
@click.argument("recipe", help="Its name, such as vgglight-cifar10; `zoo list` shows all.")
@click.argument("folder", type=FOLDER, help="Where to write model.onnx, model.toml and the data.")
@click.option("--data", type=FOLDER, metavar="PATH", help="Your own .npz or image folder; nothing is downloaded.")
@click.option("--url", metavar="URL", help="A mirror: the folder with the official files, under their names.")
@click.option("--size", type=click.IntRange(min=1), help="Pixels that own images are brought to; default the first's.")
@SEED
@result_options
def fetch(
    recipe: str,
    folder: Path,
    data: Path | None,
    url: str | None,
    size: int | None,
    seed: int | None,
    json_file: str | None,
    debug: bool,
) -> None:
    """Write a network with its first weights, its data and their description; what is there already stays."""

    def work() -> None:
        from onnxneutrino.events import Event
        from onnxneutrino.progress import Progress
        from onnxneutrino.zoo import fetch as fetching
        from onnxneutrino.zoo.recipes import find

        start = time.perf_counter()
        with Progress(quiet=False, terminal=sys.stderr.isatty()) as progress, messages():

            def tell(detail: str) -> None:
                progress(Event("fetch", detail, time.perf_counter() - start))

            found = fetching.fetch(find(recipe), folder, data=data, url=url, size=size, seed=seed or 0, tell=tell)
        if json_file != "-":
            for name in (fetching.MODEL, fetching.DESCRIPTION):
                kept = name in found.kept
                click.echo(f"{folder / name}: {'was there already and stays' if kept else 'written'}")
            click.echo(f"Next: onnxneutrino zoo train {folder}")
        emit(json_file, as_json(dataclasses.asdict(found)))

    run(work, json_file, debug)


@zoo.command()
@click.argument("folder", type=FOLDER, help="As `zoo fetch` left it.")
@click.option("--time-limit", type=Duration(), default=TIME_LIMIT, help="For everything, such as 15m; default 30m.")
@click.option("--epochs", type=click.IntRange(min=1), help="Times every image is seen, in place of a time limit.")
@THREADS
@SEED
@result_options
def train(
    folder: Path,
    time_limit: float,
    epochs: int | None,
    threads: int | None,
    seed: int | None,
    json_file: str | None,
    debug: bool,
) -> None:
    """Train FOLDER/model.onnx from its weights with the labels; it stays as it was where the metric fell."""

    def work() -> None:
        from onnxneutrino.formats import format_metric, format_seconds
        from onnxneutrino.progress import Progress
        from onnxneutrino.zoo import fetch as fetching
        from onnxneutrino.zoo import train as training

        with Progress(quiet=False, terminal=sys.stderr.isatty()) as progress, messages():
            found = training.train(
                folder, seconds=time_limit, epochs=epochs, threads=threads or 0, seed=seed or 0, tell=progress
            )
        path = folder / fetching.MODEL
        if json_file != "-":
            before, after = format_metric(found.before), format_metric(found.after)
            click.echo(f"{path}: {found.metric} {before} before, {after} after, on {found.examples} test examples")
            click.echo(f"{found.steps} steps, {found.epochs:.1f} epochs, {format_seconds(found.seconds)}")
            if not found.written:
                click.echo(f"The metric fell: {path} stays as it was.")
        emit(json_file, as_json(dataclasses.asdict(found)))

    run(work, json_file, debug)
