"""Batches for the graphs of `make.py`: MovieLens-100k where it is at hand, the demo's text, or made up.

MovieLens (https://grouplens.org/datasets/movielens/100k/) may not be passed on, so it is not in this folder;
`--movielens DIR` reads `ml-100k.inter` and `ml-100k.user` as recbole installs them
(`site-packages/recbole/dataset_example/ml-100k`). Without it sessions and clicks are made up: items are
popular by Zipf's law, half of the time one of the eight successors of an item follows it, and clicks are
drawn from hidden factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["TASKS", "batches_of"]

ITEMS, LENGTH, WORDS, FIELDS = 1683, 20, 2002, (944, 1683, 62, 3, 22)
MASK, UNTOLD = WORDS - 1, -100
BATCH = {"gru4rec": 64, "sasrec": 64, "narm": 64, "gpt2": 16, "bert": 16, "xdeepfm": 256}
TASKS = tuple(BATCH)
HELD_OUT = 8
"""Batches of an evaluation."""

Arrays = dict[str, Any]


def batches_of(task: str, seed: int, movielens: Path | None = None) -> tuple[Iterator[Arrays], list[Arrays]]:
    """Return training batches without end, and the held-out ones, which are the same for all seeds."""
    make = {"gpt2": _text, "bert": _masked, "xdeepfm": _clicks}.get(task, _sequences)
    train, held_out = make(movielens)
    size, fixed = BATCH[task], np.random.default_rng(99)

    def endless() -> Iterator[Arrays]:
        random = np.random.default_rng([seed, 7])
        while True:
            yield train(random, size)

    return endless(), [held_out(fixed, size) for _ in range(HELD_OUT)]


Draw = "Callable[[np.random.Generator, int], Arrays]"


def _split(arrays: Arrays) -> tuple[Any, Any]:
    """Return draws of the first nine tenths of some examples, and of the rest."""
    count = len(next(iter(arrays.values())))
    border = count * 9 // 10

    def part(low: int, high: int) -> Callable[[np.random.Generator, int], Arrays]:
        def draw(random: np.random.Generator, size: int) -> Arrays:
            chosen = random.integers(low, high, size)
            return {name: array[chosen] for name, array in arrays.items()}

        return draw

    return part(0, border), part(border, count)


def _sequences(movielens: Path | None) -> tuple[Any, Any]:
    """Items that one user met in order, padded by 0 behind, and the one that comes next."""
    sessions = _made_up_sessions() if movielens is None else _movielens_sessions(movielens)
    items, lengths, targets = [], [], []
    random = np.random.default_rng(5)
    for session in sessions:
        for end in range(1, len(session)):
            before = session[max(0, end - LENGTH) : end]
            items.append(np.pad(before, (0, LENGTH - len(before))))
            lengths.append(len(before))
            targets.append(session[end])
    order = random.permutation(len(items))
    arrays = {"items": np.array(items), "length": np.array(lengths), "target": np.array(targets)}
    return _split({name: array[order].astype(np.int64) for name, array in arrays.items()})


def _movielens(folder: Path) -> Any:
    return np.loadtxt(folder / "ml-100k.inter", delimiter="\t", skiprows=1)


def _movielens_sessions(folder: Path) -> list[Any]:
    rows = _movielens(folder)
    rows = rows[np.lexsort((rows[:, 3], rows[:, 0]))]
    return [rows[rows[:, 0] == user, 1].astype(np.int64) for user in np.unique(rows[:, 0])]


def _made_up_sessions(count: int = 940, length: int = 40) -> list[Any]:
    random = np.random.default_rng(11)
    share = 1.0 / np.arange(1, ITEMS)
    share /= share.sum()
    items = random.permutation(np.arange(1, ITEMS))
    successors = items[random.choice(ITEMS - 1, (ITEMS, 8), p=share)]
    sessions = np.empty((count, length), np.int64)
    sessions[:, 0] = items[random.choice(ITEMS - 1, count, p=share)]
    for place in range(1, length):
        anew = items[random.choice(ITEMS - 1, count, p=share)]
        follows = successors[sessions[:, place - 1], random.integers(0, 8, count)]
        sessions[:, place] = np.where(random.random(count) < 0.5, follows, anew)
    return list(sessions)


def _clicks(movielens: Path | None) -> tuple[Any, Any]:
    """Fields of a user and an item, and whether the rating was four stars or more."""
    random = np.random.default_rng(13)
    if movielens is None:
        fields = np.stack([np.minimum(random.zipf(1.2, 60_000), size) - 1 for size in FIELDS], axis=1)
        factors = [random.normal(size=(size, 4)) for size in FIELDS]
        rows = sum(factor[fields[:, field]] for field, factor in enumerate(factors))
        scores = (rows**2).sum(1) - np.median((rows**2).sum(1))
        clicked = random.random(len(fields)) < 1 / (1 + np.exp(-0.5 * scores))
    else:
        ratings = _movielens(movielens)
        users = np.loadtxt(movielens / "ml-100k.user", delimiter="\t", skiprows=1, dtype=str)
        codes = [np.unique(users[:, column], return_inverse=True)[1] for column in (1, 2, 3)]
        user = ratings[:, 0].astype(np.int64)
        place = np.argsort(users[:, 0].astype(np.int64))[user - 1]
        fields = np.stack([user, ratings[:, 1].astype(np.int64), *(code[place] for code in codes)], axis=1)
        clicked = ratings[:, 2] >= 4
    order = random.permutation(len(fields))
    return _split({"fields": fields[order].astype(np.int64), "clicked": clicked[order].astype(np.float32)})


def _windows(length: int = 32) -> tuple[Any, Any]:
    from kfac_onnx.demo.corpus import load_corpus

    tokens = np.minimum(load_corpus().tokens, WORDS - 2)
    border = len(tokens) * 9 // 10

    def part(low: int, high: int) -> Callable[[np.random.Generator, int], Any]:
        return lambda random, size: tokens[
            random.integers(low, high - length, size)[:, None] + np.arange(length)
        ]

    return part(0, border), part(border, len(tokens))


def _text(movielens: Path | None) -> tuple[Any, Any]:
    """Windows of the demo's text; the model shifts the labels itself."""

    def both(
        window: Callable[[np.random.Generator, int], Any],
    ) -> Callable[[np.random.Generator, int], Arrays]:
        def draw(random: np.random.Generator, size: int) -> Arrays:
            ids = window(random, size)
            return {"input_ids": ids, "labels": ids}

        return draw

    train, held_out = _windows()
    return both(train), both(held_out)


def _masked(movielens: Path | None) -> tuple[Any, Any]:
    """Windows of the demo's text with 15 % of the words masked, which are to be told."""

    def masked(
        window: Callable[[np.random.Generator, int], Any],
    ) -> Callable[[np.random.Generator, int], Arrays]:
        def draw(random: np.random.Generator, size: int) -> Arrays:
            ids = window(random, size)
            hidden = random.random(ids.shape) < 0.15
            return {"input_ids": np.where(hidden, MASK, ids), "labels": np.where(hidden, ids, UNTOLD)}

        return draw

    train, held_out = _windows()
    return masked(train), masked(held_out)
