"""Ctrl-C between steps, never within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

__all__ = ["uninterrupted"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Generator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block where Python handles them (KeyboardInterrupt).

    A signal that Python does not handle still ends the process. Python runs handlers in the main thread only,
    so in another thread nothing needs to be done. Costs a few microseconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    replaced = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in replaced:
            signal.signal(number, later)
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        for number, frame in came:
            replaced[signal.Signals(number)](number, frame)
