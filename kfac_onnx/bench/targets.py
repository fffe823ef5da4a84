"""The aims that a run can tell something about: each as a number of the results beside its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kfac_onnx.bench.results import CaseResult, Results

__all__ = ["Target", "targets"]

_NAMED: Final = "mf D=64 N=4096"
"""The case that most aims are about; ratios at `_ROWS` rows of each table."""
_ROWS: Final = 1_000_000
_SPARE: Final = 300e6


@dataclass(frozen=True)
class Target:
    """An aim: `value` is to be at most `limit`, or at least where `at_least`."""

    aim: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it holds in this run."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def targets(results: Results) -> list[Target]:
    """Return the aims whose numbers the run has."""
    found: list[Target] = []
    if results.settings.provider == "cuda":
        return [target for case in results.cases for target in _on_gpu(case)]
    for case in results.cases:
        found += _of_case(case)
    for item in results.growth:
        if item.name == _NAMED and item.added_small_ms > 0:
            ratio = item.added_large_ms / item.added_small_ms
            aim = f"{item.name}: what half adds at V={item.large:,} over that at V={item.small:,}"
            found.append(Target(aim, ratio, 1.5))
    return found


def _on_gpu(case: CaseResult) -> list[Target]:
    found: list[Target] = []
    where = f"{case.name}, V={case.vocab_size:,}"
    half, adam = case.timing("half"), case.timing("torch-fused-adam")
    if half is not None and half.ms is not None:
        if adam is not None and adam.ms is not None:
            found.append(
                Target(f"{where}: torch-fused-adam over half", adam.ms / half.ms, 1.0, at_least=True)
            )
        if case.workload == "lm" and half.ratio_sgd is not None:
            found.append(Target(f"{where}: half over SGD rows", half.ratio_sgd, 1.3))
    if case.roofline is not None and case.roofline.added_ms is not None and case.roofline.floor_ms > 0:
        over = case.roofline.added_ms / case.roofline.floor_ms
        found.append(Target(f"{where}: what half adds over its floor", over, 1.5))
    return found


def _of_case(case: CaseResult) -> list[Target]:
    found: list[Target] = []
    where = f"{case.name}, V={case.vocab_size:,}"
    half = case.timing("half")
    if half is not None and half.ms is not None:
        limits: dict[str, float] = {"lm": 1.10}
        if case.name == _NAMED and case.vocab_size == _ROWS:
            limits["mf"] = 2.0
            for arm, limit in (("torch-sparse-adam", 3.5), ("torch-adam", 200.0)):
                other = case.timing(arm)
                if other is not None and other.ms is not None:
                    found.append(
                        Target(f"{where}: {arm} over half", other.ms / half.ms, limit, at_least=True)
                    )
            if half.ratio_torch is not None:
                found.append(Target(f"{where}: half over torch-sgd", half.ratio_torch, 1.0))
        if case.workload in limits and half.ratio_sgd is not None:
            found.append(Target(f"{where}: half over SGD rows", half.ratio_sgd, limits[case.workload]))
    if case.name != _NAMED:
        return found
    for item in case.memory:
        if item.arm == "half" and case.table_bytes > 1e9:
            peak = max(item.opened, item.stepped, item.saved, item.resumed)
            share = peak / (1.15 * case.table_bytes + _SPARE)
            found.append(Target(f"{where}: peak memory over tables + 15 % + 300 MB", share, 1.0))
    if case.roofline is not None and case.roofline.share is not None:
        found.append(
            Target(f"{where}: floor of the added work over its time", case.roofline.share, 0.6, at_least=True)
        )
    return found
