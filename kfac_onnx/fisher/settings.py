"""The switches of the original's factors, as one value instead of module globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from kfac_onnx.errors import UserError, did_you_mean

__all__ = ["FactorSettings", "settings_of"]


@dataclass(frozen=True, kw_only=True)
class FactorSettings:
    """How factors start, average and split the damping; the defaults are those of version 1.7."""

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
    found = _VERSIONS.get(version)
    if found is None:
        raise UserError(
            f"unknown version '{version}' of the original{did_you_mean(version, _VERSIONS)}",
            help=f"use one of {', '.join(_VERSIONS)}",
        )
    return found
