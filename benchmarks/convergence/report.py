"""Print the tables of the convergence sweep as Markdown, and draw its curves.

    python benchmarks/convergence/report.py [--plot]

Level of a seed: the best held-out loss on that seed of the best baseline setting (plain Adam or Adagrad on
the table, at the learning rates with the lowest mean best loss). Steps: first evaluation at or below the
level, linearly interpolated. Ratio: steps over those of the fastest baseline setting on that seed,
whichever it is.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import BASELINES, SCHEDULES, SEEDS, Schedule, Setting, edges
from sweep import read

from kfac_onnx.demo.curves import Curve, draw_png

Runs = dict[tuple[Setting, int], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A setting that ran on every seed: one curve, steps to the level and ratio for each seed."""

    setting: Setting
    curves: tuple[Curve, ...]
    steps: tuple[float | None, ...]
    ratios: tuple[float | None, ...]

    @property
    def mean_best(self) -> float:
        """Mean over seeds of the best held-out loss."""
        return statistics.mean(curve.best for curve in self.curves)


@dataclass(frozen=True)
class Comparison:
    """All settings of one schedule against the best baseline; `rows` is sorted by mean best loss."""

    baseline: Setting
    levels: tuple[float, ...]
    fastest: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def tuned(self) -> dict[str, Row]:
        """Each preset's row with the lowest mean best loss."""
        found: dict[str, Row] = {}
        for row in self.rows:
            found.setdefault(row.setting.preset, row)
        return found


def compare(runs: Runs, schedule: Schedule) -> Comparison:
    """Return the comparison of one schedule, of all settings that ran on every seed."""
    found = {
        setting: tuple(_curve(runs[setting, seed]) for seed in SEEDS)
        for setting in {setting for setting, _ in runs if setting.schedule == schedule}
        if all((setting, seed) in runs for seed in SEEDS)
    }

    def mean_best(setting: Setting) -> float:
        return statistics.mean(curve.best for curve in found[setting])

    baselines = [setting for setting in found if setting.preset in BASELINES]
    baseline = min(baselines, key=mean_best)
    levels = tuple(curve.best for curve in found[baseline])
    fastest = tuple(
        min(step for setting in baselines if (step := found[setting][k].first_below(level)) is not None)
        for k, level in enumerate(levels)
    )
    rows: list[Row] = []
    for setting in sorted(found, key=mean_best):
        steps = tuple(curve.first_below(level) for curve, level in zip(found[setting], levels, strict=True))
        ratios = tuple(
            None if step is None else step / least for step, least in zip(steps, fastest, strict=True)
        )
        rows.append(Row(setting, found[setting], steps, ratios))
    return Comparison(baseline, levels, fastest, tuple(rows))


def _curve(run: dict[str, Any]) -> Curve:
    return Curve(tuple(run["at"]), tuple(run["losses"]))


def print_comparison(result: Comparison, swept: set[Setting]) -> None:
    """Print one schedule's table; each preset's tuned setting is bold."""
    print(f"Best baseline: {result.baseline}.")
    print(f"Level of each seed: {', '.join(f'{level:.4f}' for level in result.levels)}; ", end="")
    print(f"reached by the fastest baseline at step {', '.join(f'{step:.0f}' for step in result.fastest)}.\n")
    print("| preset | lr | rest lr | best loss ± sd | steps to level | ratio per seed | mean |")
    print("|---|---|---|---|---|---|---|")
    for row in result.rows:
        setting = row.setting
        name = f"**{setting.preset}**" if result.tuned[setting.preset] is row else setting.preset
        spread = statistics.stdev(curve.best for curve in row.curves)
        steps = ", ".join("-" if step is None else f"{step:.0f}" for step in row.steps)
        ratios = ", ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in row.ratios)
        reached = [ratio for ratio in row.ratios if ratio is not None]
        mean = f"{statistics.mean(reached):.3f}" if len(reached) == len(SEEDS) else f"{len(reached)} of 3"
        print(
            f"| {name} | {setting.lr:g} | {setting.rest_lr:g} | {row.mean_best:.4f} ± {spread:.4f} | "
            f"{steps} | {ratios} | {mean} |"
        )
    for preset, row in result.tuned.items():
        if names := edges(row.setting, swept):
            print(f"\nAt the edge of what was swept: {preset}, {' and '.join(names)}.")


def print_sweep(runs: Runs, schedule: Schedule) -> None:
    """Print the best loss of every setting on the first seed."""
    print("| preset | lr | best loss at rest lr |\n|---|---|---|")
    cells: dict[tuple[str, float], list[str]] = {}
    for (setting, seed), run in sorted(runs.items()):
        if setting.schedule == schedule and seed == SEEDS[0]:
            text = f"{setting.rest_lr:g}: {min(run['losses']):.4f}"
            cells.setdefault((setting.preset, setting.lr), []).append(text)
    for (preset, lr), texts in cells.items():
        print(f"| {preset} | {lr:g} | {', '.join(texts)} |")


def draw(result: Comparison, path: Path, schedule: Schedule) -> None:
    """Draw the mean over seeds of each preset's tuned setting."""
    means: list[tuple[str, Curve]] = []
    for preset in (*BASELINES, "half", "adagrad", "adaptive"):
        curves = result.tuned[preset].curves
        losses = zip(*(curve.losses for curve in curves), strict=True)
        means.append((preset, Curve(curves[0].steps, tuple(statistics.mean(values) for values in losses))))
    draw_png(means, path, title=f"{schedule} learning rate, mean of {len(SEEDS)} seeds")


def main() -> None:
    """Print everything, and draw the curves if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="draw constant.png and linear.png")
    options = parser.parse_args()
    runs = read()
    for schedule in SCHEDULES:
        result = compare(runs, schedule)
        print(f"\n## {schedule.capitalize()} learning rate\n")
        print_comparison(result, {setting for setting, _ in runs})
        print(f"\n### Everything that ran on seed {SEEDS[0]}, {schedule} learning rate\n")
        print_sweep(runs, schedule)
        if options.plot:
            draw(result, Path(__file__).with_name(f"{schedule}.png"), schedule)


if __name__ == "__main__":
    main()
