"""Which rank holds which row: rank g mod P holds row g of a table, as its row g // P.

Ids of a batch are made distinct before they travel. By the remainder, since hot ids are often neighbours:
contiguous ranges would give them all to one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Routes", "merged", "places_among", "routes", "share_of"]


@dataclass(frozen=True)
class Routes:
    """The distinct ids of a rank's batch, by owner and then ascending.

    `asked[r]` are the owner's row numbers, int64, of those that rank r holds; `places` says for each array of
    ids where its ids stand among the distinct ones.
    """

    asked: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]
    keys: np.ndarray
    """What the distinct ids are sorted by."""

    @property
    def distinct(self) -> int:
        """How many distinct ids there are."""
        return sum(len(part) for part in self.asked)


def share_of(rows: int, rank: int, size: int) -> int:
    """Return how many of a table's rows a rank holds."""
    return len(range(rank, rows, size))


def routes(ids: list[np.ndarray], rows: int, size: int) -> Routes:
    """Return the routes of arrays of ids of a table; negative ids count from its end."""
    most = -(-rows // size)
    distinct, places = np.unique(_keys(ids, rows, size), return_inverse=True)
    bounds = np.searchsorted(distinct, np.arange(1, size) * most)
    asked = tuple(part % most for part in np.split(distinct, bounds))
    return Routes(asked, _like(ids, places), distinct)


def places_among(known: Routes, ids: list[np.ndarray], rows: int, size: int) -> tuple[np.ndarray, ...]:
    """Return where ids stand among the distinct ones of a batch that holds them all."""
    return _like(ids, np.searchsorted(known.keys, _keys(ids, rows, size)))


def _keys(ids: list[np.ndarray], rows: int, size: int) -> np.ndarray:
    """Return one number for owner and row of each id, so that they sort by owner first."""
    flat = np.concatenate([part.reshape(-1).astype(np.int64) for part in ids])
    flat = np.where(flat < 0, flat + rows, flat)
    return (flat % size) * -(-rows // size) + flat // size


def _like(ids: list[np.ndarray], places: np.ndarray) -> tuple[np.ndarray, ...]:
    ends = np.cumsum([part.size for part in ids])[:-1]
    parts = np.split(places.reshape(-1).astype(np.int64), ends)
    return tuple(part.reshape(array.shape) for part, array in zip(parts, ids, strict=True))


def merged(places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Return the sums of the values at each place below `size`, zeros where there is none."""
    result = np.zeros((size, *values.shape[1:]), values.dtype)
    if places.size:
        order = np.argsort(places, kind="stable")
        present, starts = np.unique(places[order], return_index=True)
        result[present] = np.add.reduceat(values[order], starts, axis=0)
    return result
