"""Steps of `half` to the level of tuned Adam where G takes a sample of rows, and not in every step.

    python benchmarks/convergence/partial_statistics.py            resumes; 27 runs of 10 to 20 s of one core
    python benchmarks/convergence/partial_statistics.py --report   the table of the README

Everything else is the sweep's: task, levels, seeds, and the tuned setting of `half` at a constant rate.
A batch has 1,024 lookups. Every finished run is one line of partial_statistics.jsonl.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: one thread per run

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import sweep
from grid import SEEDS, Setting
from report import compare

from kfac_onnx.demo.curves import Curve

RESULTS = Path(__file__).with_suffix(".jsonl")
SETTING = Setting("constant", "half", 0.01, 0.003)
"""The tuned setting of `half` at a constant rate."""
ROWS = (None, 256, 64)
EVERY = (1, 4, 16)

Key = tuple[int | None, int, int]


def read() -> dict[Key, dict[str, Any]]:
    """Return the finished runs by g-rows, g-every and seed."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["g_rows"], run["g_every"], run["seed"]): run for run in runs}


def work() -> None:
    """Make the runs that are missing."""
    done = read()
    for seed, rows, every in product(SEEDS, ROWS, EVERY):
        if (rows, every, seed) in done:
            continue
        made = sweep.run(SETTING, seed, g_rows=rows, g_every=every)
        line = {"g_rows": rows, "g_every": every} | made
        with RESULTS.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"seed {seed}, g-rows {rows}, g-every {every}: best {min(made['losses']):.4f}", flush=True)


def table() -> list[str]:
    """Return the table of the README: one row per setting, steps and ratios by seed."""
    runs, whole = read(), compare(sweep.read(), "constant")
    lines = [
        "| G from | in steps | best loss ± sd | change | steps to level | of the best baseline's | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    means: dict[tuple[int | None, int], float] = {}
    for rows, every in product(ROWS, EVERY):
        curves = [Curve(tuple(run["at"]), tuple(run["losses"])) for run in _seeds(runs, rows, every)]
        best = [curve.best for curve in curves]
        means[rows, every] = statistics.mean(best)
        steps = [curve.first_below(level) for curve, level in zip(curves, whole.levels, strict=True)]
        ratios = [None if s is None else s / least for s, least in zip(steps, whole.fastest, strict=True)]
        reached = [ratio for ratio in ratios if ratio is not None]
        mean = f"{statistics.mean(reached):.3f}" if len(reached) == len(SEEDS) else f"{len(reached)} of 3"
        lines.append(
            f"| {'all rows' if rows is None else f'{rows} rows'} | "
            f"{'all' if every == 1 else f'1, 2, 4, 8, multiples of {every}'} | "
            f"{means[rows, every]:.4f} ± {statistics.stdev(best):.4f} | "
            f"{means[rows, every] - means[None, 1]:+.4f} | "
            f"{', '.join('-' if s is None else f'{s:.0f}' for s in steps)} | "
            f"{', '.join('-' if r is None else f'{r:.3f}' for r in ratios)} | {mean} |"
        )
    return lines


def _seeds(runs: dict[Key, dict[str, Any]], rows: int | None, every: int) -> list[dict[str, Any]]:
    return [runs[rows, every, seed] for seed in SEEDS]


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    if not parser.parse_args().report:
        work()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
