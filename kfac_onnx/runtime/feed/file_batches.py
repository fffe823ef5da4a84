"""One batch per file: for data whose arrays differ in length, such as bags of ids with their offsets."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.disk.npz import read_npz
from kfac_onnx.errors import UserError
from kfac_onnx.errors.arguments import LARGEST_SEED, whole_number
from kfac_onnx.runtime.feed.content import content_of_files
from kfac_onnx.runtime.feed.data import Batches, no_shards

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FileBatches"]


class FileBatches(Batches):
    """The `.npz` files of a folder (or one file), each a batch as it is; only one is in memory.

    With a seed the order of the files changes from epoch to epoch, by the seed and the epoch alone.

    Raises UserError when there is no such file, or no example in one of them.
    """

    def __init__(self, source: str | Path, *, seed: int | None = None) -> None:
        path = Path(source)
        self.files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        self.seed = None if seed is None else whole_number(seed, "the seed", least=0, most=LARGEST_SEED)
        if not self.files:
            raise no_shards(path)
        if not self.files[0].is_file():
            raise UserError(f"there is no file '{path}'")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.files)

    def describe(self) -> dict[str, int | bool | None]:
        """Return what decides which batch comes at which position of a run."""
        return {"batches": len(self), "seed": self.seed, "content": self.content}

    @cached_property
    def content(self) -> int:
        """A number that tells other examples apart."""
        return content_of_files(self.files)

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch, without its first `skip`."""
        order = np.arange(len(self.files))
        if self.seed is not None:
            np.random.default_rng([self.seed, number]).shuffle(order)
        for index in order[skip:]:
            path = self.files[int(index)]
            arrays = read_npz(path)
            if not any(array.size for array in arrays.values()):
                raise UserError(f"'{path}' holds no examples")
            yield arrays
