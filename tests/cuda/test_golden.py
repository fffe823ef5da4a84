"""The original's numbers, by the block's operators with the bodies for a device: within 1e-5, as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.fisher import session
from kfac_onnx.reports.golden import verify_golden

if TYPE_CHECKING:
    from conftest import Place

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_numbers(place: Place, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    if not place.is_gpu:
        monkeypatch.undo()
        monkeypatch.setattr(session, "on_cuda", lambda providers: True)
    rows = verify_golden([path], providers=place.providers)
    assert rows
    assert [row for row in rows if not row.ok] == []
