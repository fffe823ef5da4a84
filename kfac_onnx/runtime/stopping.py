"""Signals during training: the step at work is finished, the run is saved, and then it stops.

Only in the main thread, and only where nobody else handles the signal: SIGINT where it would raise
KeyboardInterrupt, SIGTERM where it would end the process. A second signal does that at once.

Whoever handles them otherwise (Python's KeyboardInterrupt, a watchdog) gets them between steps, never within
one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from pathlib import Path
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object]

__all__ = ["Interrupted", "Stop", "Terminated", "stop_signals", "stopped", "uninterrupted"]

_DEFAULTS: Final = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_SIGNALS: Final = tuple(sorted(signal.valid_signals()))
_functions: Final[Any] = importlib.import_module("_signal")
"""Those of `signal` without enumerations around them, which make 64 calls in each step 40 times as slow."""


class Interrupted(KeyboardInterrupt):
    """SIGINT stopped the training, after a whole step; the text says where, and what was saved."""

    status: Final = 128 + int(signal.SIGINT)


class Terminated(SystemExit):
    """SIGTERM stopped the training, after a whole step; a program that lets it pass exits with 143."""

    status: Final = 128 + int(signal.SIGTERM)

    def __init__(self, text: str) -> None:
        super().__init__(self.status)
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass
class Stop:
    """The signal that came, if one did."""

    signal: signal.Signals | None = None


def stopped(number: signal.Signals, position: int, saved: Path | None) -> Interrupted | Terminated:
    """Return what to raise when a signal has stopped a run at a data position."""
    where = "nothing was saved" if saved is None else f"saved in '{saved}'"
    text = f"stopped by {number.name} after batch {position}; {where}"
    return Interrupted(text) if number == signal.SIGINT else Terminated(text)


@contextlib.contextmanager
def stop_signals() -> Generator[Stop]:
    """Note SIGINT and SIGTERM instead of obeying them, until the block ends."""
    stop = Stop()
    taken: dict[signal.Signals, object] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is None:
            stop.signal = signal.Signals(number)
            return
        for item in taken:
            signal.signal(item, _DEFAULTS[item])
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default or signal.getsignal(number) == default:
                taken[number] = default
                signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in taken:
            signal.signal(number, _DEFAULTS[number])


@contextlib.contextmanager
def uninterrupted() -> Generator[None]:
    """Let signals that Python handles wait for the end of the block: Ctrl-C, a watchdog's SIGALRM, any other.

    A signal that Python does not handle still ends the process. Python runs handlers in the main thread only,
    so in another thread nothing needs to be done. Costs a few microseconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    installed = _functions.getsignal
    replaced: dict[int, Handler] = {n: handler for n in _SIGNALS if callable(handler := installed(n))}
    try:
        for number in replaced:
            _functions.signal(number, later)
        yield
    finally:
        error = _put_back(replaced)
        for number, frame in came:
            replaced[number](number, frame)
        if error is not None:
            raise error


def _put_back(handlers: Mapping[int, Handler]) -> BaseException | None:
    """Install all handlers, whatever one of them raises meanwhile; return that."""
    error: BaseException | None = None
    for number, handler in handlers.items():
        while _functions.getsignal(number) is not handler:
            try:
                _functions.signal(number, handler)
            except BaseException as e:
                error = error or e
    return error
