"""`kfac-onnx scan FOLDER`: one row per graph, also of those that cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.cli import scan_folder as coverage

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

DATA = Path(__file__).parents[1] / "data" / "graphs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Graphs at two depths: one whole, one with refusals, one without gradients, one damaged."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, place in (
        ("torchjoint_in__siamese", "a.onnx"),
        ("torchjoint_initopt__identical_init", "deep/b.onnx"),
        ("fwd_dyncore__nplm", "deep/er/c.onnx"),
    ):
        shutil.copy(DATA / f"{name}.onnx", tmp_path / place)
    (tmp_path / "deep" / "broken.onnx").write_bytes(b"nothing")
    (tmp_path / "other.txt").write_text("not a model")
    return tmp_path


def test_every_graph_is_a_row(run: Callable[..., Outcome], folder: Path) -> None:
    outcome = run("scan", folder)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines() if line.strip()]
    assert lines[0] == "4 graphs, 3 read, 2 tables"
    assert lines[1] == "graph read as tables (V x D, lookups) refused loss trainable"
    assert lines[3] == "a.onnx torch-joint m.emb.weight 120 x 16, 2 — mean yes"
    assert lines[4].startswith("deep/b.onnx torch-joint")
    assert any(line.startswith("deep/broken.onnx — error: ") for line in lines)
    assert any(line == "deep/er/c.onnx forward emb.weight 100 x 16, 1 — — no" for line in lines)
    assert (
        "refused: m.emb_b.weight of deep/b.onnx: its gradient is computed, but the parameter is gone: "
        "the exporter folded it away" in lines
    )


def test_json_is_a_list_of_reports(run: Callable[..., Outcome], folder: Path) -> None:
    outcome = run("scan", folder, "--json")
    assert outcome.code == 0
    rows = {row["graph"]: row for row in outcome.data}
    assert list(rows) == ["a.onnx", "deep/b.onnx", "deep/broken.onnx", "deep/er/c.onnx"]
    assert set(rows["deep/broken.onnx"]) == {"graph", "error"}
    assert rows["deep/broken.onnx"]["error"]
    one = run("scan", folder / "a.onnx", "--json").data
    assert rows["a.onnx"] == {"graph": "a.onnx", "error": None, **one}


def test_a_folder_without_models_and_options_of_one_model(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = run("scan", tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "error: the folder 'DIR' has no model\n  help: models are files with the ending .onnx, at any depth\n"
    )
    outcome = run("scan", tmp_path, "--loss", "loss")
    assert outcome.code == 1
    assert outcome.err.startswith("error: --loss and --gradients are for one model, and this is a folder")


def test_a_bug_in_one_graph_is_a_row_and_exits_3(
    run: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = coverage.scan

    def scan(path: Path) -> coverage.Report:
        if path.name == "a.onnx":
            raise KeyError("of ours")
        return right(path)

    monkeypatch.setattr(coverage, "scan", scan)
    outcome = run("scan", folder, "--json")
    assert outcome.code == 3
    assert [row["error"] for row in outcome.data if row["graph"] == "a.onnx"] == ["KeyError: 'of ours'"]
    assert len(outcome.data) == 4


def test_a_slow_scan_says_how_far_it_is(
    run: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "PATIENCE", -1.0)
    assert run("scan", folder, "--json").err.splitlines()[1] == "scanned 1 of 4 graphs"
