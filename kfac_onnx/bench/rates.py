"""Learning rates that all arms share."""

from __future__ import annotations

from typing import Final

__all__ = ["REST_LR"]

REST_LR: Final = 1e-3
"""Of Adam, for everything that is no table."""
