"""Processor seconds of `transform` here and in another checkout, in turns; medians and their ratio.

python benchmarks/transform_time/compare.py CHECKOUT [--nodes 20000] [--models FILE...] [--rounds 3]

Each round starts one process per checkout. It transforms a small graph first (imports, the dialect's
functions), then the synthetic graph once and each model five times, of which the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPEATS = 5


def measured(nodes: int, models: list[str]) -> dict[str, float]:
    """Return the seconds of each graph, by its name."""
    from make import synthetic_graph

    from kfac_onnx import transform

    transform(synthetic_graph(100))
    found: dict[str, float] = {}
    if nodes:
        graph = synthetic_graph(nodes)
        start = time.process_time()
        transform(graph)
        found[f"{nodes:,} nodes"] = time.process_time() - start
    for model in models:
        times: list[float] = []
        for _ in range(REPEATS):
            start = time.process_time()
            transform(model)
            times.append(time.process_time() - start)
        found[Path(model).name] = statistics.median(times)
    return found


def main() -> None:
    """Print one row per graph: here, there, and how much of it that is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    if sys.argv[1:2] == ["--work"]:
        sys.stdout.write(json.dumps(measured(int(sys.argv[2]), sys.argv[3:])))
        return
    options = parser.parse_args()
    models = [str(Path(model).resolve()) for model in options.models]
    rows: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(options.rounds):
        for side, checkout in enumerate((ROOT, options.checkout.resolve())):
            done = subprocess.run(  # noqa: S603  this file, with the checkout that was named
                [sys.executable, __file__, "--work", str(options.nodes), *models],
                env={**os.environ, "PYTHONPATH": str(checkout)},
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for name, seconds in json.loads(done.stdout).items():
                rows.setdefault(name, ([], []))[side].append(seconds)
    print("| graph | here | there | ratio |\n|---|---|---|---|")
    for name, times in rows.items():
        here, there = (statistics.median(each) for each in times)
        print(f"| {name} | {here:.3g} | {there:.3g} | {here / there:.2f} |")


if __name__ == "__main__":
    main()
