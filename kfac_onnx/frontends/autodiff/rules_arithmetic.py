"""Gradients of elementwise arithmetic, with broadcasting.

dY is the gradient of the output; every gradient is summed back to its input's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.frontends.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


def identity(back: Backward) -> Gradients:
    """Identity(X): dY."""
    return [back.dy]


def add(back: Backward) -> Gradients:
    """Add(A, B): dA = dY, dB = dY."""
    return [back.reduce_to(back.dy, back.x(i)) if back.needs(i) else None for i in range(2)]


def sub(back: Backward) -> Gradients:
    """Sub(A, B): dA = dY, dB = −dY."""
    left = back.reduce_to(back.dy, back.x(0)) if back.needs(0) else None
    right = back.emit.op("Neg", back.reduce_to(back.dy, back.x(1))) if back.needs(1) else None
    return [left, right]


def mul(back: Backward) -> Gradients:
    """Mul(A, B): dA = dY B, dB = dY A."""

    def one(index: int) -> ir.Value | None:
        if not back.needs(index):
            return None
        return back.reduce_to(back.emit.op("Mul", back.dy, back.x(1 - index)), back.x(index))

    return [one(0), one(1)]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Identity": identity,
    "Add": add,
    "Sub": sub,
    "Mul": mul,
}
