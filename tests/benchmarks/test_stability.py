"""The defaults on six models, for a few steps: no loss rises. The long runs are in benchmarks/stability."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks" / "stability"
TASKS = sorted(path.stem for path in (FOLDER / "graphs").glob("*.onnx"))
STEPS = 15
RISE = 1.2
"""What the largest loss may be of the first."""


@pytest.fixture(scope="module")
def stability() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("run", "data"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("task", TASKS)
def test_no_loss_rises_with_all_defaults(stability: ModuleType, task: str) -> None:
    result = stability.run(task, "defaults", seed=0, steps=STEPS, movielens=None)
    assert result["rise"] <= RISE
    assert result["skipped"] == 0
    assert min(result["curve"]) < result["start"]


def test_a_rise_is_seen(stability: ModuleType) -> None:
    """The twin of the test above: a preset whose steps follow the gradient's size, on a tied table."""
    result = stability.run("bert", "half,lr=0.01,tied=lookup", seed=0, steps=STEPS, movielens=None)
    assert result["rise"] > 2 * RISE
