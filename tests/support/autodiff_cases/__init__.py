"""Cases for the gradient rules: a piece of a graph in ONNX text, and the same in PyTorch.

A case's table is a module of this package with a list `CASES`; `tests/data/autodiff/make.py` writes
PyTorch's gradients for each table to `<module>.npz`, and `tests/frontends/autodiff/test_rules.py` compares.
"""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DATA", "Case", "Draw", "floats", "integers", "positive", "tables"]

DATA = Path(__file__).parent.parent.parent / "data" / "autodiff"


@dataclass(frozen=True)
class Draw:
    """A random array: normal numbers times `scale` plus `shift` (absolute value first if `positive`)."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    scale: float = 1.0
    shift: float = 0.0
    positive: bool = False
    high: int | None = None
    low: int = 0

    def array(self, seed: str) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(seed.encode()))
        if self.high is not None:
            return rng.integers(self.low, self.high, self.shape).astype(self.dtype)
        values = rng.standard_normal(self.shape)
        values = np.abs(values) if self.positive else values
        return np.asarray(values * self.scale + self.shift).astype(self.dtype)


def floats(*shape: int, **settings: Any) -> Draw:
    """Normal float32 numbers."""
    return Draw(shape, **settings)


def positive(*shape: int, **settings: Any) -> Draw:
    """Float32 numbers of at least 0.5."""
    return Draw(shape, positive=True, shift=0.5, **settings)


def integers(*shape: int, high: int, low: int = 0, dtype: str = "int64") -> Draw:
    """Integers in [low, high)."""
    return Draw(shape, dtype, high=high, low=low)


@dataclass(frozen=True)
class Case:
    """One case.

    `nodes` are lines of ONNX text over the names of `inputs` and `constants`, which leave `outputs`. `torch`
    is a Python expression over the same names (with `torch`, `F`, `np` known, and `reference` beside `make`
    as `R`) for the output, or a tuple for several. Every floating-point input is differentiated except `frozen`. `static` inputs keep their shape
    in the run with symbolic shapes.
    """

    name: str
    nodes: str
    torch: str
    inputs: dict[str, Draw | np.ndarray]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("z",)
    frozen: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    symbolic: bool = True
    opset: int = 18
    tolerance: float | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the inputs; the same ones at every call."""
        return {
            name: value.array(f"{self.name}/{name}") if isinstance(value, Draw) else value
            for name, value in self.inputs.items()
        }


def tables() -> dict[str, list[Case]]:
    """Return the case tables by module name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in names}
