"""Peak memory of the verbs on a model with a large table beside it: `python verbs.py FOLDER [GB]`.

The table is a sparse file of zeros, so that it takes no disk; `differentiate` and `transform` write it out,
twice its size in all. A line per verb: peak resident bytes of its process, seconds.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 64


def write_forward(folder: Path, gigabytes: float) -> Path:
    """Write a forward model with a table of so many 10^9 bytes beside it; return its path."""
    rows = int(gigabytes * 1e9) // (4 * WIDTH)
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, WIDTH])
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.data")
    with (folder / "table.data").open("wb") as file:
        file.truncate(rows * WIDTH * 4)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["x"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [table, onnx.numpy_helper.from_array(np.ones((WIDTH, 1), np.float32), "w")],
    )
    path = folder / "forward.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def peak(*arguments: str) -> tuple[int, float]:
    """Run a verb in a process of its own; return its peak resident bytes and its seconds."""
    command = [sys.executable, "-m", "kfac_onnx", *arguments]
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    gigabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    forward, train, step = write_forward(folder, gigabytes), folder / "train.onnx", folder / "step.onnx"
    for arguments in (
        ("differentiate", str(forward), "--loss", "mse", "-o", str(train)),
        ("scan", str(train)),
        ("check", str(train)),
        ("why", str(train), "table"),
        ("transform", str(train), "-o", str(step)),
        ("inspect", str(step)),
    ):
        size, seconds = peak(*arguments)
        print(f"| {arguments[0]} | {size / 1e6:.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
