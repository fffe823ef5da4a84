"""What `half` adds to a step of plain SGD at the smallest and at the largest vocabulary, in the same minutes.

Times of two cases that run one after the other differ by whatever else the machine does in between. Here
the four trainees (two arms at two vocabularies) take turns of a few steps, in an order that rotates; what is
added is the median over steps of `half` less `plain-sgd` on the same batch.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.bench.arms import ARMS, open_arm
from kfac_onnx.bench.measure import RUN, available_bytes
from kfac_onnx.bench.place import HOST
from kfac_onnx.bench.results import Growth
from kfac_onnx.bench.workloads import write_parameters

if TYPE_CHECKING:
    from pathlib import Path

    from kfac_onnx.bench.arms import Trainee
    from kfac_onnx.bench.place import Place
    from kfac_onnx.bench.workloads import Case

__all__ = ["measure_growth"]

_ARMS: Final = ("plain-sgd", "half")
_WARM_UP: Final = 10
_SPARE: Final = 1.5e9
"""Bytes left to everything that is no table."""


def measure_growth(
    small: Case,
    large: Case,
    folder: Path,
    *,
    steps: int,
    threads: int | None,
    seconds: float,
    place: Place = HOST,
) -> Growth | None:
    """Return what `half` adds at both vocabularies, in milliseconds; None where both do not fit into memory.

    Initial values are written to `folder`. The four trainees together are timed for `seconds` each at most.
    """
    cases = (small, large)
    if sum(len(_ARMS) * case.table_bytes for case in cases) > available_bytes(place) - _SPARE:
        return None
    with ExitStack() as stack:
        opened: list[Trainee] = []
        for index, case in enumerate(cases):
            parameters = folder / f"growth-{index}.safetensors"
            write_parameters(case, parameters)
            for name in _ARMS:
                opened.append(open_arm(ARMS[name], case, parameters, threads=threads, place=place))
                stack.callback(opened[-1].close)
            parameters.unlink()
        batches = [case.batches(0) for case in cases]
        times: list[list[float]] = [[] for _ in opened]
        end = time.perf_counter() + len(opened) * seconds
        for round_ in itertools.count():
            now = [[next(source) for _ in range(RUN)] for source in batches]
            turn = round_ % len(opened)
            for index in (*range(turn, len(opened)), *range(turn)):
                for number, batch in enumerate(now[index // len(_ARMS)]):
                    start = time.perf_counter()
                    opened[index].step(batch)
                    if number > 0 and round_ >= _WARM_UP / RUN:
                        times[index].append(1e3 * (time.perf_counter() - start))
            if len(times[0]) >= steps or (time.perf_counter() > end and times[0]):
                break
    plain_small, half_small, plain_large, half_large = (np.array(own[:steps]) for own in times)
    return Growth(
        name=small.name,
        small=small.vocab_size,
        large=large.vocab_size,
        added_small_ms=float(np.median(half_small - plain_small)),
        added_large_ms=float(np.median(half_large - plain_large)),
        steps=len(plain_small),
    )
