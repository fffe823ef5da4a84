"""Momentum of a layer's preconditioned gradient z, without the bias of its start at 0.

    M' = β·M + (1−β)·z        update = M'/(1 − β^t)        t = 1, 2, ... counts steps

The momentum is that of the direction, so a refresh of the factors' powers leaves it as it was. Source:
Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), section 7 (momentum); docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, F64, body, op

__all__ = ["layer_momentum"]


@body
def layer_momentum(z: FLOAT, M: FLOAT, t: INT64, beta: float):
    """Return update and M'; t counts from 1."""
    one = op.Cast(op.Constant(value_float=1.0), to=F64)
    beta64 = op.Cast(op.Constant(value_float=beta), to=F64)
    fresh = op.Cast(op.Sub(one, beta64), to=F32)
    new_M = op.Add(op.Mul(op.Constant(value_float=beta), M), op.Mul(fresh, z))
    debias = op.Cast(op.Sub(one, op.Pow(beta64, op.Cast(t, to=F64))), to=F32)
    return op.Div(new_M, debias), new_M
