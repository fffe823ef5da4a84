"""What a notebook shows: tables of reports, and the progress of `fit`, drawn by the real IPython."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kfac_onnx as kx
from kfac_onnx.runtime.notebook import NotebookBar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from kfac_onnx.runtime import TrainingSession

NPLM = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm.onnx"


def test_reports_and_sessions_are_tables_of_text(open_toy: Callable[..., TrainingSession]) -> None:
    report = kx.scan(NPLM)
    shown: list[Any] = [report, kx.inspect(kx.transform(NPLM)), open_toy()]
    pages = [item._repr_html_() for item in shown]
    assert "<td>m.emb.weight</td><td>100 x 16</td><td>float32</td>" in pages[0]
    assert "<td>m.emb.weight</td><td>100 x 16</td><td>float32</td>" in pages[1]
    assert "0 made, 0 skipped, 0 batches consumed" in pages[2]
    object.__setattr__(report, "loss", "<script>x</script>")
    assert "&lt;script&gt;x" in report._repr_html_()
    assert all("<script" not in page for page in [*pages, report._repr_html_()])


def test_the_bar_shows_the_step_and_the_curve() -> None:
    bar = NotebookBar(4)
    assert "polyline" not in bar.html()
    bar._display = type("Display", (), {"update": lambda *_: None})()
    bar._page = str
    for loss in (4.0, 3.0, 2.0):
        bar.update(loss, 8, None)
    bar.update(float("nan"), 16, 1.25)
    assert re.findall(r'points="([^"]*)"', bar.html()) == ["0.0,2.0 180.0,28.0 360.0,54.0"]
    assert '<progress value="4" max="4"' in bar.html()
    assert " 4 of 4 steps, loss nan, held out 1.2500, " in bar.html()


def test_a_long_curve_is_thinned() -> None:
    bar = NotebookBar(None)
    bar._display = type("Display", (), {"update": lambda *_: None})()
    bar._page = str
    for step in range(5000):
        bar.update(float(step), step, None)
    assert 100 < len(bar._losses) < 320
    assert bar._losses[-1] == pytest.approx(4999, abs=32)


def test_fit_draws_into_one_output_of_a_kernel(
    open_toy: Callable[..., TrainingSession], toy: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("IPython", reason="needs IPython: pip install -e '.[dev]'")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    class ZMQInteractiveShell(InteractiveShell):
        """The name by which a kernel's shell is known."""

    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = ZMQInteractiveShell.instance()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    try:
        with capture_output() as output:
            open_toy().fit(toy.batches(6), progress=True)
    finally:
        ZMQInteractiveShell.clear_instance()
    pages = [item.data["text/html"] for item in output.outputs]
    assert len(pages) >= 2
    assert " 6 of 6 steps, loss " in pages[-1]
    assert capsys.readouterr().err == ""
