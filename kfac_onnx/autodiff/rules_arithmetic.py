"""Gradients of elementwise arithmetic, with broadcasting.

X (or A, B) are the inputs, Y the output, dY its gradient; every gradient is summed back to its input's shape.
Where a function has a kink, the derivative is the one that PyTorch takes there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.graph.values import constant

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


def unary(formula: Callable[[Backward], ir.Value]) -> Rule:
    """Make a rule of a formula for the gradient of the only differentiable input."""

    def rule(back: Backward) -> Gradients:
        return [formula(back)]

    rule.__doc__ = formula.__doc__
    return rule


def each(formula: Callable[[Backward, int], ir.Value]) -> Rule:
    """Make a rule of a formula for input i that gives a gradient of the output's shape."""

    def rule(back: Backward) -> Gradients:
        return [
            back.reduce_to(formula(back, index), back.x(index)) if back.needs(index) else None
            for index in range(len(back.node.inputs))
        ]

    rule.__doc__ = formula.__doc__
    return rule


def identity(back: Backward) -> ir.Value:
    """Identity(X): dY."""
    return back.dy


def add(back: Backward, _: int) -> ir.Value:
    """Add(A, B), Sum(A, B, ..): dA = dB = dY."""
    return back.dy


def sub(back: Backward, index: int) -> ir.Value:
    """Sub(A, B): dA = dY, dB = −dY."""
    return back.emit.op("Neg", back.dy) if index else back.dy


def mul(back: Backward, index: int) -> ir.Value:
    """Mul(A, B): dA = dY B, dB = dY A."""
    return back.emit.op("Mul", back.dy, back.x(1 - index))


def div(back: Backward, index: int) -> ir.Value:
    """Div(A, B): dA = dY / B, dB = −dY Y / B."""
    emit = back.emit
    if index == 0:
        return emit.op("Div", back.dy, back.x(1))
    return emit.op("Neg", emit.op("Div", emit.op("Mul", back.dy, back.y()), back.x(1)))


def mean(back: Backward, _: int) -> ir.Value:
    """Mean of n inputs: dY / n."""
    return back.emit.op("Div", back.dy, back.number(float(len(back.node.inputs))))


def power(back: Backward) -> Gradients:
    """Pow(X, E): dX = dY E X^(E−1), 0 where E = 0; dE = dY Y ln X, 0 where X = 0 ≤ E."""
    emit, x, exponent = back.emit, back.x(0), back.x(1)
    work = back.dtype(x)
    e = emit.cast(exponent, work, back.dtype(exponent))
    known = constant(exponent)
    dx = de = None
    zero = back.number(0.0, x)
    if back.needs(0):
        if known is not None and known.size == 1:
            slope = _constant_power(back, x, float(known.astype(np.float64).reshape(())))
        else:
            less = emit.op("Sub", e, back.number(1.0, x))
            raised = emit.op("Mul", e, emit.op("Pow", x, less))
            slope = emit.op("Where", emit.op("Equal", e, zero), zero, raised)
        dx = back.dy if slope is None else emit.op("Mul", back.dy, slope)
        dx = back.reduce_to(dx, x, back.y())
    if back.needs(1):
        at_zero = emit.op("And", emit.op("Equal", x, zero), emit.op("GreaterOrEqual", e, zero))
        slope = emit.op("Mul", back.y(), emit.op("Log", x))
        slope = emit.op("Mul", back.dy, emit.op("Where", at_zero, zero, slope))
        de = emit.cast(back.reduce_to(slope, exponent), back.dtype(exponent), work)
    return [dx, de]


def _constant_power(back: Backward, x: ir.Value, exponent: float) -> ir.Value | None:
    """Return the derivative of X^exponent, None for 1."""
    emit = back.emit
    if exponent == 1.0:
        return None
    if exponent == 0.0:
        return back.number(0.0, x)
    if exponent == 2.0:
        return emit.op("Mul", x, back.number(2.0, x))
    raised = emit.op("Pow", x, back.number(exponent - 1.0, x))
    return emit.op("Mul", raised, back.number(exponent, x))


def negative(back: Backward) -> ir.Value:
    """Neg(X): −dY."""
    return back.emit.op("Neg", back.dy)


def absolute(back: Backward) -> ir.Value:
    """Abs(X): dY sign(X), 0 at 0."""
    return back.emit.op("Mul", back.dy, back.emit.op("Sign", back.x()))


def square_root(back: Backward) -> ir.Value:
    """Sqrt(X): dY / (2 Y)."""
    return back.emit.op("Div", back.dy, back.emit.op("Add", back.y(), back.y()))


def reciprocal(back: Backward) -> ir.Value:
    """Reciprocal(X): −dY Y²."""
    emit = back.emit
    return emit.op("Neg", emit.op("Mul", back.dy, emit.op("Mul", back.y(), back.y())))


def exponential(back: Backward) -> ir.Value:
    """Exp(X): dY Y."""
    return back.emit.op("Mul", back.dy, back.y())


def logarithm(back: Backward) -> ir.Value:
    """Log(X): dY / X."""
    return back.emit.op("Div", back.dy, back.x())


def sine(back: Backward) -> ir.Value:
    """Sin(X): dY cos X."""
    return back.emit.op("Mul", back.dy, back.emit.op("Cos", back.x()))


def cosine(back: Backward) -> ir.Value:
    """Cos(X): −dY sin X."""
    return back.emit.op("Neg", back.emit.op("Mul", back.dy, back.emit.op("Sin", back.x())))


def tangent(back: Backward) -> ir.Value:
    """Tan(X): dY (1 + Y²)."""
    emit = back.emit
    return emit.op("Mul", back.dy, emit.op("Add", emit.op("Mul", back.y(), back.y()), back.number(1.0)))


def extreme(back: Backward) -> Gradients:
    """Max(..), Min(..): dY to the input that is the output, in equal parts where several are."""
    emit = back.emit
    if len(back.node.inputs) == 1:
        return [back.dy]
    dtype = back.dtype(back.y())
    hits = [emit.cast(emit.op("Equal", back.x(i), back.y()), dtype) for i in range(len(back.node.inputs))]
    count = hits[0]
    for hit in hits[1:]:
        count = emit.op("Add", count, hit)
    part = emit.op("Div", back.dy, count)
    return [
        back.reduce_to(emit.op("Mul", part, hit), back.x(i), back.y()) if back.needs(i) else None
        for i, hit in enumerate(hits)
    ]


def where(back: Backward) -> Gradients:
    """Where(c, A, B): dA = dY where c, else 0; dB = dY where not c, else 0."""
    emit, zero = back.emit, back.number(0.0)
    condition = back.x(0)
    da = emit.op("Where", condition, back.dy, zero) if back.needs(1) else None
    db = emit.op("Where", condition, zero, back.dy) if back.needs(2) else None
    return [
        None,
        None if da is None else back.reduce_to(da, back.x(1)),
        None if db is None else back.reduce_to(db, back.x(2)),
    ]


def clip(back: Backward) -> Gradients:
    """Clip(X, low, high): dY where low ≤ X ≤ high, else 0.

    dlow = Σ dY where X < low ≤ high, dhigh = Σ dY where X > high or low > high.
    """
    emit, x, low, high = back.emit, back.x(), back.input(1), back.input(2)
    zero = back.number(0.0)
    inside = None
    if low is not None:
        inside = emit.op("GreaterOrEqual", x, low)
    if high is not None:
        below = emit.op("LessOrEqual", x, high)
        inside = below if inside is None else emit.op("And", inside, below)
    results: list[ir.Value | None] = [None, None, None]
    if back.needs(0):
        results[0] = back.dy if inside is None else emit.op("Where", inside, back.dy, zero)
    if low is not None and back.needs(1):
        outside = emit.op("Less", x, low)
        if high is not None:
            outside = emit.op("And", outside, emit.op("LessOrEqual", low, high))
        results[1] = back.reduce_to(emit.op("Where", outside, back.dy, zero), low, back.y())
    if high is not None and back.needs(2):
        outside = emit.op("Greater", x, high)
        if low is not None:
            outside = emit.op("Or", outside, emit.op("Greater", low, high))
        results[2] = back.reduce_to(emit.op("Where", outside, back.dy, zero), high, back.y())
    return results


def cast(back: Backward) -> ir.Value:
    """Cast(X), CastLike(X, ..): dY in the type of X."""
    return back.emit.cast(back.dy, back.dtype(back.x()), back.dtype(back.dy))


def modulo(back: Backward) -> Gradients:
    """Mod(A, B; fmod=1) = A − B trunc(A / B): dA = dY, dB = −dY trunc(A / B)."""
    emit, a, b = back.emit, back.x(0), back.x(1)
    da = back.reduce_to(back.dy, a) if back.needs(0) else None
    db = None
    if back.needs(1):
        quotient = emit.op("Div", a, b)
        whole = emit.op("Mul", emit.op("Sign", quotient), emit.op("Floor", emit.op("Abs", quotient)))
        db = back.reduce_to(emit.op("Neg", emit.op("Mul", back.dy, whole)), b)
    return [da, db]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Abs": unary(absolute),
    "Add": each(add),
    "Bernoulli": no_gradient,
    "Cast": unary(cast),
    "CastLike": unary(cast),
    "Ceil": no_gradient,
    "Clip": clip,
    "Cos": unary(cosine),
    "Div": each(div),
    "Exp": unary(exponential),
    "Floor": no_gradient,
    "Identity": unary(identity),
    "Log": unary(logarithm),
    "Max": extreme,
    "Mean": each(mean),
    "Min": extreme,
    "Mod": modulo,
    "Mul": each(mul),
    "Neg": unary(negative),
    "Pow": power,
    "RandomNormalLike": no_gradient,
    "RandomUniformLike": no_gradient,
    "Reciprocal": unary(reciprocal),
    "Round": no_gradient,
    "Sign": no_gradient,
    "Sin": unary(sine),
    "Sqrt": unary(square_root),
    "Sub": each(sub),
    "Sum": each(add),
    "Tan": unary(tangent),
    "Where": where,
}
