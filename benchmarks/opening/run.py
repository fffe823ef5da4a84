"""Time of importing the package and opening a session on a written model, beside another revision's.

Each run is a process of its own, so that nothing is loaded yet; revisions take turns, so that what else the
machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRAPH = ROOT / "tests" / "data" / "graphs" / "ortart_legcore__twotower.onnx"

WRITE = """
import sys
import numpy as np
import kfac_onnx as kx
graph, output = sys.argv[1:]
arrays = dict(np.load(graph.removesuffix(".onnx") + ".npz"))
names = {item.name for item in kx.scan(graph).parameters}
model = kx.transform(graph, parameters={name: arrays["in:" + name] for name in names})
kx.save(model, output)
"""
OPEN = """
import json, sys, time
start, before = time.perf_counter(), time.process_time()
import kfac_onnx as kx
kx.TrainingSession
imported = time.perf_counter()
session = kx.TrainingSession(sys.argv[1], threads=1)
opened = time.perf_counter()
used = time.process_time() - before
modules = sum(name.partition(".")[0] == "kfac_onnx" for name in sys.modules)
json.dump([imported - start, opened - imported, opened - start, used, modules], sys.stdout)
"""


def python(root: Path, program: str, *arguments: str) -> str:
    """Run a program with the package of a checkout; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(  # noqa: S603  our own programs
        command, env=environment, check=True, capture_output=True, text=True, cwd=root
    ).stdout


def main() -> None:
    """Print a table: one line per checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, metavar="FOLDER", help="a checkout of another revision")
    parser.add_argument("--runs", type=int, default=15, metavar="N", help="processes per checkout")
    options = parser.parse_args()
    roots = [root.resolve() for root in (options.old, ROOT) if root is not None]
    with tempfile.TemporaryDirectory() as folder:
        models = [str(Path(folder) / f"{index}.onnx") for index in range(len(roots))]
        for root, model in zip(roots, models, strict=True):
            python(root, WRITE, str(GRAPH), model)
        rows: list[list[list[float]]] = [[] for _ in roots]
        for run in range(options.runs + 1):  # the first, which fills the disk's cache, does not count
            for root, model, row in zip(roots, models, rows, strict=True):
                numbers = json.loads(python(root, OPEN, model))
                if run > 0:
                    row.append(numbers)
    print("| revision | import | open | together | processor | own modules |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, row in zip(["old", "this"][-len(rows) :], rows, strict=True):
        times = " | ".join(f"{1000 * statistics.median(run[index] for run in row):.0f}" for index in range(4))
        print(f"| {name} | {times} | {row[0][4]:.0f} |")


if __name__ == "__main__":
    main()
