"""A few kills at random moments; `python tests/trust/kill.py --kills 200` makes many."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trust_kill", Path(__file__).with_name("kill.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["trust_kill"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trust_kill"])
    return sys.modules["trust_kill"]


@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9")
def test_killed_runs_end_as_if_nobody_had_killed_them(kill: ModuleType) -> None:
    case = kill.Case("nplm", "torchjoint_in__nplm", ("--rest", "adam", *kill.SCHEDULE), 1, 1, 60, 6)
    found = kill.harness(3, seed=1, jobs=1, per_run=3, cases=(case,))[case]
    assert found.problems == []
    assert found.kills == 3


def test_differences_are_seen(kill: ModuleType, tmp_path: Path) -> None:
    """The comparison that the harness rests on finds a changed bit, a lost row and what was left."""
    case = kill.Case("nplm", "torchjoint_in__nplm", (), 1, 3, 3, 6)
    whole = kill.reference(case, tmp_path / "case")
    assert kill.differences(case, whole.place, whole.place) == []
    assert kill.check_folder(case, whole.place, 3) == []
    other = kill.reference(case, tmp_path / "again")
    assert kill.differences(case, other.place, whole.place) == []
    trained = other.place / "trained.onnx"
    trained.write_bytes(trained.read_bytes()[:-1] + b"\x00")
    rows = (other.place / "rows.jsonl").read_text().splitlines()
    (other.place / "rows.jsonl").write_text(
        "\n".join([*rows[:-1], rows[-1].replace('"loss": ', '"loss": 1')])
    )
    (other.place / "saved" / ".step-0000000003.ckpt.abcdefgh.tmp").mkdir()
    found = kill.differences(case, other.place, whole.place)
    assert len(found) == 3, found
    saved = kill.checkpoints(other.place)[-1]
    saved.write_bytes(saved.read_bytes()[:-1] + b"\x00")
    assert any("not whole" in problem for problem in kill.check_folder(case, other.place, 3))
    saved.unlink()
    assert any("newest" in problem for problem in kill.check_folder(case, other.place, 3))
