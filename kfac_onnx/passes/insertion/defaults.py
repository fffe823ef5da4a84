"""What is inserted unless something else is named; apart from the pass, so that a command line loads fast."""

from __future__ import annotations

from typing import Final

__all__ = ["DEFAULT_PRESET"]

DEFAULT_PRESET: Final = "adaptive"
"""One of `kfac_onnx.fisher.PRESETS`."""
