"""What the machine is, for the reader of a result: no names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_onnx.bench.place import HOST

if TYPE_CHECKING:
    from kfac_onnx.bench.place import Place

__all__ = ["busy", "describe"]

_PACKAGES = ("kfac-onnx", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "torch")


def describe(*, torch: bool, place: Place = HOST) -> dict[str, str]:
    """Return processor, cores, memory, GPU, system, and versions of what is measured."""
    facts = {**place.describe(), "cpu": _cpu(), "cores": str(os.cpu_count()), "memory": _memory()}
    facts["system"] = f"{platform.system()} {platform.release()}"
    facts["python"] = platform.python_version()
    for name in _PACKAGES:
        if name == "torch" and not torch:
            continue
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return facts


def busy() -> float | None:
    """Return how many processes wanted to run lately beyond the cores there are; None where nobody counts."""
    if not hasattr(os, "getloadavg"):
        return None
    return max(0.0, os.getloadavg()[0] - (os.cpu_count() or 1))


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{pages / 1e9:.0f} GB"
