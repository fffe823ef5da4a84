"""Noticing that a run diverges: its loss stays far above where it began, or above its best.

With the mean L of the last `WINDOW` losses, the mean S of the first `START` and the least mean B so far,
the run diverges where L > 2·S, or where L > S and L > 4·B: a loss near 0 may rise by a multiple of itself and
mean nothing, as long as it is below where it began. Losses that are not positive are not judged.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

__all__ = ["ADVICE", "LossWatch"]

START: Final = 10
"""Losses that tell where a run begins."""
WINDOW: Final = 50
"""Losses that are averaged: a batch or two of outliers is no divergence."""
OVER_START: Final = 2.0
OVER_BEST: Final = 4.0

ADVICE: Final = (
    "halve --lr, train the tables with --preset adaptive, or bound the gradients with --clip-norm; "
    "a checkpoint of before can be resumed"
)


class LossWatch:
    """Takes the loss of every step, and says once that the run diverges."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._best = math.inf
        self._said = False

    def add(self, loss: float) -> str | None:
        """Return a sentence if with this loss the run is seen to diverge for the first time."""
        if self._said or not math.isfinite(loss):
            return None
        if len(self._first) < START:
            self._first.append(loss)
        self._last.append(loss)
        if len(self._last) < WINDOW:
            return None
        start, mean = sum(self._first) / START, sum(self._last) / WINDOW
        self._best = min(self._best, mean)
        risen = mean > OVER_START * start or (mean > start and mean > OVER_BEST * self._best)
        if start <= 0 or not risen:
            return None
        self._said = True
        best = min(self._best, start)
        return (
            f"the loss diverges: {mean:.4g} on average over the last {WINDOW} steps, "
            f"{start:.4g} at the start and {best:.4g} at best"
        )
