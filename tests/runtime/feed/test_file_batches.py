from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.file_batches import FileBatches

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, count in enumerate((5, 3, 7, 2)):
        np.savez(tmp_path / f"{number}.npz", ids=np.arange(count), offsets=np.array([0, 1, number]))
    return tmp_path


def numbers(batches: Iterable[dict[str, np.ndarray]]) -> list[int]:
    return [int(batch["offsets"][-1]) for batch in batches]


def test_each_file_is_a_batch_as_it_is(folder: Path) -> None:
    batches = FileBatches(folder)
    assert len(batches) == 4
    assert [batch["ids"].size for batch in batches] == [5, 3, 7, 2]
    assert numbers(FileBatches(folder / "2.npz")) == [2]


def test_the_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    batches = FileBatches(folder, seed=3)
    run = numbers(batches.since(0, epochs=6))
    assert all(sorted(run[at : at + 4]) == [0, 1, 2, 3] for at in range(0, 24, 4))
    assert len({tuple(run[at : at + 4]) for at in range(0, 24, 4)}) > 1
    assert run == numbers(FileBatches(folder, seed=3).since(0, epochs=6))
    assert run[7:] == numbers(batches.since(7, epochs=6))  # a resumed run sees the rest
    assert run != numbers(FileBatches(folder, seed=4).since(0, epochs=6))
    assert numbers(itertools.islice(batches.since(0), 24)) == run


def test_no_files_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        FileBatches(tmp_path)
    assert str(caught.value) == f"the folder '{tmp_path}' holds no .npz file"
    with pytest.raises(UserError) as caught:
        FileBatches(tmp_path / "none.npz")
    assert str(caught.value) == f"there is no file '{tmp_path / 'none.npz'}'"
