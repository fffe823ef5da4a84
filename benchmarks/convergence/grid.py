"""The runs of the sweep: every preset at its learning rates, with constant and decaying rates.

`lr` is the table's learning rate, `rest_lr` Adam's for all other layers. The grids surround the best values
of earlier studies; `report.py` says whether each optimum came out inside what was swept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Schedule = Literal["constant", "linear"]

STEPS: Final = 1_200
"""Steps of a run: 0.43 of an epoch."""
EVERY: Final = 50
"""Steps between two evaluations on the 6,000 held-out positions."""
BATCH: Final = 256
"""Examples of a step, of four lookups each."""
SEEDS: Final = (0, 1, 2)
"""The first seed is swept; on the others only its best settings run."""
BASELINES: Final = ("plain-adam", "plain-adagrad")
SCHEDULES: Final[tuple[Schedule, ...]] = ("constant", "linear")


@dataclass(frozen=True, order=True)
class Setting:
    """One preset at one pair of learning rates under one schedule."""

    schedule: Schedule
    preset: str
    lr: float
    rest_lr: float

    def __str__(self) -> str:
        return f"{self.preset} lr={self.lr:g} rest={self.rest_lr:g} {self.schedule}"


_REST: Final = (0.002, 0.003, 0.004, 0.005, 0.008)
_REST_LINEAR: Final = (0.005, 0.008, 0.01, 0.012, 0.018)

GRID: Final[dict[tuple[Schedule, str], tuple[tuple[float, ...], tuple[float, ...]]]] = {
    ("constant", "plain-adam"): ((0.004, 0.006, 0.01, 0.016), _REST),
    ("constant", "plain-adagrad"): ((0.06, 0.1, 0.2, 0.4), _REST),
    ("constant", "half"): ((0.006, 0.01, 0.016), _REST),
    ("constant", "adagrad"): ((0.06, 0.1, 0.16), _REST),
    ("constant", "adaptive"): ((0.006, 0.01, 0.016), _REST),
    ("constant", "r1.7"): ((0.003, 0.01, 0.03, 0.1), _REST),
    ("linear", "plain-adam"): ((0.008, 0.012, 0.018, 0.027, 0.04), _REST_LINEAR),
    ("linear", "plain-adagrad"): ((0.05, 0.1, 0.2, 0.4), _REST_LINEAR),
    ("linear", "half"): ((0.012, 0.02, 0.03), _REST_LINEAR),
    ("linear", "adagrad"): ((0.05, 0.1, 0.2, 0.4), _REST_LINEAR),
    ("linear", "adaptive"): ((0.012, 0.02, 0.03, 0.045), _REST_LINEAR),
    ("linear", "r1.7"): ((0.03, 0.1, 0.3, 1.0), _REST_LINEAR),
}
"""(schedule, preset) -> (lrs, rest_lrs)."""


def settings() -> list[Setting]:
    """Return every setting of the grid."""
    return [
        Setting(schedule, preset, lr, rest_lr)
        for (schedule, preset), (lrs, rest_lrs) in GRID.items()
        for lr in lrs
        for rest_lr in rest_lrs
    ]


def edges(setting: Setting, swept: set[Setting]) -> list[str]:
    """Return which of a setting's two rates lie at the edge of what was swept, empty if both are inside."""
    same = [other for other in swept if (other.schedule, other.preset) == (setting.schedule, setting.preset)]
    found: list[str] = []
    for name in ("lr", "rest_lr"):
        values = sorted({getattr(other, name) for other in same})
        if getattr(setting, name) in (values[0], values[-1]):
            found.append(name)
    return found
