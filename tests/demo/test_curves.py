"""When a curve reaches a level, and that curves can be drawn."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

import pytest

from kfac_onnx.demo.curves import Curve, check_plot, draw_png, draw_text
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

CURVE = Curve((50, 100, 150, 200), (5.0, 4.5, 4.6, 4.0))


@pytest.mark.parametrize(
    ("level", "step"),
    [
        (6.0, 50.0),  # at or below at the first evaluation: nothing before it to interpolate from
        (5.0, 50.0),
        (4.75, 75.0),
        (4.5, 100.0),
        (4.3, 175.0),  # between 4.6 at 150 and 4.0 at 200
        (4.0, 200.0),
        (3.9, None),
    ],
)
def test_first_step_at_a_level_is_interpolated(level: float, step: float | None) -> None:
    assert CURVE.first_below(level) == (None if step is None else pytest.approx(step, rel=1e-9))


def test_best_is_the_lowest_loss() -> None:
    assert Curve((1, 2, 3), (3.0, 1.0, 2.0)).best == 1.0


def test_the_drawing_fits_and_names_each_curve() -> None:
    drawing = draw_text([("Adam", CURVE), ("half", CURVE)], width=60, height=15)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawing).splitlines()
    assert len(plain) == 15
    assert {len(line) for line in plain} == {60}
    text = "\n".join(plain)
    assert "Adam" in text
    assert "half" in text
    assert "held-out loss" in text


def test_a_png_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    check_plot(path)
    draw_png([("Adam", CURVE), ("half", CURVE)], path, title="demo")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            check_plot(path)
        return str(caught.value)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert (
        message(tmp_path / "curves.pdf")
        == "the plot is a PNG, so its name must end in .png, not 'curves.pdf'"
    )
    absent = tmp_path / "absent"
    assert message(absent / "curves.png") == (
        f"the plot cannot be written to {absent / 'curves.png'}: {absent} is not a folder"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message(tmp_path / "curves.png") == (
        "drawing a PNG needs matplotlib\n  help: pip install 'kfac-onnx[plot]'"
    )
