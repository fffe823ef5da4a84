"""Print the tables of the convergence sweep as Markdown, and draw curves.png.

    python benchmarks/convergence/report.py [--plot]

Level of a seed: the best held-out loss on that seed of the best baseline setting (plain Adam or Adagrad on
the table, at the learning rates with the lowest mean best loss). Steps: first evaluation at or below the
level, linearly interpolated. Ratio: steps over those of the fastest baseline setting on that seed,
whichever it is.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from grid import BASELINES, SCHEDULES, SEEDS, Setting, inside
from sweep import read

from kfac_onnx.demo.curves import Curve, draw_png

Runs = dict[tuple[Setting, int], dict[str, Any]]


def curve(run: dict[str, Any]) -> Curve:
    """Return the held-out losses of a run."""
    return Curve(tuple(run["at"]), tuple(run["losses"]))


def complete(runs: Runs, schedule: str) -> dict[Setting, list[Curve]]:
    """Return the settings of a schedule that ran on every seed, with one curve per seed."""
    found: dict[Setting, list[Curve]] = {}
    for setting in sorted({setting for setting, _ in runs if setting.schedule == schedule}):
        if all((setting, seed) in runs for seed in SEEDS):
            found[setting] = [curve(runs[setting, seed]) for seed in SEEDS]
    return found


def mean_best(curves: list[Curve]) -> float:
    """Return the mean over seeds of the best loss."""
    return statistics.mean(one.best for one in curves)


def report(runs: Runs, schedule: str) -> dict[str, list[Curve]]:
    """Print the tables of one schedule; return the curves of each preset's tuned setting."""
    found = complete(runs, schedule)
    tuned: dict[str, Setting] = {}
    for setting, curves in found.items():
        if setting.preset not in tuned or mean_best(curves) < mean_best(found[tuned[setting.preset]]):
            tuned[setting.preset] = setting
    baselines = [setting for setting in found if setting.preset in BASELINES]
    baseline = min(baselines, key=lambda setting: mean_best(found[setting]))
    levels = [one.best for one in found[baseline]]
    fastest = [
        min(steps for setting in baselines if (steps := found[setting][seed].first_below(level)) is not None)
        for seed, level in enumerate(levels)
    ]
    print(f"\n### {schedule} learning rate\n")
    print(f"Best baseline: {baseline}. Level per seed: {', '.join(f'{level:.4f}' for level in levels)};")
    print(f"the fastest baseline reaches it at step {', '.join(f'{steps:.0f}' for steps in fastest)}.\n")
    print("| preset | lr | rest lr | best loss ± sd | steps to level | ratio per seed | mean | ms/step |")
    print("|---|---|---|---|---|---|---|---|")
    for setting, curves in sorted(found.items(), key=lambda item: mean_best(item[1])):
        steps = [one.first_below(level) for one, level in zip(curves, levels, strict=True)]
        ratios = [None if step is None else step / other for step, other in zip(steps, fastest, strict=True)]
        reached = [ratio for ratio in ratios if ratio is not None]
        mean = f"{statistics.mean(reached):.3f}" if len(reached) == len(SEEDS) else f"({len(reached)}/3)"
        times = statistics.median(runs[setting, seed]["ms_per_step"] for seed in SEEDS)
        name = f"**{setting.preset}**" if tuned[setting.preset] == setting else setting.preset
        spread = statistics.stdev(one.best for one in curves)
        shown = ", ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        print(
            f"| {name} | {setting.lr:g} | {setting.rest_lr:g} | {mean_best(curves):.4f} ± {spread:.4f} | "
            f"{', '.join('-' if step is None else f'{step:.0f}' for step in steps)} | "
            f"{shown} | {mean} | {times:.1f} |"
        )
    swept = {setting for setting, _ in runs}
    for preset, setting in tuned.items():
        if edges := inside(setting, swept):
            print(f"\nAt the edge of what was swept: {preset}, {' and '.join(edges)}.")
    return {preset: found[setting] for preset, setting in tuned.items()}


def sweep_table(runs: Runs, schedule: str) -> None:
    """Print the best loss of every setting on the first seed."""
    print(f"\n#### Seed {SEEDS[0]}, {schedule}: best held-out loss of every setting\n")
    print("| preset | " + "lr: rest lr = loss |\n|---|---|")
    for preset in sorted({setting.preset for setting, _ in runs}):
        cells: dict[float, list[str]] = {}
        for (setting, seed), run in sorted(runs.items()):
            if (setting.schedule, setting.preset, seed) == (schedule, preset, SEEDS[0]):
                cells.setdefault(setting.lr, []).append(f"{setting.rest_lr:g} = {min(run['losses']):.4f}")
        text = "; ".join(f"**{lr:g}**: {', '.join(row)}" for lr, row in cells.items())
        print(f"| {preset} | {text} |")


def main() -> None:
    """Print everything, and draw the curves if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="draw curves.png: mean over seeds, constant rate")
    options = parser.parse_args()
    runs = read()
    for schedule in SCHEDULES:
        tuned = report(runs, schedule)
        sweep_table(runs, schedule)
        if options.plot:
            means = []
            for preset in (*BASELINES, *sorted(set(tuned) - set(BASELINES) - {"r1.7"})):
                curves = tuned[preset]
                losses = tuple(
                    statistics.mean(values) for values in zip(*(one.losses for one in curves), strict=True)
                )
                means.append((preset, Curve(curves[0].steps, losses)))
            draw_png(
                means,
                Path(__file__).with_name(f"curves_{schedule}.png"),
                title=f"{schedule} learning rate, mean of {len(SEEDS)} seeds",
            )


if __name__ == "__main__":
    main()
