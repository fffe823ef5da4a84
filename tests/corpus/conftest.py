"""Every committed graph is read once: its tests follow one another, so that one worker has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _readings(shared_readings: None) -> None:
    pass


def graph_of(item: pytest.Item) -> str:
    """Return the committed graph that a test is about; '' for a test of none or of several."""
    call = getattr(item, "callspec", None)
    return "" if call is None else str(call.params.get("name", ""))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of this folder by their graph; else they stay in their order."""
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    ordered = sorted((items[place] for place in places), key=graph_of)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item
