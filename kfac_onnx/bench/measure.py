"""Time arms in turn, a few steps at a time, on the same batches, in one process.

Arms are opened in groups that fit into memory together; each group has the arm that ratios are to, so that a
ratio is always between times of the same minutes. Arms that touch every row are a group apart, since they
leave nothing of the others' rows in the caches. An arm makes some steps in a row, as it would in training,
and the first of them, which finds the caches as another arm left them, is not counted. The order rotates.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.bench.arms import ARMS, open_arm
from kfac_onnx.bench.place import HOST
from kfac_onnx.bench.results import Timing
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.bench.arms import Arm, Trainee
    from kfac_onnx.bench.place import Place
    from kfac_onnx.bench.workloads import Case

__all__ = ["available_bytes", "groups_that_fit", "measure", "timing"]

REFERENCE: Final = "plain-sgd"
TORCH_REFERENCE: Final = "torch-sgd"
FBGEMM_REFERENCE: Final = "fbgemm-rowwise-adagrad"
_WARM_UP: Final = 10
"""Steps before any is timed: the first ones allocate, and refresh roots more often."""
RUN: Final = 6
"""Steps that an arm makes in a row."""
_FEWEST: Final = 5
"""Steps timed of an arm that is over its seconds."""
_NO_ROOM: Final = ("out of memory", "has no room", "failed to allocate")
_SPARE: Final = 1.5e9
"""Bytes left to everything that is no table."""


def available_bytes(place: Place = HOST) -> float:
    """Return the memory that is free for us there; infinite where the system does not say (no /proc)."""
    if place.on_gpu:
        free = place.free_bytes()
        return float("inf") if free is None else free
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return float("inf")


def groups_that_fit(
    arms: Sequence[Arm], table_bytes: int, memory: float
) -> tuple[list[list[Arm]], dict[str, str]]:
    """Return arms in groups that fit into `memory` bytes with the reference, and why others are left out."""
    budget = memory - _SPARE

    def need(arm: Arm) -> float:
        return arm.held * table_bytes

    reference = next(arm for arm in arms if arm.name == REFERENCE)
    left_out: dict[str, str] = {}
    groups: list[list[Arm]] = []
    used = 0.0
    for arm in sorted(arms, key=lambda arm: arm.dense):
        if arm is not reference and need(arm) + need(reference) > budget:
            wanted, there = need(arm) + need(reference), max(budget, 0.0)
            left_out[arm.name] = f"needs about {wanted / 1e9:.0f} GB, {there / 1e9:.0f} GB are free"
            continue
        if not groups or used + need(arm) > budget or (arm.dense and not groups[-1][-1].dense):
            groups.append([reference])
            used = need(reference)
        if arm is not reference:
            groups[-1].append(arm)
            used += need(arm)
    return groups, left_out


def timing(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    """Return median, tenth and ninetieth percentile."""
    low, median, high = (float(value) for value in np.percentile(milliseconds, (10, 50, 90)))
    return median, low, high


def measure(
    case: Case,
    arms: Sequence[Arm],
    parameters: Path,
    *,
    steps: int,
    threads: int | None,
    seconds: float,
    tell: Callable[[str], None],
    place: Place = HOST,
) -> dict[str, Timing]:
    """Return each arm's time of a step, by name; an arm is timed for `seconds` at most.

    `tell` hears what is being done.
    """
    impossible: dict[str, str] = {}
    if any(arm.fbgemm for arm in arms):
        from kfac_onnx.bench.fbgemm_arms import why_not

        problem = why_not(width for _, width in case.tables.values())
        impossible = {} if problem is None else {arm.name: problem for arm in arms if arm.fbgemm}
    possible = [arm for arm in arms if arm.name not in impossible]
    groups, left_out = groups_that_fit(possible, case.table_bytes, available_bytes(place))
    left_out |= impossible
    found: dict[str, Timing] = {}
    for number, group in enumerate(groups):
        tell(f"{case.name} V={case.vocab_size:,}: {', '.join(arm.name for arm in group)}")
        opened: dict[str, Trainee] = {}
        try:
            for arm in group:
                problem = _open(opened, arm, case, parameters, threads, place)
                if problem is not None:
                    tell(f"{case.name} V={case.vocab_size:,}: {arm.name} {problem}")
                    left_out[arm.name] = problem
            times = _interleave(case, opened, steps, seconds)
            for name, values in times.items():
                if name not in found:
                    found[name] = _summary(
                        name, values, times, group=number, state_bytes=opened[name].state_bytes
                    )
        except MemoryError as e:
            raise UserError(
                f"{case.name} with V={case.vocab_size:,} does not fit into memory",
                help="give smaller --vocab-sizes or fewer --arms",
            ) from e
        finally:
            for trainee in opened.values():
                trainee.close()
    for name, reason in left_out.items():
        found[name] = Timing(arm=name, skipped=reason)
    return {arm.name: found[arm.name] for arm in arms}


def _open(
    opened: dict[str, Trainee],
    arm: Arm,
    case: Case,
    parameters: Path,
    threads: int | None,
    place: Place,
) -> str | None:
    """Open an arm and have it make a step; on a GPU, return why it does not fit there if it does not.

    What an optimizer keeps is there after its first step. The arm that ratios are to must fit.
    """
    if not place.on_gpu:
        opened[arm.name] = open_arm(arm, case, parameters, threads=threads)
        return None
    try:
        trainee = opened[arm.name] = open_arm(arm, case, parameters, threads=threads, place=place)
        trainee.step(next(case.batches(0)))
    except Exception as e:  # PyTorch and ONNX Runtime have classes of their own
        if arm.name == REFERENCE or not any(words in str(e).lower() for words in _NO_ROOM):
            raise
        if arm.name in opened:
            opened.pop(arm.name).close()
        return f"does not fit into the GPU's memory: {first_line(e)}"
    return None


def _interleave(case: Case, opened: dict[str, Trainee], steps: int, seconds: float) -> dict[str, list[float]]:
    """Return milliseconds of each arm's steps, without warm-up and the first step of each turn."""
    times: dict[str, list[float]] = {name: [] for name in opened}
    made, spent = dict.fromkeys(opened, 0), dict.fromkeys(opened, 0.0)
    names, turn = list(opened), 0
    batches = case.batches(0)

    def done(name: str) -> bool:
        return len(times[name]) >= steps or (spent[name] > seconds and len(times[name]) >= _FEWEST)

    while not all(done(name) for name in names):
        some = [next(batches) for _ in range(RUN)]
        for name in names[turn:] + names[:turn]:
            for place, batch in enumerate(some):
                if done(name):
                    break
                start = time.perf_counter()
                opened[name].step(batch)
                taken = time.perf_counter() - start
                made[name] += 1
                spent[name] += taken
                if place > 0 and made[name] > (2 if ARMS[name].dense else _WARM_UP):
                    times[name].append(1e3 * taken)
        turn = (turn + 1) % len(names)
    return times


def _summary(
    name: str, values: list[float], times: dict[str, list[float]], *, group: int, state_bytes: int
) -> Timing:
    median, low, high = timing(values)

    def ratio(reference: str) -> float | None:
        return None if reference not in times else median / timing(times[reference])[0]

    return Timing(
        arm=name,
        ms=median,
        p10=low,
        p90=high,
        mean=float(np.mean(values)),
        steps=len(values),
        group=group,
        ratio_sgd=ratio(REFERENCE),
        ratio_torch=ratio(TORCH_REFERENCE),
        ratio_fbgemm=ratio(FBGEMM_REFERENCE),
        state_bytes=state_bytes,
    )
