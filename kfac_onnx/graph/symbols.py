"""Symbolic tensors: values of a graph under construction, and what a session holds between runs.

A symbolic tensor is an `ir.Value`. Expressions are built from nodes that belong to no graph yet; a session
copies the ancestors of what it is asked for into a model of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kfac_onnx.dialect import DOMAIN, OPERATORS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "HostPower",
    "SparseRows",
    "Update",
    "Variable",
    "apply",
    "call",
    "constant",
    "ints",
    "placeholder",
    "variable",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SparseRows:
    """Rows of a [V, D] tensor: indices int[N] (may repeat), values float[N, D], dense_shape (V, D)."""

    indices: ir.Value
    values: ir.Value
    dense_shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Variable:
    """A tensor that a session keeps: its name, the value that reads it, and what it starts from."""

    name: str
    value: ir.Value
    initial: Array


@dataclass(frozen=True)
class HostPower:
    """A stored power of a factor, recomputed at an inverse update.

    `candidate` is the graph's own result and `residual` its error; where there is no candidate, or the
    residual is above `tolerance`, the host takes (max(w, 0) + damping)^exponent of the factor's
    eigenvalues w in float64. `path` names the graph's way of computing it.
    """

    variable: Variable
    exponent: float
    factor: ir.Value
    damping: ir.Value
    candidate: ir.Value | None
    residual: ir.Value | None
    tolerance: float
    path: str


@dataclass(frozen=True)
class Update:
    """What one covariance or inverse update assigns, all from the state before it."""

    assignments: tuple[tuple[Variable, ir.Value], ...] = ()
    powers: tuple[HostPower, ...] = ()


def placeholder(name: str, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
    """Return a symbolic tensor that is fed under its name; a dimension is a size, a name or unknown."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def variable(name: str, initial: Array) -> Variable:
    """Return a variable of the initial value's type and shape."""
    dtype = ir.DataType.from_numpy(initial.dtype)
    return Variable(name, placeholder(name, dtype, initial.shape), initial)


def constant(array: Array | float, dtype: npt.DTypeLike = np.float32) -> ir.Value:
    """Return a constant; a number becomes a scalar of `dtype`."""
    return call("Constant", value=ir.tensor(np.asarray(array, dtype=dtype)))


def ints(*numbers: int) -> ir.Value:
    """Return a constant int64 vector, for shapes and axes."""
    return constant(np.array(numbers), np.int64)


def call(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """Return the output of a new standard node."""
    return ir.node(op_type, inputs, attributes=attributes).outputs[0]


def apply(op_type: str, *inputs: ir.Value, **attributes: Any) -> Sequence[ir.Value]:
    """Return the outputs of a new `ai.kfac` node."""
    outputs = len(OPERATORS[op_type].outputs)
    return ir.node(op_type, inputs, attributes=attributes, domain=DOMAIN, num_outputs=outputs).outputs
