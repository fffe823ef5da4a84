"""Sizes that a file declares, held against the machine: nothing is allocated on a stranger's word alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np

__all__ = ["array_problem", "available_memory", "machine_memory", "require_memory"]

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


def array_problem(shape: tuple[Any, ...], dtype: np.dtype[Any]) -> str | None:
    """Return why NumPy can hold no array of a shape, in words; None where it can.

    Also an array without entries has limits: of its rank, and of the product of its other dimensions.
    """
    import numpy as np

    if any(type(dim) is not int for dim in shape):  # bool is an int, and no dimension
        return "a dimension is no whole number"
    if any(dim < 0 for dim in shape):
        return "it has a negative dimension"
    try:
        np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory, and has the limits of `np.empty`
    except (ValueError, TypeError, OverflowError) as e:
        return first_line(e)
    return None


def available_memory() -> int:
    """Return the bytes that programs may take now, the page cache included; all where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        held = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return machine_memory()
    return min(held, machine_memory())
