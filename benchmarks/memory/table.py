"""Steps on a table in a file that is larger than the memory: `python table.py FOLDER [GB]`.

The file is sparse; its blocks are reserved and not written, so pages that no step has touched are read as
zeros without the disk. So the same batches are made three times: first, warm (their pages are cached), and
cold (their pages are on the disk, and the cache was dropped), without and with the next batch's rows hinted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

import kfac_onnx as kx
from kfac_onnx.bench.graphs import training_graph
from kfac_onnx.runtime import TrainingSession

WIDTH, LOOKUPS, BATCHES = 64, 4096, 20
GRAPH = """x = Gather(table, ids)
 wx = Mul(x, w)
 s = ReduceSum<keepdims=0>(wx, last)
 e = Sub(s, y)
 q = Mul(e, e)
 loss = ReduceMean<keepdims=0>(q)"""


def sparse_table(folder: Path, rows: int) -> Path:
    """Write a safetensors file of zeros that takes no room."""
    entry = {"dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [0, rows * WIDTH * 4]}
    path = folder / "table.safetensors"
    with path.open("wb") as file:
        file.write((4088).to_bytes(8, "little") + json.dumps({"table": entry}).encode().ljust(4088))
        file.truncate(4096 + rows * WIDTH * 4)
    return path


def drop(path: Path) -> None:
    """Have the file's pages written and forgotten."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    """Print a line per round: median and slowest step in milliseconds."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = int(float(sys.argv[2] if len(sys.argv) > 2 else 40) * 1e9) // (4 * WIDTH)
    path = sparse_table(folder, rows)
    graph = training_graph("int64[N] ids, float[N] y", {"table": (rows, WIDTH), "w": (WIDTH,)}, GRAPH)
    model = kx.transform(graph, preset="half", lr=0.01, rest="adam", rest_lr=1e-3)
    rng = np.random.default_rng(0)
    batches = [
        {"ids": rng.integers(0, rows, LOOKUPS), "y": np.ones(LOOKUPS, np.float32)} for _ in range(BATCHES)
    ]
    start = time.perf_counter()
    with TrainingSession(
        model, parameters={"w": np.ones(WIDTH, np.float32)}, threads=1, tables_in=folder
    ) as session:
        buffer = session._open.mapped.buffers["table"]  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
        print(f"opened in {time.perf_counter() - start:.2f} s, read advice random: {buffer.random}")
        for name in ("first", "warm", "cold", "cold, hinted 0.2 s ahead"):
            if name.startswith("cold"):
                buffer.give_back()
                drop(path)
            times: list[float] = []
            for batch in batches:
                if "hinted" in name:
                    session.prepared(batch)
                    time.sleep(0.2)
                start = time.perf_counter()
                session.step(batch)
                times.append((time.perf_counter() - start) * 1e3)
            print(f"| {name} | {np.median(times):.1f} | {max(times):.1f} |")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        start = time.perf_counter()
    print(f"peak resident {peak:.2f} GB, closed in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
