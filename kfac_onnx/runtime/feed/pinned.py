"""Page-locked host memory, from which a copy to a GPU runs at the full rate of the bus.

ONNX Runtime's Python interface (1.32; before) makes none for the CUDA provider that it brings along, so it is
taken from the CUDA runtime that the provider has loaded: `cudaHostAlloc` and `cudaFreeHost` of the CUDA
Runtime API, section "Memory Management". Where that library is not found, or refuses, arrays lie in ordinary
memory: everything works, copies are slower, and `Pinned.problem` says why.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

__all__ = ["Pinned", "loaded_library"]

_PORTABLE: Final = 1
"""cudaHostAllocPortable: pinned for every device."""


def loaded_library(stem: str) -> str | None:
    """Return the path of a shared library that this process has loaded, or None (also off Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count("/") and len(line.split()) > 5)
    return next((path for path in paths if Path(path).name.startswith(f"{stem}.so")), None)


class Pinned:
    """Makes arrays in page-locked memory, for a device's number; each is freed with its last reference.

    `problem` says why they are not page-locked, in words; None while they are.
    """

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self.problem: str | None = None
        self._library: ctypes.CDLL | None = None
        path = loaded_library("libcudart")
        if path is None:
            self.problem = "the CUDA runtime library is not loaded"
            return
        try:
            self._library = ctypes.CDLL(path)
            self._library.cudaHostAlloc.argtypes = [
                ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint,
            ]  # fmt: skip
            self._library.cudaFreeHost.argtypes = [ctypes.c_void_p]
        except (OSError, AttributeError) as e:
            self._library, self.problem = None, f"the CUDA runtime library cannot be used: {e}"

    def array(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """Return an array whose entries are whatever was in memory."""
        plain = np.empty(tuple(shape), dtype)
        if self._library is None or plain.nbytes == 0:
            return plain
        place = ctypes.c_void_p()
        status = int(self._library.cudaSetDevice(self._index))  # else it would be in use besides
        if status == 0:
            status = int(self._library.cudaHostAlloc(ctypes.byref(place), plain.nbytes, _PORTABLE))
        if status != 0 or place.value is None:
            self.problem = f"cudaHostAlloc of {plain.nbytes} bytes gave CUDA error {status}"
            self._library = None
            return plain
        memory = (ctypes.c_uint8 * plain.nbytes).from_address(place.value)
        # The array's base keeps `memory` alive, and with it the allocation.
        weakref.finalize(memory, self._library.cudaFreeHost, place).atexit = False
        return np.frombuffer(memoryview(memory), plain.dtype).reshape(plain.shape)
