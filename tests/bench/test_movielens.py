"""Ratings are read, split and batched; training on them reaches what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kfac_onnx.bench import convergence
from kfac_onnx.bench.arms import ARMS
from kfac_onnx.bench.movielens import read_ratings
from kfac_onnx.bench.workloads import cases, write_parameters
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def test_both_forms_of_the_file_are_read(tmp_path: Path) -> None:
    rows = [f"{10 * k}\t{k % 4 + 7}\t{k % 5 + 1}\t88" for k in range(20)]
    (tmp_path / "u.data").write_text("\n".join(rows))
    heading = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "ml.inter").write_text("\n".join([heading, *rows]) + "\n")
    plain, headed = read_ratings(tmp_path / "u.data"), read_ratings(tmp_path / "ml.inter")
    assert (plain.users, plain.items) == (headed.users, headed.items) == (20, 4)
    assert len(plain.held_out["ratings"]) == 2
    both = np.concatenate([plain.train["ratings"], plain.held_out["ratings"]]) + plain.mean
    np.testing.assert_allclose(sorted(both), sorted(k % 5 + 1 for k in range(20)), atol=1e-6)
    assert plain.train["ratings"].mean() == pytest.approx(0, abs=1e-6)
    assert plain.held_out["penalty"].max() == 0 < plain.train["penalty"].min()
    for name, array in plain.train.items():
        np.testing.assert_array_equal(array, headed.train[name])


@pytest.mark.parametrize("text", ["", "1\t2\n", "a b c\n" * 20, "1\t2\t3\t4\n" * 3])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "u.data").write_text(text)
    with pytest.raises(UserError, match=r"ratings"):
        read_ratings(tmp_path / "u.data")


def test_an_epoch_is_every_rating_once(ratings_file: Path) -> None:
    data = read_ratings(ratings_file)
    batches = data.batches(100, 0)
    epoch = [next(batches) for _ in range(36)]
    pairs = np.concatenate([np.stack([b["users"], b["items"], b["ratings"]], 1) for b in epoch])
    whole = np.stack([data.train["users"], data.train["items"], data.train["ratings"]], 1)
    np.testing.assert_array_equal(pairs[np.lexsort(pairs.T)], whole[np.lexsort(whole.T)])


def test_arms_reach_the_level(ratings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_ratings(ratings_file)
    case = cases("movielens", vocab_sizes=(), data=data)[0]
    path = tmp_path / "start.safetensors"
    write_parameters(case, path)
    # The noise of the ratings and their rounding leave an RMSE of about 0.45; untrained it is about 1.
    monkeypatch.setattr(convergence, "LEVEL", 0.7)
    found = convergence.converge(case, [ARMS["half"]], data, path, threads=1, tell=lambda _: None, epochs=12)[
        0
    ]
    assert found.steps_to_level is not None
    assert found.best < 0.7
    assert 0 < (found.seconds_to_level or 0) <= found.seconds
    assert found.lr in ARMS["half"].rates
