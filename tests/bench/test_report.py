"""Recorded results as tables, Markdown and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kfac_onnx.bench.pictures import draw
from kfac_onnx.bench.report import markdown, sheets

if TYPE_CHECKING:
    from pathlib import Path

    from kfac_onnx.bench import Results


def test_the_tables_of_a_run(recorded: Results) -> None:
    steps, floors, *profiles, convergence, aims = sheets(recorded)
    half = dict(zip(steps.columns, steps.rows[1], strict=True))
    assert half == {
        "workload": "mf D=64 N=4096",
        "V ": "10,000",
        "tables by": "half",
        "ms ": "1.8",
        "p10 – p90 ": "1.62 – 1.98",
        "/ SGD ": "1.8",
        "/ torch SGD ": "0.9",
        "/ FBGEMM ": "0.4",
        "state ": "40 MB",
        "peak memory ": "300 MB",
    }
    assert steps.rows[-1][4] == "needs about 36 GB, 20 GB are free"
    assert floors.rows[0][-3:] == ("0.6", "0.8", "75%")
    assert len(profiles) == 2
    assert profiles[0].rows[0][:4] == ("half", "gradients", "all", "0.9")
    assert convergence.rows[1][3] == "not reached"
    assert aims.columns[0] == "aim"


def test_markdown_names_machine_and_command(recorded: Results) -> None:
    text = markdown(recorded)
    assert "kfac-onnx bench mf --vocab-sizes 10000,1000000 --widths 64 --lookups 4096 --steps 60" in text
    assert "On: cpu a processor, cores 2." in text
    assert "| mf D=64 N=4096 | 10,000 | half | 1.8 |" in text


def test_pictures_are_drawn(recorded: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = draw(recorded, tmp_path)
    names = ["step.png", "memory.png", "roofline.png", "profile.png", "movielens.png"]
    assert [path.name for path in made] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
