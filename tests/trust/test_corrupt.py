"""A few hundred damaged checkpoints; `python tests/trust/corrupt.py --cases 5000` makes thousands."""

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
def corrupt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trust_corrupt", Path(__file__).with_name("corrupt.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["trust_corrupt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trust_corrupt"])
    return sys.modules["trust_corrupt"]


def test_damaged_checkpoints_are_refused_or_passed_over(corrupt: ModuleType, tmp_path: Path) -> None:
    tally = corrupt.harness(170, seed=1, folder=tmp_path, resumed_every=85)
    assert tally.problems == []
    assert sum(verdicts["refused"] for verdicts in tally.verdicts.values()) > 150


@pytest.mark.skipif(os.name == "nt", reason="pipes, links and limits of another kind")
def test_other_things_in_the_place_of_a_checkpoint(corrupt: ModuleType, tmp_path: Path) -> None:
    tally = corrupt.places(tmp_path)
    assert tally.problems == []
    assert len(tally.verdicts) == 14


def test_wrong_numbers_would_be_seen(
    corrupt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that believes every checksum lets damage through, and the harness says so."""
    from kfac_onnx.runtime.saved import checkpoint

    real = checkpoint._checksum
    run = corrupt.prepared(tmp_path / "run")
    whole = corrupt.File.of(run.newest)
    first, _ = whole.regions["state/m.emb.weight"]
    run.newest.write_bytes(whole.data[:first] + bytes([whole.data[first] ^ 1]) + whole.data[first + 1 :])
    tally = corrupt.Tally()
    corrupt.judge(run, "bit", tally, "sound")
    assert tally.problems == []
    sums = {real(array) for array in checkpoint.read_checkpoint(run.older).states.values()}
    assert sums, "the reader has checksums"
    written = corrupt.json.loads(whole.data[8 : whole.regions["header"][1]])["__metadata__"]["kfac_onnx"]
    expected = corrupt.json.loads(written)["tensors"]["state/m.emb.weight"][2]
    wrong = real(
        corrupt.np.frombuffer(run.newest.read_bytes(), "u1")[slice(*whole.regions["state/m.emb.weight"])]
    )
    assert wrong != expected
    monkeypatch.setattr(
        checkpoint, "_checksum", lambda array: expected if real(array) == wrong else real(array)
    )
    corrupt.judge(run, "bit", tally, "blind")
    assert tally.problems[0] == "blind: read, with other contents"
