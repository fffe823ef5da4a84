"""The presets by kind, from the registry: a new one is tested by every test of its kind without being named."""

from __future__ import annotations

from kfac_onnx.fisher.presets import PRESETS

ALL = list(PRESETS)
COUNTING = [name for name, preset in PRESETS.items() if preset.power("A") is not None]
"""Rows are scaled by the input factor A."""
SQUARING = [name for name, preset in PRESETS.items() if preset.power("A") is None]
"""Rows are scaled by their own squares, so that the rows of equal ids are merged."""
PER_EXAMPLE = [name for name, preset in PRESETS.items() if preset.per_example]
"""The divisor of a mean loss matters."""
INVARIANT = [name for name in ALL if name not in PER_EXAMPLE]
