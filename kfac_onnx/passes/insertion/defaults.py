"""What is inserted unless something else is named; apart from the pass, so that a command line loads fast."""

from __future__ import annotations

from typing import Final

__all__ = ["DEFAULT_PRESET", "TABLE_DECAY"]

DEFAULT_PRESET: Final = "adaptive"
"""One of `kfac_onnx.fisher.PRESETS`."""

TABLE_DECAY: Final = "decoupled decay of a table's rows in each step; a row makes it up when it is looked up"
"""What the option of that name says in each pass that trains tables."""
