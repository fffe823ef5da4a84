"""The demo's text as numbers: King James Bible, next word from the four before it.

A word's id is its rank by frequency, so the classes of the model are the 2,000 most frequent words and
one for all others. Every tenth block of 100 verses is held out; of those positions 6,000 are scored.
"""

from __future__ import annotations

import lzma
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["CLASSES", "CONTEXT", "Corpus", "load_corpus"]

CONTEXT = 4
"""Words that the model sees."""
CLASSES = 2_001
"""The 2,000 most frequent words, and one class for any other."""
_BLOCK = 100
"""Verses in a block; the last of every ten blocks is held out."""
_HELD_OUT = 6_000
"""Positions that an evaluation scores."""


@dataclass(frozen=True)
class Corpus:
    """Words as ids, and which positions are trained on and which are held out.

    `words` maps an id to its word; `tokens` is int64[T]; `train` and `valid` are positions in it, int64.
    """

    words: tuple[str, ...]
    tokens: NDArray[np.int64]
    train: NDArray[np.int64]
    valid: NDArray[np.int64]

    def examples(self, positions: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return the model's inputs for some positions: ids int64[N, 4] and labels int64[N]."""
        before = np.arange(-CONTEXT, 0)
        return {
            "ids": self.tokens[positions[:, None] + before],
            "labels": np.minimum(self.tokens[positions], CLASSES - 1),
        }

    def batches(self, size: int, seed: int) -> Iterator[dict[str, NDArray[np.int64]]]:
        """Yield batches without end, each epoch in a new order; one seed always gives the same ones."""
        random = np.random.default_rng([seed, 1])
        while True:
            order = random.permutation(self.train)
            for start in range(0, len(order) - size + 1, size):
                yield self.examples(order[start : start + size])

    def held_out(self, size: int = 2_000, limit: int | None = None) -> list[dict[str, NDArray[np.int64]]]:
        """Return the held-out positions (the first `limit` of them) as batches."""
        positions = self.valid[:limit]
        return [self.examples(positions[start : start + size]) for start in range(0, len(positions), size)]


def load_corpus() -> Corpus:
    """Return the text that ships with the package (about half a second)."""
    packed = resources.files("kfac_onnx.demo").joinpath("data/kjv.txt.xz").read_bytes()
    verses = [line.split() for line in lzma.decompress(packed).decode().splitlines()]
    frequency = Counter(word for verse in verses for word in verse)
    words = tuple(word for word, _ in frequency.most_common())
    rank = {word: position for position, word in enumerate(words)}
    tokens = np.array([rank[word] for verse in verses for word in verse], dtype=np.int64)
    verse_of = np.repeat(np.arange(len(verses)), [len(verse) for verse in verses])
    positions = np.arange(CONTEXT, len(tokens), dtype=np.int64)
    held_out = verse_of[positions] // _BLOCK % 10 == 9
    chosen = np.random.RandomState(0).choice(positions[held_out], _HELD_OUT, replace=False)
    return Corpus(words, tokens, positions[~held_out], chosen)
