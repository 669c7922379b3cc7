"""What the commands have in common: types of options, the options of the data and those of every command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from onnxneutrino.config import AUGMENTATIONS, LAYOUTS, OPTIMIZERS, SCHEDULES
from onnxneutrino.config_checks import parse_duration
from onnxneutrino.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


class Duration(click.ParamType[float]):
    """`90s`, `15m`, `2h`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Shape(click.ParamType[Any]):
    """`NAME=1x3x640x640`."""

    name = "name=shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Input name and shape."""
        if isinstance(value, tuple):
            return value
        name, _, text = value.rpartition("=")
        sizes = text.lower().split("x")
        if not name or not all(size.isdigit() and int(size) > 0 for size in sizes):
            self.fail(f"'{value}' is not NAME=1x3x640x640", param, ctx)
        return name, tuple(int(size) for size in sizes)


class Numbers(click.ParamType[tuple[float, ...]]):
    """`0.49,0.48,0.45`."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """A tuple of floats."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of numbers such as 0.49,0.48,0.45", param, ctx)


THREADS = click.option("--threads", type=click.IntRange(min=1), help="Default: the cores there are.")
SEED = click.option("--seed", type=click.IntRange(min=0), help="Of every random draw; default 0.")


def data_options(command: Command) -> Command:
    """Options that override the TOML file's [data] and [metric]."""
    options = [
        click.option("--data", metavar="PATH", help=".npz, folder, file.py:function, or random."),
        click.option(
            "--metric", metavar="NAME", help="top1 top5 f1 miou map50 map psnr mse agreement, or file.py:function."
        ),
        click.option("--layout", type=click.Choice(LAYOUTS), help="Layout of the model's input; default NCHW."),
        click.option("--scale", type=float, help="Factor on the raw values; default 1."),
        click.option("--mean", type=Numbers(), help="Per channel, subtracted after scale."),
        click.option("--std", type=Numbers(), help="Per channel, divides after mean."),
        click.option("--augment", type=click.Choice(AUGMENTATIONS), multiple=True, help="Training only; repeatable."),
        click.option("--validation", metavar="SHARE", help="Share of training images for early stopping, or file."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def train_options(command: Command) -> Command:
    """Options that override the TOML file's [train]."""
    options = [
        click.option("--loss", metavar="FILE", help="Your loss: file.py:function (an onnxblock), or an .onnx graph."),
        click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="sgd needs --learning-rate."),
        click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate, after a warm-up."),
        click.option("--learning-rate", type=float, help="Its peak; without it found by a range test."),
        click.option("--weight-average", type=float, help="Decay of a moving average of the weights; 0 for none."),
        click.option("--before", metavar="FUNCTION", help="file.py:function, before a candidate is trained."),
        click.option("--after", metavar="FUNCTION", help="file.py:function, after it was measured; may refuse it."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def common_options(command: Command) -> Command:
    """Options of every command."""
    options = [
        click.option(
            "--input-shape", type=Shape(), multiple=True, help="Fix free dimensions: x=1x3x64x64; repeatable."
        ),
        THREADS,
        SEED,
    ]
    command = result_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def result_options(command: Command) -> Command:
    """Options that say where the result goes and how an error is shown."""
    options = [
        click.option(
            "--json", "json_file", metavar="FILE", help="Also write the result as JSON; - for standard output."
        ),
        click.option("--debug", is_flag=True, help="Show a traceback where something fails."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
