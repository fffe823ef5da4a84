"""Page-locked memory: taken from the CUDA runtime that is loaded, freed with its last array, or plainly not."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Any

import numpy as np

from kfac_onnx.runtime.feed import pinned
from kfac_onnx.runtime.feed.pinned import Pinned, loaded_library

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Runtime:
    """Stands for libcudart, with the system's own memory."""

    def __init__(self, patch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.status = status
        self.held: dict[int, Any] = {}
        self.freed: list[int] = []
        self.chosen: list[int] = []
        patch.setattr(pinned, "loaded_library", lambda stem: f"/lib/{stem}.so.13")
        patch.setattr(ctypes, "CDLL", self.opened)

    def opened(self, path: str) -> Any:
        assert path == "/lib/libcudart.so.13"

        class Library:
            pass

        library: Any = Library()
        library.cudaHostAlloc = self.function(self.allocate)
        library.cudaFreeHost = self.function(self.free)
        library.cudaSetDevice = self.function(self.chosen.append)
        return library

    def function(self, call: Any) -> Any:
        class Function:
            argtypes: Any = None

            def __call__(self, *given: Any) -> int:
                return int(call(*given) or 0)

        return Function()

    def allocate(self, place: Any, size: int, flags: int) -> int:
        assert flags == 1
        if self.status:
            return self.status
        memory = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(memory)
        self.held[address] = memory
        place._obj.value = address
        return 0

    def free(self, place: ctypes.c_void_p) -> int:
        assert place.value is not None
        self.freed.append(place.value)
        del self.held[place.value]
        return 0


def test_the_device_is_the_sessions_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    Pinned(3).array((2,), np.float32)
    assert runtime.chosen == [3]


def test_arrays_lie_where_the_runtime_says(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    memory = Pinned()
    array = memory.array((3, 5), np.float32)
    assert memory.problem is None
    assert (array.shape, array.dtype, array.flags.writeable) == ((3, 5), np.float32, True)
    assert array.ctypes.data in runtime.held
    array[...] = 7.0
    np.testing.assert_array_equal(array, np.full((3, 5), 7.0))


def test_memory_is_freed_with_its_last_array(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    array = Pinned().array((8,), np.int64)
    address, part = array.ctypes.data, array[2:4]
    del array
    gc.collect()
    assert runtime.freed == [], "a view still reads it"
    part[...] = 1
    del part
    gc.collect()
    assert runtime.freed == [address]


def test_what_is_refused_comes_from_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime(monkeypatch, status=2)
    memory = Pinned()
    array = memory.array((4,), np.float32)
    array[...] = 1.0
    assert memory.problem == "cudaHostAlloc of 16 bytes gave CUDA error 2"
    assert memory.array((4,), np.float32).shape == (4,)


def test_nothing_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    assert Pinned().array((0, 3), np.float32).shape == (0, 3)
    assert runtime.held == {}


def test_without_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "loaded_library", lambda stem: None)
    memory = Pinned()
    assert memory.problem == "the CUDA runtime library is not loaded"
    assert memory.array((2,), bool).shape == (2,)


def test_with_a_library_that_lacks_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "loaded_library", lambda stem: None if stem != "libcudart" else "libc.so.6")
    assert str(Pinned().problem).startswith("the CUDA runtime library cannot be used: ")


def test_a_loaded_library_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = loaded_library("libc")
    assert found is not None
    assert ctypes.CDLL(found).getpid() > 0
    assert loaded_library("libnothing") is None
    monkeypatch.setattr(pinned.sys, "platform", "win32")
    assert loaded_library("libc") is None
