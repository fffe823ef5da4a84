"""The highest resident memory of one arm: opening, steps, a checkpoint and going on from it.

Each arm has a process of its own (`python -m kfac_onnx.bench.memory`, which reads its task from standard
input), because memory that one arm freed would hide what the next one takes.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_onnx.bench.results import Memory
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from kfac_onnx.bench.workloads import Case

__all__ = ["measure_memory", "peak_bytes"]

_STEPS = 12


def peak_bytes() -> int:
    """Return the most that this process has had in memory.

    Linux: `VmHWM`, which starts anew in a new program. `ru_maxrss` does not: a child begins with its
    parent's.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure_memory(
    case: Case, arm: str, parameters: Path, *, threads: int | None, movielens: Path | None
) -> Memory | str:
    """Return an arm's memory, measured in a new process; or why there is none, in words."""
    task = {
        "workload": case.workload,
        "name": case.name,
        "vocab_size": case.vocab_size,
        "width": next(iter(case.tables.values()))[1],
        "lookups": next(iter(case.lookups.values())),
        "movielens": None if movielens is None else str(movielens.resolve()),
        "arm": arm,
        "parameters": str(parameters),
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "kfac_onnx.bench.memory"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        return f"the process ended with {done.returncode}: {last}"
    return Memory(**json.loads(done.stdout))


def _task(task: dict[str, Any]) -> Memory:
    from kfac_onnx.bench.arms import ARMS, open_arm
    from kfac_onnx.bench.movielens import read_ratings
    from kfac_onnx.bench.workloads import cases

    data = None if task["movielens"] is None else read_ratings(Path(task["movielens"]))
    case = next(
        case
        for case in cases(
            task["workload"],
            vocab_sizes=(task["vocab_size"],),
            widths=(task["width"],),
            lookups=(task["lookups"],),
            data=data,
        )
        if case.name == task["name"]
    )
    arm = ARMS[task["arm"]]
    # Libraries are no part of what training takes.
    importlib.import_module("kfac_onnx.bench.torch_arms" if arm.torch else "kfac_onnx.runtime")
    parameters = Path(task["parameters"])
    batches = case.batches(0)
    first = next(batches)
    gc.collect()
    start = peak_bytes()
    trainee = open_arm(arm, case, parameters, threads=task["threads"])
    opened = peak_bytes()
    trainee.step(first)
    for _step in range(_STEPS - 1):
        trainee.step(next(batches))
    stepped = peak_bytes()
    with tempfile.TemporaryDirectory(dir=parameters.parent) as folder:
        path = Path(folder) / "run.ckpt"
        trainee.save(path)
        saved = peak_bytes()
        trainee.resume(path)
        trainee.step(next(batches))
    resumed = peak_bytes()
    trainee.close()
    return Memory(task["arm"], start, opened, stepped, saved, resumed)


def main() -> int:
    """Do the task that standard input describes; write the result to standard output as JSON."""
    try:
        sys.stdout.write(json.dumps(vars(_task(json.load(sys.stdin)))))
    except UserError as e:
        sys.stderr.write(e.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
