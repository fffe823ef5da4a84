"""Damping of the two factors.

`DampingRelative` (preset half and its relatives): a fixed share rho of a factor's mean eigenvalue.
`DampingPi` (preset r1.7): λ split between the factors by the ratio of their mean eigenvalues,
pi = sqrt((ΣA/V) / (tr G/D)), λ_A = sqrt(λ)·pi, λ_G = sqrt(λ)/pi.
Source: Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), section 6.3; docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import FLOAT  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import BOOL, F32, body, op

__all__ = ["damping_pi", "damping_relative", "factor_trace"]


@body
def factor_trace(G: FLOAT):
    """Return tr G, the sum of the eigenvalues; entries off the diagonal do not count, whatever they are."""
    diagonal = op.Cast(op.EyeLike(G), to=BOOL)
    return op.ReduceSum(op.Where(diagonal, G, op.Constant(value_float=0.0)), keepdims=0)


@body
def damping_relative(trace: FLOAT, rho: float, size: int):
    """Compute rho·max(trace/size, 1e-30); the trace is ΣA of V rows, or tr G of D columns."""
    mean = op.Div(trace, op.Cast(op.Constant(value_int=size), to=F32))
    return op.Mul(op.Constant(value_float=rho), op.Max(mean, op.Constant(value_float=1e-30)))


@body
def damping_pi(total_a: FLOAT, G: FLOAT, damping: float, vocab_size: int, pi: int):
    """damping_a = sqrt(λ)·pi, damping_g = sqrt(λ)/pi.

    The attribute `pi`: 0 takes pi = 1, 1 the ratio above, 2 the ratio, but 1 where a trace is 0.
    """
    one = op.Constant(value_float=1.0)
    root = op.Sqrt(op.Constant(value_float=damping))
    V = op.Cast(op.Constant(value_int=vocab_size), to=F32)
    trace = op.ReduceSum(
        op.Where(op.Cast(op.EyeLike(G), to=BOOL), G, op.Constant(value_float=0.0)), keepdims=0
    )
    D = op.Cast(op.Squeeze(op.Shape(G, start=0, end=1)), to=F32)
    ratio = op.Sqrt(op.Div(op.Div(total_a, V), op.Div(trace, D)))
    mode = op.Constant(value_int=pi)
    no_trace = op.Equal(op.Mul(total_a, trace), op.Constant(value_float=0.0))
    off = op.Equal(mode, op.Constant(value_int=0))
    guarded = op.And(op.Equal(mode, op.Constant(value_int=2)), no_trace)
    used = op.Where(op.Or(off, guarded), one, ratio)
    return op.Mul(root, used), op.Div(root, used)
