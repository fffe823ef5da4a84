"""Which exceptions are onnxruntime's: the others pass through every `except` around a run.

A signal handler (a watchdog's, pytest-timeout's) raises wherever Python happens to be, often right after
onnxruntime returns. Taken for a failure of the run, its exception would be swallowed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["from_onnxruntime"]


def from_onnxruntime(error: BaseException) -> bool:
    """Say whether onnxruntime raised an error.

    Its own classes share no base. A run with bindings raises a plain RuntimeError, its Python part a
    ValueError; these are onnxruntime's where they left its files, or this package's (it calls compiled code).
    """
    kind = type(error)
    if kind.__module__.startswith("onnxruntime."):
        return True
    if kind not in (RuntimeError, ValueError):
        return False
    place = _place(error.__traceback__)
    theirs, ours = _folders()
    return place.is_relative_to(theirs) or (kind is RuntimeError and place.is_relative_to(ours))


def _place(trace: TracebackType | None) -> Path:
    """Return the file that an error was raised in."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return Path("" if trace is None else trace.tb_frame.f_code.co_filename)


@functools.cache
def _folders() -> tuple[Path, Path]:
    import onnxruntime

    return Path(str(onnxruntime.__file__)).parent, Path(__file__).parents[1]
