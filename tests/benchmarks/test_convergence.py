"""The convergence report: its arithmetic on made-up runs, and its claims on the committed ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[2] / "benchmarks" / "convergence"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """Import the scripts, which find each other by name in their folder."""
    import importlib

    names = ("grid", "sweep", "report", "partial_statistics")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


def made_up(scripts: dict[str, Any], losses: dict[tuple[str, float], tuple[float, ...]]) -> dict[Any, Any]:
    """Return runs on three seeds; the losses of seed k are those given plus k."""
    return {
        (scripts["grid"].Setting("constant", preset, lr, 0.003), seed): {
            "at": [50, 100, 150],
            "losses": [loss + seed for loss in values],
            "ms_per_step": 1.0,
        }
        for (preset, lr), values in losses.items()
        for seed in (0, 1, 2)
    }


def test_ratios_are_over_the_fastest_baseline(scripts: dict[str, Any]) -> None:
    runs = made_up(
        scripts,
        {
            ("plain-adam", 0.1): (5.0, 4.5, 4.0),  # the lowest: sets the level, 4.0, which it reaches at 150
            ("plain-adam", 0.2): (5.0, 4.0, 4.1),  # as low, at 100
            ("plain-adagrad", 0.1): (5.0, 4.6, 4.2),
            ("half", 0.1): (4.5, 3.5, 3.4),  # halfway between 50 and 100
            ("r1.7", 0.1): (6.0, 5.0, 4.5),
        },
    )
    result = scripts["report"].compare(runs, "constant")
    assert result.baseline.preset == "plain-adam"
    assert result.levels == (4.0, 5.0, 6.0)
    assert result.fastest == (100.0, 100.0, 100.0)
    half = result.tuned["half"]
    assert half.steps == pytest.approx((75.0, 75.0, 75.0), rel=1e-9)
    assert half.ratios == pytest.approx((0.75, 0.75, 0.75), rel=1e-9)
    assert result.tuned["r1.7"].ratios == (None, None, None)
    assert result.rows[0] is half


def test_a_setting_counts_only_with_all_seeds(scripts: dict[str, Any]) -> None:
    runs = made_up(scripts, {("plain-adam", 0.1): (5.0, 4.0, 4.0), ("half", 0.1): (4.0, 3.0, 3.0)})
    dropped = next(key for key in runs if key[0].preset == "half" and key[1] == 2)
    del runs[dropped]
    assert list(scripts["report"].compare(runs, "constant").tuned) == ["plain-adam"]


def test_edges_of_the_sweep_are_named(scripts: dict[str, Any]) -> None:
    setting, edges = scripts["grid"].Setting, scripts["grid"].edges
    swept = {setting("linear", "half", lr, rest) for lr in (0.1, 0.2, 0.3) for rest in (1.0, 2.0, 3.0)}
    assert edges(setting("linear", "half", 0.2, 2.0), swept) == []
    assert edges(setting("linear", "half", 0.1, 2.0), swept) == ["lr"]
    assert edges(setting("linear", "half", 0.3, 3.0), swept) == ["lr", "rest_lr"]


@pytest.mark.parametrize(("schedule", "bound"), [("constant", 0.85), ("linear", 0.92)])
def test_half_needs_fewer_steps_on_each_seed_of_the_committed_sweep(
    scripts: dict[str, Any], schedule: str, bound: float
) -> None:
    runs = scripts["sweep"].read()
    result = scripts["report"].compare(runs, schedule)
    ratios = result.tuned["half"].ratios
    assert None not in ratios
    assert max(ratios) <= bound
    swept = {setting for setting, _ in runs}
    for preset in ("plain-adam", "plain-adagrad", "half"):
        assert scripts["grid"].edges(result.tuned[preset].setting, swept) == []


def test_partial_statistics_cost_what_is_claimed(scripts: dict[str, Any]) -> None:
    """The defaults are the sweep's run to the last digit; a sample costs nothing, fewer steps little."""
    script = scripts["partial_statistics"]
    runs, swept = script.read(), scripts["sweep"].read()
    assert len(runs) == 27
    level = dict(zip((0, 1, 2), scripts["report"].compare(swept, "constant").levels, strict=True))
    for (rows, every, seed), run in runs.items():
        whole = swept[script.SETTING, seed]
        if (rows, every) == (None, 1):
            assert (run["at"], run["losses"]) == (whole["at"], whole["losses"])
        curve, other = (script.Curve(tuple(item["at"]), tuple(item["losses"])) for item in (run, whole))
        assert run["skipped"] == 0
        assert abs(curve.first_below(level[seed]) / other.first_below(level[seed]) - 1) <= 0.03
        assert curve.best - other.best <= (0.004 if every == 1 else 0.012)


def test_the_table_of_partial_statistics_is_the_committed_one(scripts: dict[str, Any]) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "\n".join(scripts["partial_statistics"].table()) in page
