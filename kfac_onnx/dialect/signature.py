"""What an operator is: its ports, attributes, meaning and cost, as plain data.

Shapes are written with letters, `rows:f32[N,D]`: `V` vocabulary, `D` width, `N` lookups, `U` distinct
ids, `S` sampled rows, `L` matrices of `R` rows and `C` columns; `[]` is a scalar, `[V,...]` leaves the
further dimensions open, `[...]` all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Attribute", "Cost", "Operator", "Port", "Sizes", "Variant", "ports"]

Variant = Literal["safe", "sequential", "atomic", "ordered"]
"""Which scatter adds rows that may repeat: one right on every host, one for a one-thread CPU session
that writes in place, one for devices with atomic adds, one for devices where every run must give the same
bits: it sums in one order and adds nothing atomically."""


@dataclass(frozen=True)
class Port:
    """An input or output: its name, element type (`any` if free) and shape in letters."""

    name: str
    dtype: Literal["f32", "f64", "i32", "i64", "any"]
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    """A required attribute: its kind and the closed range [lo, hi] it must lie in."""

    name: str
    kind: Literal["float", "int"]
    lo: float
    hi: float
    open_lo: bool = False
    """Whether `lo` itself is excluded."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one use of an operator: vocabulary, width, lookups, Newton–Schulz iterations."""

    V: int
    D: int
    N: int
    iterations: int = 15


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved by one run."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Operator:
    """One operator of `ai.kfac` version 1.

    `bodies` names, for each variant, the module and function under `dialect.bodies` that define it.
    """

    name: str
    meaning: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    bodies: dict[Variant, tuple[str, str]]
    cost: Callable[[Sizes], Cost]


def ports(text: str) -> tuple[Port, ...]:
    """Read `"ids:i64[N] rows:f32[N,D]"` into ports."""
    read: list[Port] = []
    for word in text.split():
        name, _, kind = word.partition(":")
        dtype, _, shape = kind.partition("[")
        letters = tuple(letter for letter in shape.removesuffix("]").split(",") if letter)
        match dtype:
            case "f32" | "f64" | "i32" | "i64" | "any":
                read.append(Port(name, dtype, letters))
            case _:
                raise ValueError(f"unknown element type '{dtype}' in '{word}'")
    return tuple(read)
