"""A metric of the user's own, `file.py:function`: called as `function(outputs, targets)` over a whole split.

The outputs are a list of arrays, one for each output of the model; the targets one array, of objects where they differ
in shape, or None. It returns one finite number. More is better unless its attribute `higher_is_better` is False.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.data_checks import stacked
from onnxneutrino.data_function import UserFunction
from onnxneutrino.errors import MetricError


def higher_is_better(function: UserFunction) -> bool:
    """Whether more is better: the function's attribute of this name, True without it.

    Raises:
        MetricError: it is neither True nor False.
    """
    declared = getattr(function.function, "higher_is_better", True)
    if not isinstance(declared, bool):
        raise MetricError(
            f"{function.place}: {function.name}.higher_is_better is {declared!r:.40}; set it to True or False"
        )
    return declared


def packed(name: str, outputs: Sequence[NDArray[Any]], targets: NDArray[Any] | None) -> NDArray[Any]:
    """Rows `(n, 1)` of objects: outputs and target of an example."""
    lengths = {len(array) if array.ndim else 0 for array in outputs}
    if targets is not None:
        lengths.add(len(targets))
    if len(lengths) != 1:
        raise MetricError(f"{name}: outputs and targets have unequal numbers of examples, {sorted(lengths)}")
    rows = np.empty((lengths.pop(), 1), dtype=object)
    for index in range(len(rows)):
        own = None if targets is None else targets[index]
        rows[index, 0] = (tuple(array[index] for array in outputs), own)
    return rows


def value(function: UserFunction, rows: NDArray[Any]) -> float:
    """What the function returns for the examples of these rows.

    Raises:
        MetricError: it fails or returns no finite number.
    """
    examples = [row[0] for row in rows]
    outputs = [np.stack(arrays) for arrays in zip(*(example[0] for example in examples), strict=True)]
    targets = None if examples[0][1] is None else stacked([example[1] for example in examples])
    result = function(outputs, targets)
    try:
        number = float(result) if np.ndim(result) == 0 else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = f"{result!r:.40}" if np.ndim(result) == 0 else f"an array of shape {np.shape(result)}"
        raise function.returned(what, "return a finite number")
    return number
