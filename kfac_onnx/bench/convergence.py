"""MovieLens end to end: in how many steps, and how much time, each arm reaches a held-out RMSE.

Each arm trains at each of its learning rates, from the same values on the same batches; the rate that reaches
the level in the fewest steps stands for the arm, or the one with the lowest RMSE where none reaches it.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from kfac_onnx.bench.arms import open_arm
from kfac_onnx.bench.results import Convergence
from kfac_onnx.bench.workloads import MOVIELENS_EXAMPLES
from kfac_onnx.demo.curves import Curve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kfac_onnx.bench.arms import Arm
    from kfac_onnx.bench.movielens import Ratings
    from kfac_onnx.bench.workloads import Case

__all__ = ["LEVEL", "converge"]

LEVEL: Final = 0.94
"""Held-out RMSE, in stars, that arms are compared at."""
EPOCHS: Final = 12
_WORSE: Final = 0.05
"""Training ends when the RMSE is this far above its lowest."""
_EVALUATIONS: Final = 4
"""In an epoch."""


def converge(
    case: Case,
    arms: Sequence[Arm],
    data: Ratings,
    parameters: Path,
    *,
    threads: int | None,
    tell: Callable[[str], None],
    epochs: int = EPOCHS,
) -> tuple[Convergence, ...]:
    """Return each arm at its best learning rate."""
    found: list[Convergence] = []
    for arm in arms:
        tell(f"{case.name}: {arm.name} to a held-out RMSE of {LEVEL:g}")
        tried = [_train(case, arm, lr, data, parameters, threads, epochs) for lr in arm.rates]
        found.append(min(tried, key=_order))
    return tuple(found)


def _order(run: Convergence) -> tuple[float, float]:
    reached = math.inf if run.steps_to_level is None else run.steps_to_level
    return reached, run.best


def _train(
    case: Case, arm: Arm, lr: float, data: Ratings, parameters: Path, threads: int | None, epochs: int
) -> Convergence:
    epoch = max(1, len(data.train["ratings"]) // MOVIELENS_EXAMPLES)
    every = max(1, epoch // _EVALUATIONS)
    trainee = open_arm(arm, case, parameters, threads=threads, lr=lr)
    at: list[int] = []
    rmse: list[float] = []
    spent = [0.0]
    batches = case.batches(0)
    for step in range(1, epochs * epoch + 1):
        batch = next(batches)
        start = time.perf_counter()
        trainee.step(batch)
        spent.append(spent[-1] + time.perf_counter() - start)
        if step % every == 0:
            loss = trainee.evaluate([data.held_out])
            error = math.sqrt(loss) if math.isfinite(loss) else math.inf
            at.append(step)
            rmse.append(error)
            if math.isinf(error) or error > min(rmse) + _WORSE:
                break  # it diverges, or learns the training part by heart
    trainee.close()
    reached = Curve(tuple(at), tuple(rmse)).first_below(LEVEL)
    return Convergence(
        arm=arm.name,
        lr=lr,
        best=min(rmse),
        steps_to_level=reached,
        seconds_to_level=None if reached is None else spent[min(len(spent) - 1, math.ceil(reached))],
        seconds=spent[-1],
        at=tuple(step for step, error in zip(at, rmse, strict=True) if math.isfinite(error)),
        rmse=tuple(error for error in rmse if math.isfinite(error)),
    )
