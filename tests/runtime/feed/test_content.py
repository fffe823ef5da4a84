"""Data are recognised by what they hold: names, dtypes, shapes and entries, in files as in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.runtime.feed import content
from kfac_onnx.runtime.feed.content import content_of_arrays, content_of_files
from kfac_onnx.runtime.feed.data import Batches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Arrays = dict[str, np.ndarray]

ARRAYS = {
    "ids": np.arange(40).reshape(20, 2),
    "y": np.linspace(0, 1, 20, dtype=np.float32),
    "one": np.array(3),
}

CHANGES: dict[str, Callable[[Arrays], Arrays]] = {
    "an entry": lambda a: {**a, "ids": np.where(a["ids"] == 39, 0, a["ids"])},
    "by one percent": lambda a: {**a, "y": a["y"] * np.float32(1.01)},
    "the order": lambda a: {**a, "ids": a["ids"][::-1]},
    "a shape": lambda a: {**a, "ids": a["ids"].reshape(20, 2, 1)},
    "a dtype": lambda a: {**a, "ids": a["ids"].astype(np.int32)},
    "a name": lambda a: {"idx": a["ids"], "y": a["y"], "one": a["one"]},
    "what has no dimension": lambda a: {**a, "one": np.array(4)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(tmp_path: Path, name: str) -> None:
    changed = CHANGES[name](dict(ARRAYS))
    assert content_of_arrays(changed) != content_of_arrays(ARRAYS)
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez(tmp_path / "b.npz", **changed)
    assert content_of_files([tmp_path / "a.npz"]) != content_of_files([tmp_path / "b.npz"])


def test_the_same_is_the_same(tmp_path: Path) -> None:
    again = {name: ARRAYS[name].copy() for name in reversed(ARRAYS)}
    assert content_of_arrays(again) == content_of_arrays(ARRAYS) < 1 << 48
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez(tmp_path / "b.npz", **again)
    assert content_of_files([tmp_path / "a.npz"]) == content_of_files([tmp_path / "b.npz"])
    assert Batches(tmp_path / "a.npz", 4).content == Batches(ARRAYS, 4).content


def test_of_a_large_array_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "WHOLE", 64)
    for row in (0, 10, 19):  # every fifth, and the last
        changed = ARRAYS["ids"].copy()
        changed[row] += 1
        assert content_of_arrays({"ids": changed}) != content_of_arrays({"ids": ARRAYS["ids"]})
