"""Where the arms of a benchmark run: the CPU, or a GPU by ONNX Runtime's CUDA provider."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.device.provider_options import CUDA

if TYPE_CHECKING:
    from kfac_onnx.device.providers import GivenProviders

__all__ = ["HOST", "Place", "place_of"]

_CPU: Final = "CPUExecutionProvider"


@dataclass(frozen=True)
class Place:
    """A provider with its options; `cuda_graph` captures the stages that can be."""

    provider: str = _CPU
    options: tuple[tuple[str, str], ...] = ()
    cuda_graph: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.provider == CUDA

    @property
    def index(self) -> int:
        """The number of the GPU."""
        return int(dict(self.options).get("device_id", "0"))

    @property
    def providers(self) -> GivenProviders:
        """The providers to open sessions with."""
        return [(self.provider, dict(self.options)) if self.options else self.provider]

    @property
    def target(self) -> str:
        """What graphs are lowered for."""
        return "cuda" if self.on_gpu else "cpu"

    @property
    def torch_device(self) -> str:
        """The same place by PyTorch's name."""
        return f"cuda:{self.index}" if self.on_gpu else "cpu"

    def free_bytes(self) -> float | None:
        """Return the memory of the GPU that is free; None on the CPU, and where nobody says."""
        return _free_bytes(self.index) if self.on_gpu else None

    def describe(self) -> dict[str, str]:
        """Return the GPU's name, memory and driver, as its own tool says; nothing on the CPU."""
        return _gpu(self.index) if self.on_gpu else {}


HOST: Final = Place()


def place_of(provider: str, options: dict[str, str], *, cuda_graph: bool) -> Place:
    """Return the place of a provider by its name, short or full."""
    from kfac_onnx.device.providers import SHORT_NAMES

    return Place(SHORT_NAMES.get(provider, provider), tuple(sorted(options.items())), cuda_graph)


def _free_bytes(index: int) -> float | None:
    """Ask the CUDA runtime that ONNX Runtime has loaded (`cudaMemGetInfo`)."""
    from kfac_onnx.runtime.feed.pinned import loaded_library

    path = loaded_library("libcudart")
    if path is None:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        library = ctypes.CDLL(path)
        if library.cudaSetDevice(index) != 0:
            return None
        status = int(library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    except (OSError, AttributeError):
        return None
    return float(free.value) if status == 0 else None


def _gpu(index: int) -> dict[str, str]:
    command = ("nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader")
    try:
        said = subprocess.run(  # noqa: S603  no word of it comes from the user
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    for line in said.splitlines():
        number, *fields = (field.strip() for field in line.split(","))
        if number == str(index) and len(fields) == 3:
            return {"gpu": fields[0], "gpu memory": fields[1], "driver": fields[2]}
    return {"gpu": "unknown: nvidia-smi does not answer"}
