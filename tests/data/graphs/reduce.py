"""Reduce a folder of exported graphs with sidecars to what the tests read: `reduce.py SOURCE TARGET NAME...`.

Kept: the graph as it was exported; of the sidecar everything but histograms, dumps of the interface and
names of scripts; of the arrays everything but the exporter's own state (accumulation buffers, reset flags),
compressed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

DROPPED = {"op_histogram", "graph_inputs", "graph_outputs", "scripts", "group", "file_bytes", "params_are"}


def reduce(source: Path, target: Path, name: str) -> None:
    shutil.copyfile(source / f"{name}.onnx", target / f"{name}.onnx")
    sidecar = json.loads((source / f"{name}.json").read_text())
    kept = {key: value for key, value in sidecar.items() if key not in DROPPED}
    (target / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    with np.load(source / f"{name}.npz") as arrays:
        used = {
            key: arrays[key]
            for key in arrays
            if not key.endswith((".accumulation.buffer", "lazy_reset_grad")) and arrays[key].dtype.kind != "V"
        }
    np.savez_compressed(target / f"{name}.npz", **used)


if __name__ == "__main__":
    for graph in sys.argv[3:]:
        reduce(Path(sys.argv[1]), Path(sys.argv[2]), graph)
