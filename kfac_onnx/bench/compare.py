"""Compare the ratios of two runs: times differ between machines and days, ratios should not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfac_onnx.bench.arms import ARMS

if TYPE_CHECKING:
    from kfac_onnx.bench.results import Results

__all__ = ["Drift", "compare"]


@dataclass(frozen=True)
class Drift:
    """A ratio that moved by more than the tolerance; `change` is new / old − 1."""

    case: str
    vocab_size: int
    arm: str
    ratio: str
    old: float
    new: float

    @property
    def change(self) -> float:
        """How much slower the arm became beside the other one; negative: faster."""
        return self.new / self.old - 1

    @property
    def worse(self) -> bool:
        """Whether the arm became slower."""
        return self.change > 0

    def __str__(self) -> str:
        return (
            f"{self.case}, V={self.vocab_size:,}: {self.arm} / {self.ratio} was {self.old:.2f}, "
            f"is {self.new:.2f} ({self.change:+.0%})"
        )


def compare(old: Results, new: Results, *, tolerance: float) -> tuple[list[Drift], list[str]]:
    """Return the ratios of our arms that moved by more than `tolerance` (0.1: ten percent), worst first.

    Second: what was measured before and is missing now, in words. Other arms are not ours to judge.
    """
    known = {(case.name, case.vocab_size): case for case in new.cases}
    drifts: list[Drift] = []
    missing: list[str] = []
    for case in old.cases:
        there = known.get((case.name, case.vocab_size))
        if there is None:
            missing.append(f"{case.name}, V={case.vocab_size:,}")
            continue
        for before in case.timings:
            if before.ms is None or not ARMS[before.arm].ours:
                continue
            now = there.timing(before.arm)
            if now is None:
                missing.append(f"{case.name}, V={case.vocab_size:,}: {before.arm}")
                continue
            pairs = {
                "plain-sgd": (before.ratio_sgd, now.ratio_sgd),
                "torch-sgd": (before.ratio_torch, now.ratio_torch),
                "fbgemm-rowwise-adagrad": (before.ratio_fbgemm, now.ratio_fbgemm),
            }
            for ratio, (one, other) in pairs.items():
                if one is None or other is None or ratio == before.arm:
                    continue
                drift = Drift(case.name, case.vocab_size, before.arm, ratio, one, other)
                if max(one, other) > (1 + tolerance) * min(one, other):
                    drifts.append(drift)
    return sorted(drifts, key=lambda drift: -drift.change), missing
