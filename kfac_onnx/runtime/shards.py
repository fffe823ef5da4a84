"""Training data from files: one `.npz` of arrays by input name, or a folder of such shards.

All arrays of a shard have examples along their first axis; scalars (rank 0) go into every batch. Without a
batch size each shard is one batch as it is: for data whose arrays differ in length (bags with offsets).
Only one shard is in memory at a time.
"""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.weights import read_npz

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Shards"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shards:
    """Files of examples that have the same arrays. Make one with `Shards.open`.

    `rows` are the numbers of examples in each file, or None where its arrays differ in length.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    rows: tuple[int | None, ...]

    @classmethod
    def open(cls, path: str | Path) -> Shards:
        """Return the shards of a `.npz` file or a folder, after reading their headers only.

        Raises UserError when there are none, one is damaged, or they hold different arrays.
        """
        place = Path(path)
        files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
        if not files:
            raise UserError(f"there is no .npz file in the folder '{path}'")
        shapes = [_shapes(file) for file in files]
        names = tuple(shapes[0])
        for file, found in zip(files, shapes, strict=True):
            if set(found) != set(names):
                raise UserError(
                    f"'{file}' holds the arrays {_listed(found)} but '{files[0]}' holds {_listed(shapes[0])}",
                    help="all shards need the same arrays",
                )
        return cls(tuple(files), names, tuple(_rows(found) for found in shapes))

    @property
    def examples(self) -> int | None:
        """The number of examples in all shards, None where it cannot be told."""
        return None if any(rows is None for rows in self.rows) else sum(rows or 0 for rows in self.rows)

    def steps(self, size: int | None) -> int:
        """Return the number of full batches in one pass over the data.

        Raises UserError when the data cannot be cut into batches of this size.
        """
        if size is None:
            return len(self.files)
        if size < 1:
            raise UserError(f"the batch size must be at least 1, not {size}")
        if self.examples is None:
            file = next(file for file, rows in zip(self.files, self.rows, strict=True) if rows is None)
            raise UserError(
                f"the arrays of '{file}' differ in length, so they cannot be cut into batches",
                help="leave out the batch size and give one .npz file per batch, in a folder",
            )
        if self.examples < size:
            raise UserError(f"the data holds {self.examples} examples, fewer than the batch size {size}")
        return self.examples // size

    def in_order(self, size: int | None, *, partial: bool = True) -> Iterator[Arrays]:
        """Yield all batches in the order of the files; with `partial` also the smaller last one."""
        yield from self._cut(range(len(self.files)), size, None, partial=partial)

    def shuffled(self, size: int | None, *, seed: int, epochs: int | None = None) -> Iterator[Arrays]:
        """Yield full batches for `epochs` passes (None: without end), each pass in another order.

        Shards are shuffled, and examples within each shard. The order depends on the seed and the pass
        alone. Examples that fill no batch at the end of a pass are left out of it.
        """
        for epoch in range(epochs) if epochs is not None else itertools.count():
            rng = np.random.default_rng([seed, epoch])
            yield from self._cut(rng.permutation(len(self.files)), size, rng, partial=False)

    def _cut(
        self,
        order: range | np.ndarray,
        size: int | None,
        rng: np.random.Generator | None,
        *,
        partial: bool,
    ) -> Iterator[Arrays]:
        if size is not None:
            self.steps(min(size, 1) if partial else size)  # raises where the data cannot be cut so
        rest: Arrays = {}
        for index in order:
            arrays = read_npz(self.files[int(index)])
            if size is None:
                yield arrays
                continue
            count = self.rows[int(index)] or 0
            if rng is not None:
                chosen = rng.permutation(count)
                arrays = {name: array[chosen] if array.ndim else array for name, array in arrays.items()}
            if rest:
                arrays = {
                    name: np.concatenate([rest[name], array]) if array.ndim else array
                    for name, array in arrays.items()
                }
            count = _rows({name: array.shape for name, array in arrays.items()}) or 0
            start = 0
            for start in range(0, count - size + 1, size):
                yield _slice(arrays, start, start + size)
            done = start + size if count >= size else 0
            rest = _slice(arrays, done, count) if done < count else {}
        if rest and partial:
            yield rest


def _slice(arrays: Arrays, start: int, stop: int) -> Arrays:
    return {name: array[start:stop] if array.ndim else array for name, array in arrays.items()}


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the common length of all arrays that have one, None when they differ or none has one."""
    lengths = {shape[0] for shape in shapes.values() if shape}
    return lengths.pop() if len(lengths) == 1 else None


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a `.npz` file without reading them.

    Raises UserError when the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                name.removesuffix(".npy"): _header(archive, name)
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except FileNotFoundError as e:
        raise UserError(f"there is no file '{file}'") from e
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"'{file}' is not a readable .npz file: {first_line(e)}") from e


def _header(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(stream)[0]
