"""The committed graphs are read once in a process, and every caller gets a copy of what was read.

Reading is half of the time of `transform`. What is the same in every reading of a file (tests/trust/test_determinism.py,
in processes of their own) need not be read again for each preset.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kfac_onnx import readers
from kfac_onnx.readers import read_training_graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["read_once", "shared_readings"]

DATA = Path(__file__).parents[1] / "data"


@functools.lru_cache(maxsize=16)
def _reading(path: Path, keep_optimizer: bool) -> ir.Model:
    return read_training_graph(path, keep_optimizer=keep_optimizer)


def read_once(source: Any, *, keep_optimizer: bool = False, **others: Any) -> ir.Model:
    """Return what `read_training_graph` returns; only a committed file read in the default way is shared."""
    committed = isinstance(source, Path) and DATA in source.parents
    if not committed or any(value is not None for value in others.values()):
        return read_training_graph(source, keep_optimizer=keep_optimizer, **others)
    return _reading(source, keep_optimizer).clone(deep_copy=True)


@pytest.fixture
def shared_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `scan` and `transform` take the committed graphs from the readings that are shared."""
    monkeypatch.setattr(readers, "read_training_graph", read_once)
