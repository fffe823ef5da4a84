"""One of two runs in one folder of checkpoints: a process that trains until it is told to stop.

    python tests/trust/two_runs.py PLACE STEPS

Says `ready` when it has saved once, then waits for a line on standard input before it goes on. Ends with 0, or
with 1 and the error's sentence.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import kfac_onnx as kx

GRAPH = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm"


def main(place: str, steps: int) -> int:
    with np.load(f"{GRAPH}.npz") as case:
        values = {name[3:]: case[name] for name in case.files if name.startswith("in:")}
    batch = {name: values.pop(name) for name in ("ids", "labels")}

    def batches() -> object:
        for number in range(steps):
            if number == 1:
                sys.stdout.write("ready\n")
                sys.stdout.flush()
                sys.stdin.readline()
            yield batch

    session = kx.TrainingSession(kx.transform(f"{GRAPH}.onnx", lr=0.01), parameters=values, threads=1)
    try:
        session.fit(batches(), checkpoint=place, checkpoint_every=1)  # type: ignore[arg-type]
    except kx.UserError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
