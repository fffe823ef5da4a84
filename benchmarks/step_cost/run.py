"""Milliseconds per step of matrix factorisation, by vocabulary and optimizer, interleaved in one run.

python benchmarks/step_cost/run.py [--steps 200] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from kfac_onnx import TrainingSession, transform
from kfac_onnx.fisher.presets import PRESETS as REGISTRY

FOLDER = Path(__file__).parent
VOCABULARIES = (10_000, 100_000, 1_000_000)
PRESETS = ("plain-sgd", *(name for name, preset in REGISTRY.items() if not preset.per_example))
LOOKUPS, WIDTH = 4096, 64


def session(vocab_size: int, preset: str, threads: int) -> TrainingSession:
    """Return a session over the graph of this vocabulary: random tables, and a rate that cannot diverge."""
    rng = np.random.default_rng(0)
    tables = {
        name: 0.1 * rng.standard_normal((vocab_size, WIDTH), dtype=np.float32)
        for name in ("user.weight", "item.weight")
    }
    model = transform(FOLDER / f"mf_{vocab_size}.onnx", preset=preset, lr=1e-4)
    return TrainingSession(model, parameters=tables | {"bias": np.zeros((), np.float32)}, threads=threads)


def batch(rng: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    """Return a batch of uniformly drawn ids."""
    return {
        "users": rng.integers(0, vocab_size, LOOKUPS),
        "items": rng.integers(0, vocab_size, LOOKUPS),
        "ratings": rng.standard_normal(LOOKUPS).astype(np.float32),
    }


def main() -> None:
    """Print one row per vocabulary: medians, and their ratio to plain SGD on the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    print("| V | " + " | ".join(PRESETS) + " | half / plain-sgd |")
    print("|---" * (len(PRESETS) + 2) + "|")
    for vocab_size in VOCABULARIES:
        sessions = {preset: session(vocab_size, preset, options.threads) for preset in PRESETS}
        times: dict[str, list[float]] = {preset: [] for preset in PRESETS}
        for _ in range(options.steps):
            values = batch(rng, vocab_size)
            for preset, each in sessions.items():
                start = time.perf_counter()
                each.step(values)
                times[preset].append(1e3 * (time.perf_counter() - start))
        median = {preset: statistics.median(values[10:]) for preset, values in times.items()}
        cells = " | ".join(f"{median[preset]:.2f}" for preset in PRESETS)
        print(f"| {vocab_size:,} | {cells} | {median['half'] / median['plain-sgd']:.2f} |")
        for each in sessions.values():
            each.close()


if __name__ == "__main__":
    main()
