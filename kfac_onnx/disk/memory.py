"""Sizes that a file declares, held against the machine: nothing is allocated on a stranger's word alone."""

from __future__ import annotations

import os
from typing import Final

from kfac_onnx.errors import UserError

__all__ = ["machine_memory", "require_memory"]

_UNKNOWN: Final = 1 << 62


def machine_memory() -> int:
    """Return the bytes that the machine has, or that `ulimit -v` leaves; 2^62 where nobody tells."""
    try:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        held = _UNKNOWN
    try:
        import resource
    except ImportError:  # not on Windows
        return held
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return held if limit == resource.RLIM_INFINITY else min(held, limit)


def require_memory(needed: int, what: str) -> None:
    """Raise UserError where `what` needs more bytes than the machine has."""
    held = machine_memory()
    if needed > held:
        raise UserError(f"{what} needs {needed:,} bytes of memory, and this machine has {held:,}")
