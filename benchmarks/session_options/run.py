"""Which of ONNX Runtime's session options make a step faster, and what an optimized model on disk would save.

    OMP_NUM_THREADS=1 python benchmarks/session_options/run.py [--rounds 60]

For each option two trainings, one with it and one without, go over the same batches, six steps at a time in
turn; the first of the six does not count. The ratios are medians over rounds. A second table has the time to
open all sessions of a step, as usual and from models that ONNX Runtime has optimized and written before.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from kfac_onnx import TrainingSession, transform
from kfac_onnx.bench import workloads
from kfac_onnx.runtime.step.tensors import session_maker

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.bench.workloads import Case

BLOCK = 6
VOCABULARY = 1_000_000


def _arena(options: ort.SessionOptions) -> None:
    options.enable_cpu_mem_arena = False


def _pattern(options: ort.SessionOptions) -> None:
    options.enable_mem_pattern = False


def _entry(key: str, value: str) -> Callable[[ort.SessionOptions], None]:
    return lambda options: options.add_session_config_entry(key, value)


def _level(level: ort.GraphOptimizationLevel) -> Callable[[ort.SessionOptions], None]:
    def change(options: ort.SessionOptions) -> None:
        options.graph_optimization_level = level

    return change


OPTIONS: dict[str, Callable[[ort.SessionOptions], None]] = {
    "threads do not spin": _entry("session.intra_op.allow_spinning", "0"),
    "they spin for 20 µs": _entry("session.intra_op.spin_duration_us", "20"),
    "they spin for 1,000 µs": _entry("session.intra_op.spin_duration_us", "1000"),
    "they spin after a run too": _entry("session.force_spinning_stop", "0"),
    "one thread": lambda options: setattr(options, "intra_op_num_threads", 1),
    "no arena": _arena,
    "no memory pattern": _pattern,
    "no prepacking": _entry("session.disable_prepacking", "1"),
    "denormals are zero": _entry("session.set_denormal_as_zero", "1"),
    "basic optimizations": _level(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    "no optimizations": _level(ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
}


def opened(
    case: Case, values: dict[str, np.ndarray], maker: Callable[..., ort.InferenceSession]
) -> TrainingSession:
    """Open the default preset of a workload with sessions from `maker`."""
    token = session_maker.set(maker)
    try:
        return TrainingSession(transform(case.graph()), parameters=values, threads=2)
    finally:
        session_maker.reset(token)


def _with(change: Callable[[ort.SessionOptions], None]) -> Callable[..., ort.InferenceSession]:
    def make(model: bytes, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        change(options)
        return ort.InferenceSession(model, options, **others)

    return make


def ratio(case: Case, values: dict[str, np.ndarray], option: str, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds of a step with an option, and the median ratio to the defaults."""
    sessions = [
        opened(case, values, ort.InferenceSession),
        opened(case, values, _with(OPTIONS[option])),
    ]
    spent: tuple[list[float], list[float]] = ([], [])
    stream = case.batches(0)
    for turn in range(rounds + 3):
        batches = [next(stream) for _ in range(BLOCK)]
        for which in (0, 1) if turn % 2 else (1, 0):
            sessions[which].step(batches[0])
            start = time.perf_counter()
            for batch in batches[1:]:
                sessions[which].step(batch)
            if turn >= 3:
                spent[which].append(1e3 * (time.perf_counter() - start) / (BLOCK - 1))
    for session in sessions:
        session.close()
    ratios = [other / own for own, other in zip(*spent, strict=True)]
    return statistics.median(spent[1]), statistics.median(ratios)


def opening(case: Case, values: dict[str, np.ndarray], rounds: int) -> tuple[float, float]:
    """Return the median seconds to make a step's sessions: as usual, and from models optimized before."""
    usual: list[float] = []
    cached: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        made: list[tuple[bytes, ort.SessionOptions, dict[str, Any]]] = []

        def write(model: bytes, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
            options.optimized_model_filepath = str(Path(place) / f"{len(made)}.onnx")
            made.append((model, options, others))
            return ort.InferenceSession(model, options, **others)

        opened(case, values, write).close()
        files = [(Path(place) / f"{index}.onnx").read_bytes() for index in range(len(made))]
        for _ in range(rounds):
            start = time.perf_counter()
            for model, options, others in made:
                options.optimized_model_filepath = ""
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
                ort.InferenceSession(model, options, **others)
            usual.append(time.perf_counter() - start)
            start = time.perf_counter()
            for file, (_, options, others) in zip(files, made, strict=True):
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                ort.InferenceSession(file, options, **others)
            cached.append(time.perf_counter() - start)
    return statistics.median(usual), statistics.median(cached)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    cases = [workloads.cases("mf", vocab_sizes=(VOCABULARY,))[0], *workloads.cases("lm", vocab_sizes=(0,))]
    rng = np.random.default_rng(0)
    ort.set_default_logger_severity(3)
    tables: list[dict[str, tuple[float, float]]] = []
    times: list[tuple[float, float]] = []
    for case in cases:
        values = {
            name: (rng.uniform(-1, 1, shape) * case.scales.get(name, 0)).astype(np.float32)
            for name, shape in case.shapes.items()
        }
        tables.append({option: ratio(case, values, option, rounds) for option in OPTIONS})
        times.append(opening(case, values, 7))
    print("| option | " + " | ".join(f"{case.workload}: ms | / defaults" for case in cases) + " |")
    print("|---" * (2 * len(cases) + 1) + "|")
    for name in tables[0]:
        cells = [f"{table[name][0]:.2f} | {table[name][1]:.3f}" for table in tables]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| sessions of a step, s | " + " | ".join(case.workload for case in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for index, name in enumerate(("as usual", "optimized before")):
        print(f"| {name} | " + " | ".join(f"{pair[index]:.3f}" for pair in times) + " |")


if __name__ == "__main__":
    main()
