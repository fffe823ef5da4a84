"""Milliseconds per step of matrix factorisation with G from fewer rows and steps, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/step_cost/partial_statistics.py [--steps 160] [--threads 2]

Medians of the steps that update G and of those that do not, and the mean over all; `plain-sgd` for scale.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from run import FOLDER, LOOKUPS, WIDTH, batch

from kfac_onnx import TrainingSession, transform

VOCABULARY = 100_000
SETTINGS: dict[str, dict[str, int | None]] = {
    "all rows, all steps": {},
    "256 rows, all steps": {"g_rows": 256},
    "all rows, multiples of 16": {"g_every": 16},
    "256 rows, multiples of 16": {"g_rows": 256, "g_every": 16},
}


def session(preset: str, threads: int, **options: int | None) -> TrainingSession:
    """Return a session over the graph, with random tables."""
    rng = np.random.default_rng(0)
    tables = {
        name: 0.1 * rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
        for name in ("user.weight", "item.weight")
    }
    model = transform(FOLDER / f"mf_{VOCABULARY}.onnx", preset=preset, lr=1e-3, **options)
    return TrainingSession(model, parameters=tables | {"bias": np.zeros((), np.float32)}, threads=threads)


def main() -> None:
    """Print one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    sessions = {"plain-sgd": session("plain-sgd", options.threads)}
    sessions |= {name: session("half", options.threads, **given) for name, given in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.steps):
        values = batch(rng, VOCABULARY)
        for name, each in sessions.items():
            start = time.perf_counter()
            each.step(values)
            times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{LOOKUPS} lookups in each of two tables, D = {WIDTH}, {options.threads} threads\n")
    print("| G from | median ms | ms where G is updated | mean | median / all rows, all steps |")
    print("|---|---|---|---|---|")
    whole = statistics.median(times["all rows, all steps"][16:])
    for name, found in times.items():
        late = found[16:]
        due = [ms for t, ms in enumerate(found, 1) if t > 16 and (t % 16 == 0 or "all steps" in name)]
        shown = f"{statistics.median(due):.2f}" if "half" not in name and due and name != "plain-sgd" else "-"
        middle = statistics.median(late)
        print(f"| {name} | {middle:.2f} | {shown} | {statistics.mean(late):.2f} | {middle / whole:.2f} |")
    for each in sessions.values():
        each.close()


if __name__ == "__main__":
    main()
