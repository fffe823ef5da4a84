"""Ways to a power of a damped factor, M = G + damping·I: in the graph where there is one, or on the host.

| power            | way                                                                    |
|------------------|------------------------------------------------------------------------|
| −1/2             | `InverseRoot`: coupled Newton–Schulz, products of matrices only         |
| −1               | `Inverse`: an LU inverse and one Newton step in float64                 |
| 1/2, ±2, ..., ±8 | `Product` of M with one of the two above, or with itself                |
| any other        | `HostEigh`: float64 eigenvalues on the host, at each refresh            |

Each leaves the power and a residual; where the residual is above `tolerance`, a host's eigenvalues take over.
Newton–Schulz divides by the trace, so the smallest eigenvalue is at least 1/condition, and while it is small
an iteration multiplies it by 2.25: ceil(ln(condition)/ln 2.25) + 5 iterations reach float32's accuracy.
Source: Higham, Functions of Matrices (2008, https://doi.org/10.1137/1.9780898717778), section 6.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from kfac_onnx.graph.emit import Out
from kfac_onnx.step.draft import FLOAT

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter

__all__ = ["HostEigh", "Inverse", "InverseRoot", "Product", "RootMethod", "any_root", "step_root"]

LARGEST_CHAIN: Final = 8
"""Integer powers up to this size are products in the graph; beyond, the host's eigenvalues."""

_DOMAIN: Final = "ai.kfac"
_FLOAT32_CONDITION: Final = 1e7
"""What float32 can hold; assumed where the damping does not bound the condition."""


class RootMethod(Protocol):
    """A way to M^exponent: what it is called, and the residual above which a host takes over."""

    @property
    def exponent(self) -> float:
        """The power."""
        ...

    @property
    def tolerance(self) -> float:
        """The residual above which the host's eigenvalues take over."""
        ...

    @property
    def path(self) -> str:
        """What reports call the way."""
        ...

    def emit(
        self, emit: Emitter, factor: ir.Value, damping: ir.Value, previous: ir.Value
    ) -> tuple[ir.Value, ir.Value] | None:
        """Emit the power float32[D, D] and its residual; None where only a host can make it.

        A factor whose trace is 0 (no gradient ever) keeps `previous`, with residual 0.
        """
        ...


def _outs(factor: ir.Value) -> list[Out]:
    return [Out("root", FLOAT, factor.shape), Out("residual", FLOAT, [])]


@dataclass(frozen=True)
class Inverse:
    """M⁻¹; its float64 residual of 1e-6 stands for a relative error of 1e-3 before the Newton step."""

    tolerance: float = 1e-6
    exponent: float = -1.0
    path: str = "onnx/inverse"

    def emit(
        self, emit: Emitter, factor: ir.Value, damping: ir.Value, previous: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Emit the inverse and its residual."""
        inputs = [factor, damping, previous]
        inverse, residual = emit.node("FactorInverse", inputs, domain=_DOMAIN, outputs=_outs(factor))
        return inverse, residual


@dataclass(frozen=True)
class InverseRoot:
    """M^(−1/2)."""

    iterations: int
    tolerance: float
    exponent: float = -0.5
    path: str = "onnx/newton-schulz"

    @classmethod
    def of(cls, dim: int, condition: float | None) -> InverseRoot:
        """Return the way for a factor [dim, dim] whose condition is bounded, or not (None).

        The tolerance is rounding, 2·eps·condition, or 1e-3 where the condition is not bounded, and never more
        than 0.05: with a tiny damping the iteration need not converge at all.
        """
        bound = _FLOAT32_CONDITION if condition is None else condition
        iterations = math.ceil(math.log(bound) / math.log(2.25)) + 5
        rounding = 2.0 * float(np.finfo(np.float32).eps) * bound
        return cls(iterations, 1e-3 if condition is None else min(rounding, 0.05))

    def emit(
        self, emit: Emitter, factor: ir.Value, damping: ir.Value, previous: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Emit the root and its residual."""
        root, residual = emit.node(
            "FactorInverseRoot",
            [factor, damping, previous],
            domain=_DOMAIN,
            attributes={"iterations": self.iterations},
            outputs=_outs(factor),
        )
        return root, residual


@dataclass(frozen=True)
class Product:
    """A power as a product: M^start, from `first` (M itself if None), times `factor`^times more.

    `damped` says whether the further factors are M (otherwise the result of `first`).
    """

    exponent: float
    first: Inverse | InverseRoot | None
    times: int
    damped: bool
    tolerance: float

    @property
    def path(self) -> str:
        """What reports call the way."""
        return "onnx/matmul" if self.first is None else self.first.path

    def emit(
        self, emit: Emitter, factor: ir.Value, damping: ir.Value, previous: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Emit the product and the residual of its first factor."""
        eye = emit.node("EyeLike", [factor], dtype=FLOAT, shape=factor.shape)
        added = emit.node("Mul", [damping, eye], dtype=FLOAT, shape=factor.shape)
        M = emit.node("Add", [factor, added], dtype=FLOAT, shape=factor.shape)
        residual = emit.constant(np.float32(0.0), "no_residual")
        product = M
        if self.exponent == 0:
            return eye, residual
        if self.first is not None:
            product, residual = self.first.emit(emit, factor, damping, previous)
        further = M if self.damped else product
        for _ in range(self.times):
            product = emit.node("MatMul", [product, further], name="power", dtype=FLOAT, shape=factor.shape)
        return product, residual


@dataclass(frozen=True)
class HostEigh:
    """Q (max(w, 0) + damping)^exponent Qᵀ of the factor's eigenvalues w, in float64 on the host."""

    exponent: float
    tolerance: float = 0.0
    path: str = "host-eigh"

    def emit(self, emit: Emitter, factor: ir.Value, damping: ir.Value, previous: ir.Value) -> None:
        """Emit nothing."""


def step_root(exponent: float, dim: int, condition: float | None) -> Inverse | InverseRoot:
    """Return the way to a power inside a training step, which any host must be able to run: −1 or −1/2."""
    return Inverse() if exponent == -1.0 else InverseRoot.of(dim, condition)


def any_root(exponent: float, *, iterations: int, tolerance: float) -> RootMethod:
    """Return the way to any power of a block that a `FisherSession` holds."""
    inverse, root = Inverse(tolerance), InverseRoot(iterations, tolerance)
    if exponent == -0.5:
        return root
    if exponent == 0.5:
        return Product(exponent, root, 1, damped=True, tolerance=tolerance)
    if not exponent.is_integer() or abs(exponent) > LARGEST_CHAIN:
        return HostEigh(exponent)
    if exponent == -1.0:
        return inverse
    first = inverse if exponent < 0 else None
    return Product(exponent, first, max(int(abs(exponent)) - 1, 0), damped=False, tolerance=tolerance)
