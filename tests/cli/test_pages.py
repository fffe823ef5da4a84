"""`--html` of inspect, diff and check, `--report` of train: where pages are written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

NPLM = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm.onnx"
SAYS = "wrote DIR/page.html, a page for any browser\n"


def toy_words(folder: Path) -> tuple[object, ...]:
    """Write data and weights for the model; return the words of `train` that name them."""
    random = np.random.default_rng(3)
    ids = random.integers(0, 100, (64, 4))
    np.savez(folder / "data.npz", ids=ids, labels=ids[:, 0])
    shapes = {"m.emb.weight": (100, 16), "m.fc.weight": (16, 64), "m.fc.bias": 16, "m.out.weight": (100, 16)}
    shapes["m.out.bias"] = 100
    weights = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(folder / "weights.npz", **weights)
    return (NPLM, "--parameters", folder / "weights.npz", "--data", folder / "data.npz", "--batch-size", 8)


@pytest.fixture
def transformed(run: Callable[..., Outcome], tmp_path: Path) -> Path:
    path = tmp_path / "nplm.kfac.onnx"
    assert run("transform", NPLM, "-o", path, "-q").code == 0
    return path


def test_each_verb_writes_its_page_beside_what_it_prints(
    run: Callable[..., Outcome], transformed: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for words in (
        ("inspect", transformed, "--provider", "cpu"),
        ("diff", NPLM, transformed),
        ("check", NPLM),
    ):
        plain = run(*words)
        outcome = run(*words, "--html", page)
        assert (outcome.code, outcome.out, outcome.err) == (plain.code, plain.out, plain.err + SAYS)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>")
        assert f"<h1>kfac-onnx {words[0]}</h1>" in text
        assert ('"placement":"CPU"' in text) == (words[0] == "inspect")


def test_a_page_never_replaces_an_input_nor_a_folder(
    run: Callable[..., Outcome], transformed: Path, tmp_path: Path
) -> None:
    before = transformed.read_bytes()
    for words in (("inspect", transformed), ("diff", NPLM, transformed), ("check", transformed)):
        outcome = run(*words, "--html", transformed)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "error: 'DIR/nplm.kfac.onnx' is the input and will not be overwritten\n  help: choose another name\n"
        )
        outcome = run(*words, "--html", tmp_path / "missing" / "page.html")
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "error: 'DIR/missing/page.html' cannot be written: its folder does not exist or is read-only\n"
        )
    assert transformed.read_bytes() == before


def test_a_run_writes_its_report_and_its_metrics(run: Callable[..., Outcome], tmp_path: Path) -> None:
    page, rows = tmp_path / "run.html", tmp_path / "rows.jsonl"
    words = (*toy_words(tmp_path), "--steps", 5, "--metrics", rows, "--report", page, "--no-shuffle")
    outcome = run("train", *words, "-q")
    assert (outcome.code, outcome.err) == (0, "")
    losses = [json.loads(line)["loss"] for line in rows.read_text().splitlines()]
    assert len(losses) == 5
    text = page.read_text(encoding="utf-8")
    assert f"<b>{losses[-1]:.4f}</b><span>last loss</span>" in text
    assert "kfac-onnx train, complete" in text
    for name in ("condition of the output factors", "insert-embedding-kfac", "batch-size", "numpy"):
        assert name in text


def test_a_stopped_run_is_reported_too(run: Callable[..., Outcome], tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    words = toy_words(tmp_path)
    weights = dict(np.load(tmp_path / "weights.npz"))
    weights["m.out.weight"][:] = 3e38  # finite, but no product with it is
    np.savez(tmp_path / "weights.npz", **weights)
    outcome = run("train", *words, "--skip-limit", 3, "--epochs", 9,
                  "--report", page, "-q")  # fmt: skip
    assert outcome.code == 1
    text = page.read_text(encoding="utf-8")
    assert "kfac-onnx train, stopped: the last 3 steps were all skipped" in text
    assert "<h2>Skipped steps</h2>" in text


def test_a_report_is_no_other_output(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run("train", *toy_words(tmp_path), "--metrics", tmp_path / "a", "--report", tmp_path / "a")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: 'DIR/a' is named for two outputs\n  help: give each its own name\n"
