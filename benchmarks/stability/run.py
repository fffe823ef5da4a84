"""Train each graph of this folder and write what the loss did, one line of JSON for each run.

    python benchmarks/stability/run.py [TASK...] [--arm NAME,OPTION=VALUE...] [--movielens DIR] [--write FILE]
    python benchmarks/stability/run.py --report benchmarks/stability/results.jsonl

Arms: `defaults` (`transform` with all defaults), or a preset of tables with options of `transform`,
`adaptive,lr=0.02,rest_lr=0.003`.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from data import TASKS, batches_of

import kfac_onnx as kx

GRAPHS = Path(__file__).parent / "graphs"


def start_of(task: str, seed: int) -> dict[str, Any]:
    """Return the parameters' first values: constants, or normal of the spread that the exporter gave them."""
    random = np.random.default_rng([seed, 3])
    starts = json.loads((GRAPHS / f"{task}.json").read_text())
    return {
        name: (mean + spread * random.normal(size=shape)).astype(np.float32)
        for name, (shape, mean, spread) in starts.items()
    }


def options_of(arm: str) -> dict[str, Any]:
    """Return the options of an arm."""
    if arm == "defaults":
        return {}
    preset, *rest = arm.split(",")
    options: dict[str, Any] = {"preset": preset}
    for item in rest:
        name, value = item.split("=")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
    return options


@functools.lru_cache(maxsize=1)
def model_of(task: str, arm: str) -> Any:
    """Return the transformed graph."""
    return kx.transform(GRAPHS / f"{task}.onnx", **options_of(arm))


def run(task: str, arm: str, seed: int, steps: int, movielens: Path | None) -> dict[str, Any]:
    """Train for some steps; return losses (each tenth as a mean), and the held-out loss at the end."""
    model = model_of(task, arm)
    batches, held_out = batches_of(task, seed, movielens)
    with kx.TrainingSession(model, parameters=start_of(task, seed), threads=1, seed=seed) as session:
        losses = [float(session.step(next(batches))["loss"]) for _ in range(steps)]
        end = float(session.evaluate(held_out))
        skipped = session.skipped
    return {
        "task": task, "arm": arm, "seed": seed, "steps": steps,
        "data": "movielens" if movielens is not None else "made up",
        "start": losses[0], "rise": max(losses) / losses[0], "held_out": end, "skipped": skipped,
        "curve": [round(float(np.mean(part)), 4) for part in np.array_split(losses, max(1, steps // 10))],
    }  # fmt: skip


def report(path: Path) -> None:
    """Print a table of the runs of a file: held-out loss at the end, and the largest rise of the loss."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        runs.setdefault((entry["task"], entry["arm"]), []).append(entry)
    print("| task | arm | seeds | held-out loss | largest loss / first |")
    print("|---|---|--:|--:|--:|")
    for task in TASKS:
        rows = [(arm, entries) for (own, arm), entries in runs.items() if own == task]
        for arm, entries in sorted(rows, key=lambda row: np.mean([entry["held_out"] for entry in row[1]])):
            ends = [entry["held_out"] for entry in entries]
            spread = f" ± {np.std(ends, ddof=1):.3f}" if len(ends) > 1 else ""
            rise = max(entry["rise"] for entry in entries)
            print(f"| {task} | {arm} | {len(ends)} | {np.mean(ends):.3f}{spread} | {rise:.2f} |")


def main() -> None:
    """Train what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=TASKS, metavar="TASK", help=f"{', '.join(TASKS)} (all)")
    parser.add_argument("--arm", action="append", metavar="NAME", help="may be given several times")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--movielens", type=Path, metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="FILE", help="append the lines to this file too")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the table of a file instead")
    options = parser.parse_args()
    if options.report is not None:
        report(options.report)
        return
    for task in options.tasks:
        for arm in options.arm or ["defaults"]:
            for seed in range(options.seeds):
                line = json.dumps(run(task, arm, seed, options.steps, options.movielens))
                print(line, flush=True)
                if options.write is not None:
                    with options.write.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
