"""The direction of an output table's rows: momentum of the preconditioned gradient over the root of a window.

With z = g·P, the gradient times the inverse root of the activations' second moment, and step t = 1, 2, ...:

    M' = β·M + (1−β)·z          b = 1 − t^−power
    r' = b·r + (1−b)·mean_j z²   update = (M'/(1−β^t)) / (sqrt(r') + 1e-12)

M is kept after the product with P, so that a step needs one product; a refresh of P leaves the momentum as
it was. Source: the embedding block's mirror image (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671,
with a full input factor and a diagonal output factor); docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, F64, body, op

__all__ = ["output_row_scale"]


@body
def output_row_scale(z: FLOAT, M: FLOAT, r: FLOAT, t: INT64, beta: float, power: float):
    """Return update, M' and r'; t counts from 1."""
    one = op.Cast(op.Constant(value_float=1.0), to=F64)
    t64 = op.Cast(t, to=F64)
    beta64 = op.Cast(op.Constant(value_float=beta), to=F64)
    fresh64 = op.Pow(t64, op.Neg(op.Cast(op.Constant(value_float=power), to=F64)))
    fresh = op.Cast(fresh64, to=F32)
    retain = op.Cast(op.Sub(one, fresh64), to=F32)
    last = op.Constant(value_ints=[-1])
    squares = op.ReduceMean(op.Mul(z, z), last, keepdims=0)
    new_r = op.Add(op.Mul(retain, r), op.Mul(fresh, squares))
    new_M = op.Add(op.Mul(op.Constant(value_float=beta), M), op.Mul(op.Cast(op.Sub(one, beta64), to=F32), z))
    debias = op.Cast(op.Sub(one, op.Pow(beta64, t64)), to=F32)
    size = op.Mul(debias, op.Add(op.Sqrt(new_r), op.Constant(value_float=1e-12)))
    return op.Div(new_M, op.Unsqueeze(size, last)), new_M, new_r
