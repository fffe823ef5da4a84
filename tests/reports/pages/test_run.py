"""The report of a run: its numbers, and the page in a browser."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kfac_onnx.reports.pages.curves import Curve, chart, ticks
from kfac_onnx.reports.pages.page import write_page
from kfac_onnx.reports.pages.run import Point, RunRecord, run_page
from kfac_onnx.runtime.health import RootHealth

if TYPE_CHECKING:
    from pathlib import Path

    from browser import Browser

    from kfac_onnx.runtime.fitting import Row

EVIL = "</svg><script>window.hacked=1</script>"


class FakeSession:
    """A session whose factor's condition is its position."""

    learning_rates: dict[str, float] = {}  # noqa: RUF012  never changed
    committed = skipped = position = 0
    pipeline = "find-embeddings,dce"
    host_roots = 3

    def health(self) -> tuple[RootHealth, ...]:
        root = {
            "parameter": EVIL,
            "exponent": -0.5,
            "dim": 4,
            "finite": True,
            "smallest": 1.0,
            "largest": 2.0,
        }
        rest = {"damping": 0.1, "condition": float(self.position), "asymmetry": 0.0, "drift": 0.01}
        return (RootHealth(**root, **rest, refreshes=7, fallbacks=2),)  # pyright: ignore[reportArgumentType]


def row(position: int, loss: float | None, held_out: float | None = None, **more: Any) -> Row:
    return {
        "step": position, "position": position, "loss": loss, "skipped": False, "lr": 0.5 / position,
        "held_out": held_out, **more,
    }  # fmt: skip


def record_of(steps: int) -> RunRecord:
    session = FakeSession()
    record = RunRecord(session, EVIL, {"preset": "half", "data": EVIL})
    for position in range(1, steps + 1):
        session.position = position
        record(row(position, 8.0 / position, 1.5 if position % 10 == 0 else None))
    return record


def test_points_of_neighbouring_steps_are_put_together_as_means() -> None:
    one, two = Point(1, 2.0, 0.1, 3.0), Point(4, 5.0, 0.5, 7.0, steps=3)
    assert one.joined(two) == Point(4, pytest.approx(4.25), pytest.approx(0.4), pytest.approx(6.0), 4)
    assert one.joined(Point(2, None, 0.1, 3.0)).loss == 2.0
    assert Point(1, None, 0.1, 1.0).joined(Point(2, None, 0.1, 1.0)).loss is None


def test_a_long_run_stays_small_and_loses_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfac_onnx.reports.pages.run._MOST_POINTS", 16)
    record = record_of(1001)
    assert len(record.points) <= 17
    assert sum(point.steps for point in record.points) == record.steps == 1001
    assert record.points[-1].position == 1001
    total = sum(point.steps * point.loss for point in record.points if point.loss is not None)
    assert total == pytest.approx(sum(8.0 / n for n in range(1, 1002)), rel=1e-12)  # sums of float64


def test_looking_at_factors_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kfac_onnx.reports.pages.run.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    session = FakeSession()
    monkeypatch.setattr(session, "health", lambda: clock.__setitem__(0, clock[0] + 0.5) or ())
    looks = 0
    record = RunRecord(session, "run")
    for position in range(1, 1001):
        clock[0] += 0.1
        before = clock[0]
        record(row(position, 1.0))
        looks += clock[0] > before
    assert looks == 5  # at 0, 25, 50, 75, 100 s: each takes 0.5 s, which is 2 % of 25 s


def test_ticks_are_round() -> None:
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(4.33, 4.77, 5) == pytest.approx([4.4, 4.5, 4.6, 4.7])
    assert ticks(3.0, 3.0) == [3.0]


def test_a_curve_goes_through_its_points() -> None:
    text = chart("t", [Curve("c", [(0, 1.0), (10, 2.0), (20, None), (30, 1.5)])])
    (line,) = re.findall(r'points="([^"]*)"', text)
    assert line == "62,226.6 276,39.4"  # 720 wide, 62 and 16 beside; 5 % of the range above and below
    assert re.findall(r'<circle cx="([^"]*)" cy="([^"]*)"', text) == [("704.0", "133.0")]
    assert "(logarithmic)" not in text
    assert "t (logarithmic)" in chart("t", [Curve("c", [(0, 1.0), (1, 1000.0)])])
    assert chart("t", [Curve("c", [(1, None)])]) == '<p class="faint">t: nothing was measured</p>'


def test_the_page_of_a_run(browser: Browser, tmp_path: Path) -> None:
    record = record_of(40)
    record(row(41, None, skipped=True, skip=[f"the gradient of {EVIL}"]))
    write_page(tmp_path / "run.html", run_page(record))
    browser.open(tmp_path / "run.html")
    assert browser.text("h1") == EVIL
    tiles = browser.run("return [...document.querySelectorAll('.tile')].map(e => e.innerText.split('\\n'))")
    assert [tile[:2] for tile in tiles[:4]] == [
        ["41", "steps"], ["1", "skipped"], ["0.2000", "last loss"], ["1.5000", "best held-out loss"],
    ]  # fmt: skip
    assert tiles[6] == ["3", "roots by the host"]
    body = browser.text("body")
    assert all(
        word in body for word in ("onnxruntime", "find-embeddings,dce", "half", f"the gradient of {EVIL}")
    )
    assert browser.run("return document.querySelectorAll('svg polyline').length") >= 5
    assert browser.run("return [window.hacked ?? null, document.scripts.length]") == [None, 0]
    assert browser.colours(tmp_path / "run.png") > 50
    browser.require_quiet()
