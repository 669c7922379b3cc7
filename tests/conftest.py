"""Shared by all tests: the import path, and where the real models and data lie, when they are there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the checkout on the path, where onnxneutrino/ lies without its passes.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(Path(__file__).parent))  # for slow_time.py and the modules that draw models
from hostile_runs import Runs  # noqa: E402

SHARED = ROOT.parent / "shared"
# As in a run: threads of the linear algebra libraries that wait for each other cost more than they save here.
threadpool_limits(limits=1, user_api="blas")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("real models and data (../shared) are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Runs of the command in processes of their own."""
    process = Runs()
    yield process
    process.close()
