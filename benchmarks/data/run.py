"""Memory of training on a table that is larger than it: matrix factorisation from Parquet.

    python benchmarks/data/run.py [--gigabytes 10] [--steps 2000] [--folder DIR]

Writes so many gigabytes of Parquet (users and items int64, labels float32, 12 further columns that nobody
reads; row groups of a million rows), trains on it with shuffling, and prints what was the largest resident
memory of the process that trains. The files are left in a folder that is named, and removed otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GRAPH = Path(__file__).parents[1] / "step_cost" / "mf_100000.onnx"
VOCABULARY, WIDTH, GROUP, BATCH = 100_000, 64, 1_000_000, 4096


def write(folder: Path, gigabytes: float) -> None:
    """Write files of eight row groups each, until they are so large."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    columns = {
        "users": rng.integers(0, VOCABULARY, GROUP),
        "items": rng.integers(0, VOCABULARY, GROUP),
        "ratings": rng.normal(size=GROUP).astype(np.float32),
    }
    columns |= {f"other_{index}": rng.normal(size=GROUP) for index in range(12)}
    table = pa.table(columns)  # the same in each row group: what is measured is memory
    number = 0
    while sum(path.stat().st_size for path in folder.glob("*.parquet")) < gigabytes * 1e9:
        with pq.ParquetWriter(folder / f"{number:05}.parquet", table.schema, compression="none") as writer:
            for _ in range(8):
                writer.write_table(table, row_group_size=GROUP)
        number += 1


def train(folder: Path, steps: int) -> None:
    """Train, and print what it took as JSON."""
    from kfac_onnx import TrainingSession, transform

    rng = np.random.default_rng(0)
    values = {
        name: 0.1 * rng.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
        for name in ("user.weight", "item.weight")
    }
    values["bias"] = np.zeros((), np.float32)
    with TrainingSession(transform(GRAPH, lr=1e-3), parameters=values, threads=1) as session:
        names = [item.name for item in session.batch_inputs]
        opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        columns = f"users={names[0]},items={names[1]},ratings={names[2]}"
        start = time.perf_counter()
        batches = session.batches(folder, BATCH, columns=columns, seed=0)
        found = time.perf_counter() - start
        result = session.fit(batches, steps=steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "rows": batches.examples,  # pyright: ignore[reportAttributeAccessIssue]  of files
        "opened_s": round(found, 2),
        "ms_per_step": round(1e3 * result.seconds / result.steps, 2),
        "before_mb": opened // 1000,
        "peak_mb": peak // 1000,
    }
    print(json.dumps(row))


def main() -> None:
    """Write, and train in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.folder, options.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        write(folder, options.gigabytes)
        words = ["--train", "--folder", str(folder), "--steps", str(options.steps)]
        subprocess.run([sys.executable, __file__, *words], check=True)  # noqa: S603  this very script


if __name__ == "__main__":
    main()
