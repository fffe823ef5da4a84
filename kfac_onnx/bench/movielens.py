"""MovieLens-100k, from a file of the user's: ratings, their split, and batches of them.

The data (Harper & Konstan 2015, The MovieLens Datasets) may not be redistributed and is no part of the
package: `u.data` of https://grouplens.org/datasets/movielens/100k/, or the wheel `recbole`'s `ml-100k.inter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Ratings", "read_ratings"]

_HELD_OUT: Final = 0.1
"""Share of the ratings that are held out, drawn once with a fixed seed."""


_PENALTY: Final = 0.05
"""Weight of the squares of what was looked up, in the loss of training."""


@dataclass(frozen=True)
class Ratings:
    """Ratings: `train` and `held_out` map users, items (int64[N]), ratings and penalty (float32[N]).

    The penalty on the looked-up rows is that of training; a held-out loss has none.
    """

    users: int
    items: int
    mean: float
    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    def batches(self, size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches of the training part without end, each epoch in a new order."""
        random = np.random.default_rng([seed, 1])
        count = len(self.train["ratings"])
        while True:
            order = random.permutation(count)
            for start in range(0, max(1, count - size + 1), size):
                chosen = order[start : start + size]
                yield {name: array[chosen] for name, array in self.train.items()}


def read_ratings(path: Path) -> Ratings:
    """Read tab-separated lines of user, item, rating, time; a heading line is skipped.

    Ratings are given less their mean over the training part, which the models need not learn then.

    Raises UserError when there is no such file, or it holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        fields = [line.split("\t") for line in lines[1 if lines and "user_id" in lines[0] else 0 :] if line]
        users, items = (np.array([int(row[column]) for row in fields], np.int64) for column in (0, 1))
        ratings = np.array([float(row[2]) for row in fields], np.float32)
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as e:
        raise UserError(
            f"'{path}' is not a file of ratings: {first_line(e)}",
            help="give u.data of MovieLens-100k, or ml-100k.inter: user, item, rating and time, with tabs",
        ) from e
    if len(ratings) < 10:
        raise UserError(f"'{path}' holds {len(ratings)} ratings, at least 10 are needed")
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(ratings))
    cut = max(1, int(_HELD_OUT * len(order)))
    mean = float(ratings[order[cut:]].mean())

    def part(chosen: np.ndarray, penalty: float) -> dict[str, np.ndarray]:
        return {
            "users": users[chosen].astype(np.int64),
            "items": items[chosen].astype(np.int64),
            "ratings": ratings[chosen] - np.float32(mean),
            "penalty": np.full(len(chosen), penalty, np.float32),
        }

    return Ratings(
        users=len(user_ids),
        items=len(item_ids),
        mean=mean,
        train=part(order[cut:], _PENALTY),
        held_out=part(order[:cut], 0.0),
    )
