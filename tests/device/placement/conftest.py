"""The committed graphs that are placed are read once for all presets."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _readings(shared_readings: None) -> None:
    pass
