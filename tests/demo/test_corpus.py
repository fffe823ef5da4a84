"""The shipped text: what it holds, how it is split, and that batches repeat."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from kfac_onnx.demo.corpus import CLASSES, CONTEXT, Corpus, load_corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_the_text_is_the_king_james_bible(corpus: Corpus) -> None:
    assert len(corpus.tokens) == 789_684
    assert len(corpus.words) == len(set(corpus.words)) == 12_762
    first = "in the beginning god created the heaven and the earth"
    assert " ".join(corpus.words[token] for token in corpus.tokens[:10]) == first
    last = "the grace of our lord jesus christ be with you all amen"
    assert " ".join(corpus.words[token] for token in corpus.tokens[-12:]) == last


def test_ids_are_ranks_by_frequency(corpus: Corpus) -> None:
    counts = np.bincount(corpus.tokens)
    assert corpus.words[:4] == ("the", "and", "of", "to")
    assert (np.diff(counts) <= 0).all()
    assert (counts == 1).sum() == 4_040


def test_every_tenth_block_of_100_verses_is_held_out(corpus: Corpus) -> None:
    assert len(corpus.train) == 708_819
    assert len(corpus.valid) == len(set(corpus.valid)) == 6_000
    assert not np.isin(corpus.valid, corpus.train).any()
    # Verses 900 to 999 are the first block held out: the positions between two trained stretches.
    gaps = corpus.train[:-1][np.diff(corpus.train) > 1]
    assert len(gaps) == 31
    everything = np.zeros(len(corpus.tokens), dtype=bool)
    everything[corpus.train] = True
    assert not everything[corpus.valid].any()


def test_an_example_is_four_words_and_the_next(corpus: Corpus) -> None:
    examples = corpus.examples(np.array([4, 9]))
    assert {name: array.dtype for name, array in examples.items()} == {"ids": np.int64, "labels": np.int64}
    words = [[corpus.words[token] for token in row] for row in examples["ids"]]
    assert words == [["in", "the", "beginning", "god"], ["the", "heaven", "and", "the"]]
    rank = {word: position for position, word in enumerate(corpus.words)}
    assert examples["labels"].tolist() == [rank["created"], rank["earth"]]


def test_rare_words_are_one_class(corpus: Corpus) -> None:
    rare = np.flatnonzero(corpus.tokens >= CLASSES - 1)[:50]
    assert (corpus.examples(rare[rare >= CONTEXT])["labels"] == CLASSES - 1).all()
    assert corpus.examples(corpus.train)["labels"].max() == CLASSES - 1


def test_a_seed_gives_the_same_batches_and_an_epoch_uses_each_position_once(corpus: Corpus) -> None:
    small = Corpus(corpus.words, corpus.tokens, corpus.train[:10], corpus.valid)

    def positions(seed: int, count: int) -> list[np.ndarray]:
        batches = small.batches(4, seed)
        return [next(batches)["ids"] for _ in range(count)]

    one, again, other = positions(0, 6), positions(0, 6), positions(1, 6)
    assert all((left == right).all() for left, right in zip(one, again, strict=True))
    assert any((left != right).any() for left, right in zip(one, other, strict=True))
    rows = {tuple(row) for batch in one[:2] for row in batch}
    assert len(rows) == 8
    assert (np.stack(one[2:4]) != np.stack(one[:2])).any()


def test_held_out_batches_cover_all_positions(corpus: Corpus) -> None:
    batches = corpus.held_out(size=2_500)
    assert [len(batch["labels"]) for batch in batches] == [2_500, 2_500, 1_000]
    assert [len(batch["labels"]) for batch in corpus.held_out(limit=700)] == [700]


def test_the_package_data_stays_small() -> None:
    data = resources.files("kfac_onnx.demo").joinpath("data")
    assert sum(len(entry.read_bytes()) for entry in data.iterdir()) < 1_500_000
