"""What the commands say of steps that are skipped and of inverse roots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kfac_onnx as kx

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = Path(__file__).parents[1] / "data" / "graphs" / "ortart_legcore__twotower"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a transformed model, its parameters, and data of which half the batches hold a NaN."""
    with np.load(f"{GRAPH}.npz") as data:
        arrays = {key[3:]: data[key] for key in data.files if key.startswith("in:")}
    kx.save(kx.transform(f"{GRAPH}.onnx"), tmp_path / "model.onnx")
    batch = {key: arrays.pop(key) for key in ("user", "item", "target")}
    np.savez(tmp_path / "parameters.npz", **arrays)
    good = {key: np.concatenate([array] * 8) for key, array in batch.items()}
    np.savez(tmp_path / "good.npz", **good)
    good["target"][24 + 3 :: 6] = np.nan
    np.savez(tmp_path / "bad.npz", **good)
    return tmp_path


@pytest.fixture
def train(work: Path, run: Callable[..., Any]) -> Callable[..., Any]:
    """Train on one of the folder's data files, six examples a batch, in their order."""

    def call(data: str, *options: object) -> Any:
        command = ("train", work / "model.onnx", "--parameters", work / "parameters.npz", "--no-shuffle")
        return run(*command, "--data", work / data, "--batch-size", 6, "--threads", 1, *options)

    return call


def test_too_many_skips_in_a_row_stop_the_run(
    work: Path, train: Callable[..., Any], run: Callable[..., Any]
) -> None:
    folder = work / "checkpoints"
    done = train("bad.npz", "--skip-limit", 3, "--checkpoint", folder, "-q")
    assert done.code == 1
    first, last = done.err.strip().splitlines()
    assert first.startswith(
        "error: the last 3 steps were all skipped, because something was not finite:"
        " batch input 'target': 1 of 6 entries is NaN, at [3]; loss is NaN; gradient of 'user_emb.weight': "
    )
    assert last == (
        "  help: clean the data: batch input 'target': 1 of 6 entries is NaN, at [3];"
        " the parameters before them are in 'DIR/checkpoints'"
    )
    saved = run("inspect", folder, "--json").data["checkpoint"]
    assert (saved["committed"], saved["skipped"], saved["position"]) == (4, 3, 7)


def test_skips_below_the_limit_are_reported(
    work: Path, train: Callable[..., Any], run: Callable[..., Any]
) -> None:
    done = train("bad.npz", "--metrics", work / "rows.jsonl")
    assert done.code == 0
    assert "8 steps (4 skipped: not finite), 48 examples, last loss nan\n" in done.out
    last = "not finite in the last skipped step: batch input 'target': 1 of 6 entries is NaN, at [3]; "
    assert last in done.out
    assert done.err.count("was skipped: batch input 'target'") == 4
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    assert [row.get("skip", [None])[0] for row in rows] == [None] * 4 + [
        "batch input 'target': 1 of 6 entries is NaN, at [3]"
    ] * 4


def test_json_says_what_was_skipped_and_how_the_roots_are(
    work: Path, train: Callable[..., Any], run: Callable[..., Any]
) -> None:
    done = train("bad.npz", "--json")
    report = done.data
    assert (done.code, report["skipped"], report["loss"]) == (0, 4, None)
    assert report["last_skip"][0]["text"] == "batch input 'target': 1 of 6 entries is NaN, at [3]"
    assert [root["parameter"] for root in report["roots"]] == ["user_emb.weight", "item_emb.weight"]
    assert all(root["condition"] > 1 and root["fallbacks"] == 0 for root in report["roots"])


def test_zero_means_no_limit(work: Path, train: Callable[..., Any], run: Callable[..., Any]) -> None:
    with np.load(work / "bad.npz") as data:
        arrays = {key: np.concatenate([data[key][24:]] * 4) for key in data.files}
    np.savez(work / "worse.npz", **arrays)
    assert train("worse.npz", "-q").code == 1  # ten by default
    done = train("worse.npz", "--skip-limit", 0, "-q")
    assert (done.code, "16 steps (16 skipped" in done.out) == (0, True)


def test_inspect_of_a_checkpoint_shows_the_factors(
    work: Path, train: Callable[..., Any], run: Callable[..., Any]
) -> None:
    folder = work / "checkpoints"
    assert train("good.npz", "--checkpoint", folder, "-q").code == 0
    done = run("inspect", folder)
    assert done.code == 0
    assert ": 8 steps, 0 skipped, 8 batches consumed, 0 roots computed on the host\n" in done.out
    assert "condition" in done.out
    report = run("inspect", folder, "--json").data
    roots = report["checkpoint"]["roots"]
    assert [root["parameter"] for root in roots] == ["user_emb.weight", "item_emb.weight"]
    # step 8 refreshed, so what is left is float32's rounding in a factor of condition 1e3
    assert all(root["finite"] and root["asymmetry"] == 0 and root["drift"] < 1e-3 for root in roots)
    assert [site["parameter"] for site in report["sites"]] == ["user_emb.weight", "item_emb.weight"]


def test_inspect_of_no_checkpoint(work: Path, train: Callable[..., Any], run: Callable[..., Any]) -> None:
    done = run("inspect", work / "none.ckpt")
    assert (done.code, done.err) == (1, "error: there is no checkpoint 'DIR/none.ckpt'\n")
