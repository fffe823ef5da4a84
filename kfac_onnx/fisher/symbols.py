"""Symbolic tensors of the block's interface: what a caller feeds, and what an update or a product is.

A symbolic tensor is an `ir.Value`: an input that is fed under its name (`placeholder`), or what nodes make of
such inputs and of the states of a `LayerCollection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Array", "SparseRows", "StoredPower", "Update", "placeholder"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SparseRows:
    """Rows of a [V, D] tensor: indices int[N] (may repeat), values float[N, D], dense_shape (V, D)."""

    indices: ir.Value
    values: ir.Value
    dense_shape: tuple[int, int]


@dataclass(frozen=True)
class StoredPower:
    """A stored power of a factor, recomputed at an inverse update.

    `candidate` is the graph's own result and `residual` its error; where there is no candidate, or the
    residual is above `tolerance`, the host takes (max(w, 0) + damping)^exponent of the factor's
    eigenvalues w in float64. `path` names the graph's way of computing it.
    """

    state: ir.Value
    exponent: float
    factor: ir.Value
    damping: ir.Value
    candidate: ir.Value | None
    residual: ir.Value | None
    tolerance: float
    path: str


@dataclass(frozen=True)
class Update:
    """What one covariance or inverse update assigns to states, all from their values before it."""

    assignments: tuple[tuple[ir.Value, ir.Value], ...] = ()
    powers: tuple[StoredPower, ...] = ()


def placeholder(name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
    """Return a symbolic tensor that is fed under its name; a dimension is a size, a name or unknown."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
