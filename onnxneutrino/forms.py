"""Which forms a layer can take, which method fits each, and what its chain looks like: the one table.

| form | chain |
|---|---|
| `svd`, `channel` | `kh×kw (I → r)`, `1×1 (r → O)` |
| `interpolative` | `kh×kw (I → r)`, `1×1 (r → O - r)` on these r channels, which are outputs themselves |
| `input` | `1×1 (I → r)`, `kh×kw (r → O)` |
| `spatial_hv` | `kh×1 (I → r)`, `1×kw (r → O)` |
| `spatial_vh` | `1×kw (I → r)`, `kh×1 (r → O)` |
| `tucker2` | `1×1 (I → r1)`, `kh×kw (r1 → r2)`, `1×1 (r2 → O)` |
| `cp` | `1×1 (I → r)`, depthwise `kh×1`, depthwise `1×kw`, `1×1 (r → O)` |

A 3-D kernel `kd×kh×kw` takes the forms that leave it whole: `svd`, `channel`, `interpolative`, `input` and `tucker2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from onnxneutrino.factor_channel import OutputProjection, OutputSpectrum
from onnxneutrino.factor_cp import Cp
from onnxneutrino.factor_fit import Decomposition, Problem
from onnxneutrino.factor_interpolative import Interpolative
from onnxneutrino.factor_shared import SharedFeatures
from onnxneutrino.factor_spatial import SharedFirst, channel_features
from onnxneutrino.factor_tucker import Tucker2
from onnxneutrino.factors import Factors, Moments, Stage
from onnxneutrino.plan import Array, Choice, Form

METHODS: Mapping[Form, Callable[[OutputSpectrum, SharedFeatures], Decomposition]] = MappingProxyType(
    {
        "svd": lambda spectrum, _: OutputProjection("svd", spectrum),
        "channel": lambda spectrum, _: OutputProjection("channel", spectrum),
        "interpolative": lambda spectrum, _: Interpolative(spectrum),
        "input": lambda spectrum, features: SharedFirst("input", spectrum.problem, features),
        "spatial_hv": lambda spectrum, _: SharedFirst("spatial_hv", spectrum.problem),
        "spatial_vh": lambda spectrum, _: SharedFirst("spatial_vh", spectrum.problem),
        "tucker2": lambda _, features: Tucker2(features),
        "cp": lambda _, features: Cp(features),
    }
)


def applicable(shape: tuple[int, ...]) -> tuple[Form, ...]:
    """Forms of a layer with a weight of `shape` `(O, I, *kernel)`."""
    kernel = shape[2:]
    if max(kernel) == 1:
        return ("svd", "interpolative")
    if len(kernel) > 2:
        return ("channel", "interpolative", "input", "tucker2")
    if min(kernel) == 1:
        return ("channel", "interpolative", "input", "tucker2", "cp")
    return ("channel", "interpolative", "input", "spatial_hv", "spatial_vh", "tucker2", "cp")


def decompose(
    form: Form, weight: Array, bias: Array, moments: Moments, weighting: Array | None = None
) -> Decomposition:
    """Prepare one form of a layer; nothing is computed before ranks are asked for.

    Args:
        form: one of `applicable(weight.shape)`.
        weight: `(O, I, *kernel)`.
        bias: `(O,)`.
        moments: of the layer's input patches.
        weighting: `G`, `(O, O)`; None for the identity.

    Raises:
        ValueError: a form this weight cannot take, or shapes that do not agree.
    """
    if form not in applicable(weight.shape):
        raise ValueError(f"{form}: not a form of a weight {weight.shape}")
    problem = Problem(weight, bias, moments, weighting)
    return METHODS[form](OutputSpectrum(problem), channel_features(problem))


def decompose_all(
    weight: Array, bias: Array, moments: Moments, weighting: Array | None = None
) -> dict[Form, Decomposition]:
    """Prepare all applicable forms of a layer; they share what they have in common."""
    problem = Problem(weight, bias, moments, weighting)
    spectrum, features = OutputSpectrum(problem), channel_features(problem)
    return {form: METHODS[form](spectrum, features) for form in applicable(weight.shape)}


def full_ranks(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks at which the chain equals a weight of `shape`: `Decomposition.limit`, without the moments."""
    outputs, inputs, *kernel = shape
    taps = math.prod(kernel)
    limits: dict[Form, tuple[int, ...]] = {
        "svd": (min(outputs, inputs * taps),),
        "channel": (min(outputs, inputs * taps),),
        "interpolative": (min(outputs, inputs * taps),),
        "input": (min(inputs, outputs * taps),),
        "tucker2": (min(inputs, outputs * taps), min(outputs, inputs * taps)),
        "cp": (inputs * taps,),
    }
    if form in limits:
        return limits[form]
    kh, kw = kernel if form == "spatial_hv" else reversed(kernel)
    return (min(inputs * kh, outputs * kw),)


def skeleton(form: Form, shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Stage, ...]:
    """The chain's stages with weights that have a shape and take no memory, for counting its cost.

    Args:
        form: which chain.
        shape: `(O, I, *kernel)` of the layer's weight.
        ranks: `(r,)`, or `(r1, r2)` for `tucker2`.
    """
    outputs, inputs, *kernel = shape
    rank, ones = ranks[0], [1] * len(kernel)
    if form in ("svd", "channel"):
        return _empty(rank, inputs, *kernel), _empty(outputs, rank, *ones)
    if form == "interpolative":
        return _empty(rank, inputs, *kernel), _empty(outputs - rank, rank, *ones)
    if form == "input":
        return _empty(rank, inputs, *ones), _empty(outputs, rank, *kernel)
    if form == "tucker2":
        core = _empty(ranks[1], rank, *kernel)
        return _empty(rank, inputs, *ones), core, _empty(outputs, ranks[1], *ones)
    kh, kw = kernel
    if form == "spatial_hv":
        return _empty(rank, inputs, kh, 1), _empty(outputs, rank, 1, kw)
    if form == "spatial_vh":
        return _empty(rank, inputs, 1, kw), _empty(outputs, rank, kh, 1)
    rows = (_empty(rank, 1, kh, 1, groups=rank),) if kh > 1 else ()
    columns = (_empty(rank, 1, 1, kw, groups=rank),) if kw > 1 else ()
    return _empty(rank, inputs, 1, 1), *rows, *columns, _empty(outputs, rank, 1, 1)


def filled(choice: Choice, weight: Array, bias: Array, fill: Callable[..., Array]) -> Factors:
    """A chain of a layer's shapes with made-up weights, for what its values do not matter to.

    Args:
        choice: form and ranks.
        weight: of the layer; its shape counts.
        bias: of the chain.
        fill: makes an array of the sizes it is called with.
    """
    direct = tuple(range(choice.ranks[0])) if choice.form == "interpolative" else ()
    bones = skeleton("channel" if direct else choice.form, weight.shape, choice.ranks)
    stages = tuple(Stage(fill(*stage.weight.shape), stage.groups) for stage in bones)
    return Factors(choice.form, choice.ranks, stages, bias, direct=direct)


def _empty(*shape: int, groups: int = 1) -> Stage:
    return Stage(np.broadcast_to(np.float32(0), shape), groups)
