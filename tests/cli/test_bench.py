"""`kfac-onnx bench` as users call it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

SMALL = [
    "mf", "--vocab-sizes", "3e2", "--widths", "8", "--lookups", "32", "--steps", "3", "--threads", "1", "--arms", "half",
]  # fmt: skip


def test_a_run_is_written_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    assert main(["bench", *SMALL, "-o", str(folder)]) == 0
    assert "tables by" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "results.md", "step.png"} <= names
    data = json.loads((folder / "results.json").read_text())
    assert data["settings"]["vocab_sizes"] == [300]
    assert [item["arm"] for item in data["cases"][0]["timings"]] == ["plain-sgd", "half"]
    # No timed assertion: at this tolerance nothing can drift.
    again = ["bench", "--compare", str(folder / "results.json"), "--tolerance", "1e9"]
    assert main(again) == 0
    assert "all ratios are within" in capsys.readouterr().out
    for item in data["cases"][0]["timings"]:
        if item["arm"] == "half":
            item["ratio_sgd"] = 1e-12
    (folder / "results.json").write_text(json.dumps(data))
    assert main(["bench", "--compare", str(folder / "results.json"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["drifts"][0]["worse"] is True
    assert found["drifts"][0]["arm"] == "half"
    assert found["missing"] == []


def test_json_is_the_whole_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["version"] == 2
    assert data["machine"]["cores"]
    assert set(data["cases"][0]) == {
        "workload", "name", "vocab_size", "tables", "table_bytes", "timings", "memory", "roofline", "profiles",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mff"], "error: unknown workload 'mff'; did you mean 'mf'?"),
        (
            ["mf", "--vocab-sizes", "1e3,x"],
            "error: Invalid value for '--vocab-sizes': 'x' is not a whole number",
        ),
        (["mf", "--vocab-sizes", "0.3"], "'0.3' is not a whole number"),
        (["mf", "--vocab-sizes", "nan"], "'nan' is not a whole number"),
        (["mf", "--vocab-sizes", "0"], "error: a vocabulary must be between 1 and 1,000,000,000, not 0"),
        (["mf", "--arms", "halve"], "error: unknown arm 'halve'; did you mean 'half'?"),
        (["movielens"], "error: the workload movielens needs the ratings"),
        (["--compare", "none.json"], "error: 'none.json' is not a file of results"),
        (["--compare", "none.json", "--steps", "3"], "so --steps cannot be given with it"),
        (["mf", "--compare", "none.json"], "so no workload can be given with it"),
    ],
)
def test_faults_of_the_user(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err
