"""Milliseconds per step with batches made ahead or not: matrix factorisation from `.npz` files.

    OMP_NUM_THREADS=1 python benchmarks/prefetch/run.py [--rounds 15] [--steps 40]

Users and items are int32 in the files, so making a batch is shuffling, indexing and widening. In each round
every depth trains the same batches, one depth after the other in a rotating order; the ratios are medians of
a depth's time over depth 0's in the same round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy

import argparse
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from kfac_onnx import TrainingSession, transform
from kfac_onnx.runtime.feed.batches import as_inputs
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.file_batches import FileBatches
from kfac_onnx.runtime.feed.prefetch import prefetched

GRAPH = Path(__file__).parents[1] / "step_cost" / "mf_100000.onnx"
VOCABULARY, WIDTH, EXAMPLES = 100_000, 64, 1_000_000
DEPTHS = (0, 1, 2, 4)


def write_data(folder: Path, shards: int) -> Path:
    """Write the examples into so many files."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(shards):
        count = EXAMPLES // shards
        np.savez_compressed(
            folder / f"{shard:03}.npz",
            users=rng.integers(0, VOCABULARY, count, dtype=np.int32),
            items=rng.integers(0, VOCABULARY, count, dtype=np.int32),
            ratings=rng.standard_normal(count, dtype=np.float32),
        )
    return folder


def main() -> None:
    """Print one row per case: median ms per step at each depth, and the ratio to none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    values = {
        name: 0.1 * rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
        for name in ("user.weight", "item.weight")
    }
    values["bias"] = np.zeros((), np.float32)
    model = transform(GRAPH, lr=1e-3)
    names = " | ".join(f"depth {depth}" for depth in DEPTHS)
    ratios = " | ".join(f"{depth} / 0" for depth in DEPTHS[1:])
    print(f"| examples | files | threads | {names} | {ratios} |")
    print("|---" * (2 * len(DEPTHS) + 2) + "|")
    with tempfile.TemporaryDirectory() as place:
        for shards, size in ((1, 4096), (1, 16384), (20, 4096), (EXAMPLES // 4096, 4096)):
            folder = write_data(Path(place) / f"{shards} of {size}", shards)
            each = shards > EXAMPLES // 8192
            data = FileBatches(folder, seed=0) if each else Batches(folder, size, seed=0)
            for threads in (1, 2):
                with TrainingSession(model, parameters=values, threads=threads) as session:
                    times = measure(session, data, options.rounds, options.steps)
                cells = [f"{statistics.median(times[depth]):.2f}" for depth in DEPTHS]
                for depth in DEPTHS[1:]:
                    pairs = zip(times[depth], times[0], strict=True)
                    cells.append(f"{statistics.median(one / none for one, none in pairs):.2f}")
                print(f"| {size} | {shards} | {threads} | {' | '.join(cells)} |", flush=True)


def measure(session: TrainingSession, batches: Batches, rounds: int, steps: int) -> dict[int, list[float]]:
    """Return the milliseconds per step of each round, by depth; the first round warms up and is left out."""
    times: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for turn in range(rounds):
        for shift in range(len(DEPTHS)):
            depth = DEPTHS[(turn + shift) % len(DEPTHS)]
            supply = islice(batches.since(turn * steps), steps + 1)
            with prefetched(supply, depth, lambda batch: as_inputs(batch, session.batch_inputs)) as ready:
                session.step(next(ready))  # the first batch of a run shuffles an epoch
                start = time.perf_counter()
                for batch in ready:
                    session.step(batch)
                times[depth].append(1e3 * (time.perf_counter() - start) / steps)
    return {depth: found[1:] for depth, found in times.items()}


if __name__ == "__main__":
    main()
