"""Pausing Python's cyclic garbage collector while a graph is read and rewritten."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Generator[None]:
    """Let no collection run inside; afterwards the collector is as it was.

    A graph is hundreds of thousands of objects that all stay, and the collector walks them again and again: a
    quarter of the time (benchmarks/transform_time).
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
