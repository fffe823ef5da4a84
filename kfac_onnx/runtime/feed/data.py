"""Training data from `.npz` files: arrays by input name, in batches, shuffled by a seed.

A file holds one array per batch input; their first dimensions are the examples and must agree. Arrays without
dimensions go with every batch as they are. A folder holds such files as shards, which are loaded one at a
time; shuffling then permutes the shards and the rows inside each. The order of batches depends on the seed
and the epoch alone, so a run that is resumed at batch p sees what the uninterrupted run saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kfac_onnx.disk.conversions import refuse_other_format
from kfac_onnx.disk.npz import npz_headers, read_npz
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.errors.arguments import LARGEST_SEED, truth, whole_number
from kfac_onnx.errors.signatures import checked
from kfac_onnx.runtime.feed.content import content_of_arrays, content_of_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kfac_onnx.disk.npz import Header

    Arrays = Mapping[str, np.ndarray]

__all__ = ["Batches", "no_shards"]


def _lengths(arrays: Mapping[str, np.ndarray | Header], place: str) -> int:
    """Return the number of examples in a file's arrays, or in arrays whose headers are at hand."""
    shapes = {name: array.shape for name, array in arrays.items() if array.shape}
    sizes = {name: shape[0] for name, shape in shapes.items()}
    if not sizes:
        raise UserError(f"{place} holds no examples: no array has a dimension")
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if other != size:
            message = f"{place} holds {size} examples of '{first}' and {other} of '{name}'"
            raise UserError(message, help="the first dimension of every array is the example")
    if size and not any(math.prod(shape) for shape in shapes.values()):  # a few bytes may claim any number
        message = f"{place} holds {size} examples without an entry: '{first}' has shape {list(shapes[first])}"
        raise UserError(message)
    return size


def no_shards(folder: Path) -> UserError:
    """Return the error about a folder without data, which may hold some of another format."""
    try:
        refuse_other_format(folder, "training data")
    except UserError as e:
        return e
    return UserError(f"the folder '{folder}' holds no .npz file")


def _stored_length(path: Path) -> int:
    """Return the number of examples in an `.npz` file, from the arrays' headers alone."""
    return _lengths({header.name: header for header in npz_headers(path)}, f"'{path}'")


@dataclass(frozen=True)
class _Shard:
    """Where rows come from: a file, or arrays already in memory."""

    rows: int
    path: Path | None = None
    arrays: Arrays | None = None

    def load(self) -> Arrays:
        if self.arrays is not None:
            return self.arrays
        if self.path is None:
            raise AssertionError("a shard has arrays or a path")
        arrays = read_npz(self.path)
        _lengths(arrays, f"'{self.path}'")
        return arrays


class Batches:
    """An endless or counted supply of batches; iterating it once gives one epoch (epoch 0).

    Args:
        source: an `.npz` file, a folder of them, or arrays by input name.
        batch_size: examples in a batch; the last batch of an epoch may have fewer.
        seed: of the shuffling; None keeps the stored order.
        drop_last: leave out a last batch that is not full.

    Raises:
        UserError: no such data, arrays of different lengths, examples without an entry, or a wrong batch
            size, seed or drop_last; NumPy's numbers are taken.

    """

    @checked
    def __init__(
        self,
        source: str | Path | Arrays,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = whole_number(batch_size, "the batch size", least=1)
        self.seed = None if seed is None else whole_number(seed, "the seed", least=0, most=LARGEST_SEED)
        self.drop_last = truth(drop_last, "drop_last")
        if isinstance(source, (str, Path)):
            self._shards = self._find(Path(source))
        else:
            source = _arrays(source)
            self._shards = [_Shard(_lengths(source, "the data"), arrays=source)]
        self.examples = sum(shard.rows for shard in self._shards)
        if not len(self):
            message = f"the data holds {self.examples} examples, fewer than one batch of {batch_size}"
            raise UserError(message)

    @staticmethod
    def _find(path: Path) -> list[_Shard]:
        if path.is_dir():
            files = sorted(path.glob("*.npz"))
            if not files:
                raise no_shards(path)
            return [_Shard(_stored_length(file), file) for file in files]
        arrays = read_npz(path)
        return [_Shard(_lengths(arrays, f"'{path}'"), arrays=arrays)]

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(self.examples, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.epoch(0)

    def describe(self) -> dict[str, int | bool | None]:
        """Return what decides which batch comes at which position of a run."""
        return {
            "batches": len(self),
            "examples": self.examples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "content": self.content,
        }

    @cached_property
    def content(self) -> int:
        """A number that tells other examples of the same shapes apart."""
        files = [shard.path for shard in self._shards if shard.path is not None]
        arrays = self._shards[0].arrays
        return content_of_files(files) if arrays is None else content_of_arrays(arrays)

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches of one epoch, without its first `skip`."""
        number = whole_number(number, "the number of an epoch", least=0)
        skip = whole_number(skip, "skip", least=0)
        random = None if self.seed is None else np.random.default_rng([self.seed, number])
        order = np.arange(len(self._shards))
        if random is not None:
            random.shuffle(order)
        held: list[dict[str, np.ndarray]] = []
        count = 0
        passed = skip * self.batch_size
        for shard in (self._shards[index] for index in order):
            permutation = None if random is None else random.permutation(shard.rows)
            if passed >= shard.rows:
                passed -= shard.rows
                continue
            row, passed = passed, 0
            arrays = shard.load()
            while row < shard.rows:
                end = min(row + self.batch_size - count, shard.rows)
                take = np.arange(row, end) if permutation is None else permutation[row:end]
                held.append({name: a[take] if a.ndim else a for name, a in arrays.items()})
                count, row = count + end - row, end
                if count == self.batch_size:
                    yield _joined(held)
                    held, count = [], 0
        if count and not self.drop_last:
            yield _joined(held)

    def since(self, position: int, *, epochs: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches from batch `position` of the whole run on, to the end of `epochs`, or for ever."""
        position = whole_number(position, "the position", least=0)
        if epochs is not None:
            epochs = whole_number(epochs, "epochs", least=0)
        number, skip = divmod(position, len(self))
        while epochs is None or number < epochs:
            yield from self.epoch(number, skip=skip)
            number, skip = number + 1, 0


def _arrays(source: object) -> Arrays:
    """Return data in memory as arrays by name; raises UserError for anything else."""
    if not isinstance(source, Mapping):
        raise UserError(
            f"training data are a file, a folder or arrays by input name, not of type {type(source).__name__}"
        )
    arrays: dict[str, np.ndarray] = {}
    for name, values in cast("Mapping[object, Any]", source).items():
        try:
            array: np.ndarray = np.asarray(values)
        except ValueError as e:
            raise UserError(f"the data of '{name}' are no array: {first_line(e)}") from e
        if array.dtype.hasobject:
            raise UserError(f"the data of '{name}' are no numbers: their dtype is {array.dtype}")
        arrays[str(name)] = array
    return arrays


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    names = parts[0].keys()
    for part in parts[1:]:
        if part.keys() != names:
            missing = ", ".join(f"'{name}'" for name in sorted(names ^ part.keys()))
            raise UserError(f"the shards do not all hold the same arrays: {missing} is in some only")
    return {
        name: np.concatenate([part[name] for part in parts]) if parts[0][name].ndim else parts[0][name]
        for name in names
    }
