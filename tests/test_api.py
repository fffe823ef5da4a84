"""The garbage collector is as it was after a transformation, whatever happens."""

from __future__ import annotations

import gc

import pytest

from kfac_onnx.api import collector_paused


def fails() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
        raise KeyError


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_as_it_was(running: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if running else gc.disable)()
        with pytest.raises(KeyError):
            fails()
        assert gc.isenabled() is running
    finally:
        (gc.enable if before else gc.disable)()
