"""What a reader gives: pieces of rows, each read on its own, so that a run can go on at any row.

A piece is what a format can reach without reading what lies before it: a row group of Parquet, a record batch
of Arrow, some megabytes of lines. How many rows each has is told when a source is opened.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from kfac_onnx.data.lists import Block

__all__ = ["Joined", "Reader", "Source", "Types", "content_of"]

Types = dict[str, "np.dtype[np.generic] | None"]
"""The dtype that each column is read as, where a format has none of its own; None for texts."""

SAMPLES: Final = 16
"""Pieces of a file that are hashed, at even distances, to tell it from another one."""
SAMPLE: Final = 1 << 16
"""Bytes of each."""


class Source(Protocol):
    """Rows in pieces."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        ...

    @property
    def rows(self) -> Sequence[int]:
        """How many rows each piece has."""
        ...

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a piece, in order, in blocks that fit into memory."""
        ...


@dataclass(frozen=True)
class Reader:
    """A format: how it is told, and how a file (or a folder that is one data set) is opened.

    Args:
        name: in words, such as `a Parquet file`.
        suffixes: of its files' names.
        beginning: the first bytes of each file, where the format has such.
        marker: for a folder that is one data set, the file that it is told by.
        open: opens a path as a source; `Types` are those of the inputs, by column.
        extra: the optional dependency that it needs.
        typed: whether its files have no types of their own, so that `Types` decide.

    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[[Path, Types], Source]
    beginning: bytes | None = None
    marker: str | None = None
    extra: str | None = None
    typed: bool = False


class Joined:
    """Several sources one after another, such as the files of a folder.

    Raises UserError where a file lacks a column that another one has.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = list(sources.values())
        first, *others = sources.items()
        for place, source in others:
            missing = sorted(set(first[1].names) ^ set(source.names))
            if missing:
                has, lacks = (first[0], place) if missing[0] in first[1].names else (place, first[0])
                raise UserError(f"column '{missing[0]}' is in '{has}' and not in '{lacks}'")
        self.names = first[1].names

    @cached_property
    def _rows(self) -> list[int]:
        return [rows for source in self._sources for rows in source.rows]

    @property
    def rows(self) -> list[int]:
        """How many rows each piece has."""
        return self._rows

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(source.rows) for source in self._sources))

    def read(self, piece: int, columns: Sequence[str]) -> Iterator[Block]:
        """Yield the rows of a piece."""
        index = bisect.bisect_right(self._ends, piece)
        before = self._ends[index - 1] if index else 0
        return self._sources[index].read(piece - before, columns)


def content_of(paths: Sequence[Path]) -> int:
    """Return a number of 48 bits that these files have in common with no others: of their sizes and samples.

    Raises UserError where a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
            digest.update(f"{size}\n".encode())
            with path.open("rb") as file:
                for place in np.linspace(0, max(0, size - SAMPLE), SAMPLES).astype(np.int64).tolist():
                    file.seek(place)
                    digest.update(file.read(SAMPLE))
                    if size <= SAMPLE:
                        break
        except OSError as e:
            raise UserError(f"'{path}' cannot be read: {first_line(e)}") from e
    return int.from_bytes(digest.digest()[:6], "big")
