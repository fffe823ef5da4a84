"""Where a step goes: time by phase and by inserted operator, from ONNX Runtime's own profiles.

Every stage of a step has a session of its own. Once sessions that only count the time of their runs give the
phases; then sessions that profile their nodes give the operators, since profiling itself takes time. A node
belongs to the operator of `ai.kfac` that it was inlined from (`_inlfunc_<Operator>_...`), else to the pass
that added it (`kfac/<pass>/...`: `plumbing`), else to the user's graph.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.bench.arms import open_arm
from kfac_onnx.bench.results import OperatorTime, PhaseTime, Profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy as np

    from kfac_onnx.bench.arms import Arm
    from kfac_onnx.bench.workloads import Case

__all__ = ["GRAPH", "PLUMBING", "operator_of", "profile", "read_events"]

GRAPH: Final = "graph"
"""Nodes of the user's own graph, gradients among them."""
PLUMBING: Final = "plumbing"
"""Nodes that passes put between operators: shapes, copies, checks of ids."""
_INLINED: Final = re.compile(r"_inlfunc_([A-Z][A-Za-z0-9]*)")
_SUFFIX: Final = "_kernel_time"
_WARM_UP: Final = 10
_HELPERS: Final = ("probe", "copy")
"""Graphs of sessions that are no part of a step."""


def operator_of(node: str) -> str:
    """Return what a node belongs to, by its name: an operator of `ai.kfac`, `plumbing` or `graph`."""
    found = _INLINED.search(node)
    if found is not None:
        return found[1]
    return PLUMBING if node.startswith("kfac/") or "/kfac/" in node else GRAPH


def read_events(events: Iterable[Mapping[str, Any]]) -> tuple[list[float], dict[str, tuple[float, int]]]:
    """Return the milliseconds of each run of a profile, and per operator (median milliseconds a run, nodes).

    A node with a body (Loop, If) holds the time of the nodes in it, which are left out.
    """
    runs: list[tuple[int, int]] = []
    nodes: list[tuple[int, int, str]] = []
    for event in events:
        name, start, duration = str(event.get("name", "")), int(event.get("ts", 0)), int(event.get("dur", 0))
        if event.get("cat") == "Session" and name == "model_run":
            runs.append((start, duration))
        elif event.get("cat") == "Node" and name.endswith(_SUFFIX):
            nodes.append((start, duration, name.removesuffix(_SUFFIX)))
    runs.sort()
    starts = [start for start, _ in runs]
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    names: defaultdict[str, set[str]] = defaultdict(set)
    end = -1
    for start, duration, name in sorted(nodes, key=lambda node: (node[0], -node[1])):
        place = bisect_right(starts, start) - 1
        if start + duration <= end or place < 0:
            continue  # inside the body of the node before, or in a run that is not looked at
        end = max(end, start + duration)
        totals[operator_of(name)][place] += duration / 1e3
        names[operator_of(name)].add(name)
    found = {operator: (median(each), len(names[operator])) for operator, each in totals.items()}
    return [duration / 1e3 for _, duration in runs], found


@dataclass
class _Watched:
    """A session of a step: its phase, and the milliseconds of its runs."""

    phase: str
    runs: list[float] = field(default_factory=list[float])


def profile(case: Case, arm: Arm, parameters: Path, *, steps: int, threads: int | None) -> Profile:
    """Return where the steps of one of our arms go, per step, over `steps` steps after a warm-up."""
    batches = case.batches(0)
    timed, host = _timed(case, arm, parameters, batches, steps, threads)
    kernels, profiled = _profiled(case, arm, parameters, batches, steps, threads)
    phases: list[PhaseTime] = []
    operators: list[OperatorTime] = []
    for phase, found in kernels.items():
        spent = timed[phase] or profiled[phase]
        share = min(1.0, len(spent) / steps)
        inside = share * sum(each for each, _ in found.values())
        phases.append(PhaseTime(phase, share * median(spent), inside, share))
        operators += [
            OperatorTime(phase, operator, share * each, count)
            for operator, (each, count) in sorted(found.items(), key=lambda item: -item[1][0])
        ]
    return Profile(
        arm=arm.name,
        step_ms=host + sum(phase.ms for phase in phases),
        host_ms=host,
        phases=tuple(phases),
        operators=tuple(operators),
    )


def _timed(
    case: Case,
    arm: Arm,
    parameters: Path,
    batches: Iterator[dict[str, np.ndarray]],
    steps: int,
    threads: int | None,
) -> tuple[defaultdict[str, list[float]], float]:
    """Return the milliseconds of each phase's runs, and those of a step outside of all phases (median)."""
    import onnxruntime as ort

    from kfac_onnx.runtime.step.tensors import session_maker

    watched: list[_Watched] = []

    class Timed(ort.InferenceSession):
        def __init__(self, model: bytes, options: ort.SessionOptions, **others: Any) -> None:
            super().__init__(model, options, **others)
            self._watched = _Watched(_phase_of(model))
            watched.append(self._watched)

        def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
            start = time.perf_counter()
            super().run_with_iobinding(iobinding, run_options)  # pyright: ignore[reportCallIssue]  typed in part
            self._watched.runs.append(1e3 * (time.perf_counter() - start))

    token = session_maker.set(Timed)
    try:
        trainee = open_arm(arm, case, parameters, threads=threads)
    finally:
        session_maker.reset(token)
    for _ in range(_WARM_UP):
        trainee.step(next(batches))
    for item in watched:
        item.runs.clear()
    outside: list[float] = []
    inside = 0.0
    for _ in range(steps):
        batch = next(batches)
        start = time.perf_counter()
        trainee.step(batch)
        taken = 1e3 * (time.perf_counter() - start)
        before, inside = inside, sum(sum(item.runs) for item in watched)
        outside.append(taken - (inside - before))
    trainee.close()
    runs: defaultdict[str, list[float]] = defaultdict(list)
    for item in watched:
        if item.phase not in _HELPERS:
            runs[item.phase] += item.runs
    return runs, max(0.0, median(outside))


def _profiled(
    case: Case,
    arm: Arm,
    parameters: Path,
    batches: Iterator[dict[str, np.ndarray]],
    steps: int,
    threads: int | None,
) -> tuple[dict[str, dict[str, tuple[float, int]]], dict[str, list[float]]]:
    """Return, per phase, the time in each operator over the steps after the warm-up, and that of each run."""
    import onnxruntime as ort

    from kfac_onnx.runtime.step.tensors import session_maker

    opened: list[tuple[str, Any]] = []  # onnxruntime's sessions are typed in part
    kernels: dict[str, dict[str, tuple[float, int]]] = {}
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def profiling(model: bytes, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / f"stage_{len(opened)}")
            session = ort.InferenceSession(model, options, **others)
            opened.append((_phase_of(model), session))
            return session

        token = session_maker.set(profiling)
        try:
            trainee = open_arm(arm, case, parameters, threads=threads)
        finally:
            session_maker.reset(token)
        for _ in range(_WARM_UP):
            trainee.step(next(batches))
        began = {clock: clock() for clock in (time.time_ns, time.perf_counter_ns)}
        for _ in range(steps):
            trainee.step(next(batches))
        for phase, session in opened:
            offset = int(session.get_profiling_start_time_ns())
            now = min(began.values(), key=lambda at: abs(at - offset))  # by the clock that it uses
            events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
            late = [event for event in events if offset + 1_000 * int(event.get("ts", 0)) >= now]
            spent, found = read_events(late)
            if spent and phase not in _HELPERS:
                runs.setdefault(phase, []).extend(spent)
                there = kernels.setdefault(phase, {})
                for operator, (total, count) in found.items():
                    before = there.get(operator, (0.0, 0))
                    there[operator] = before[0] + total, before[1] + count
        trainee.close()
    return kernels, runs


def _phase_of(model: bytes) -> str:
    """Return the name of a stage's graph: its phase."""
    import onnx

    return onnx.load_from_string(model).graph.name.replace("_", "-")
