"""A recipe is a family of networks and a data set: `resnet20-cifar10`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from onnxneutrino import cost
from onnxneutrino.errors import UsageError
from onnxneutrino.formats import format_count, format_shape
from onnxneutrino.graph import tensor_types
from onnxneutrino.zoo.builder import INPUT
from onnxneutrino.zoo.datasets import DATA_SOURCES, DataSource
from onnxneutrino.zoo.families import FAMILIES, Family


@dataclass(frozen=True)
class Recipe:
    """A network and what it is trained on."""

    family: Family
    data: DataSource

    @property
    def name(self) -> str:
        """As on the command line; the graph is called so, too."""
        return f"{self.family.name}-{self.data.name}"


@dataclass(frozen=True)
class Listed:
    """A recipe in a list: what its network costs at batch 1; None where the images decide."""

    name: str
    dataset: str
    params: int | None
    macs: int | None
    input: tuple[int, int, int] | None


RECIPES = tuple(Recipe(family, data) for data in DATA_SOURCES for family in FAMILIES)


def find(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UsageError: there is none.
    """
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise UsageError(f"recipe '{name}' is not known; `onnxneutrino zoo list` shows all, such as {RECIPES[0].name}")


def listed(recipe: Recipe) -> Listed:
    """What the list says of a recipe."""
    image, classes = recipe.data.image, recipe.data.classes
    if image is None or classes is None:
        return Listed(recipe.name, recipe.data.name, None, None, None)
    model = recipe.family.build(recipe.name, image, classes, seed=None)
    macs = cost.macs(model, tensor_types(model, {INPUT: (1, *image)}))
    return Listed(recipe.name, recipe.data.name, cost.params(model), macs, image)


def recipe_table(found: Sequence[Listed]) -> Table:
    """Show recipes with what their networks cost; `-` where the user's images decide."""
    table = Table(box=None, pad_edge=False)
    for title in ("Recipe", "Dataset"):
        table.add_column(title, no_wrap=True)
    for title in ("#Params", "MACs", "Input"):
        table.add_column(title, justify="right", no_wrap=True)
    for own in found:
        size = "-" if own.input is None else format_shape(own.input)
        table.add_row(own.name, own.dataset, format_count(own.params), format_count(own.macs), size)
    return table
