"""The errors a user can meet, one line each.

    NeutrinoError            exit code 1: refused or failed, nothing written
    ├── ModelError           the ONNX file: unreadable, invalid, unsupported, NaN, nothing to factorize
    ├── DataError            the data: missing, wrong shape or type, empty, NaN, labels out of range
    ├── MetricError          the metric cannot be computed
    ├── TrainingError        an operator that cannot be trained, a loss that is not finite
    ├── OutputError          the output cannot be written
    └── UsageError           exit code 2: the command line or the TOML file is wrong

A message names the file or the node, says what is wrong and what to do, in one line.
"""

from __future__ import annotations


class NeutrinoError(Exception):
    """Anything onnxneutrino refuses or fails at; `str(error)` is the one line for the user."""

    exit_code = 1


class ModelError(NeutrinoError):
    """The ONNX file cannot be used."""


class DataError(NeutrinoError):
    """The data cannot be used with this model."""


class MetricError(NeutrinoError):
    """The metric cannot be computed from these outputs and targets."""


class TrainingError(NeutrinoError):
    """The model cannot be fine-tuned."""


class OutputError(NeutrinoError):
    """The result cannot be written."""


class UsageError(NeutrinoError):
    """An option or a TOML key is wrong."""

    exit_code = 2
