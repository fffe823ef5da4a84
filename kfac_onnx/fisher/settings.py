"""The switches of the original's factors, as one value instead of module globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.fisher.errors import FisherValueError

__all__ = ["Average", "FactorSettings", "settings_of"]


@dataclass(frozen=True, kw_only=True)
class Average:
    """The running average of a factor: X ← decay·X + (1 − decay)·X_new.

    With `debias` it is divided by 1 − decay^count, count being the batches so far, and the start is
    forgotten at the first one.
    """

    decay: float
    start: float = 0.0
    """A before the first batch, the same for every row; G as a multiple of I."""
    debias: bool = True
    unknown_before_first: bool = False
    """Whether the factor reads as NaN before its first batch."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise FisherValueError(f"the decay of an average must be between 0 and 1, not {self.decay:g}")

    @property
    def forgets_its_start(self) -> bool:
        """Whether the first batch replaces a start that is not 0."""
        return self.debias and self.start != 0.0


@dataclass(frozen=True, kw_only=True)
class FactorSettings:
    """How factors start, average and split the damping; the defaults are those of version 1.7."""

    decay: float = 0.95
    """Weight kept from the old factors at each covariance update."""
    start_at_zero: bool = False
    """Factors start at 0 instead of A = 1, G = I."""
    zero_debias: bool = False
    """Averages start from nothing and are divided by 1 − decay^count; the visible start is forgotten."""
    unknown_before_first: bool = False
    """Factors read as NaN before their first update (averages divided by a sum of weights)."""
    pi: Literal["tracenorm", "guarded", "off"] = "tracenorm"
    """How the damping is split: by traces, by traces but evenly where one is 0, or evenly."""
    towers: Literal["concat", "separate"] = "concat"
    """Stack the towers' rows, or average the towers' means."""
    inverse_starts_at_zero: bool = False
    """Stored powers of G start at 0 instead of I."""

    @property
    def average(self) -> Average:
        """The running average of both factors."""
        return Average(
            decay=self.decay,
            start=0.0 if self.start_at_zero else 1.0,
            debias=self.zero_debias,
            unknown_before_first=self.unknown_before_first,
        )


_LATER: Final = FactorSettings(start_at_zero=True, zero_debias=True, inverse_starts_at_zero=True)

_VERSIONS: Final = {
    "r1.7": FactorSettings(),
    "r1.8": FactorSettings(),
    "r1.10": _LATER,
    "head": FactorSettings(
        start_at_zero=True,
        zero_debias=True,
        inverse_starts_at_zero=True,
        unknown_before_first=True,
        pi="guarded",
        towers="separate",
    ),
}


def settings_of(version: str) -> FactorSettings:
    """Return the defaults of a version of the original: r1.7, r1.8, r1.10 or head (kfac 0.2.4)."""
    settings = _VERSIONS.get(version)
    if settings is None:
        raise UserError(
            f"unknown version '{version}' of the original{did_you_mean(version, _VERSIONS)}",
            help=f"use one of {', '.join(_VERSIONS)}",
        )
    return settings
