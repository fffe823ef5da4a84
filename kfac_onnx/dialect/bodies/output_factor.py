"""The output factor G: the second moment of dL/d(row) over lookups, averaged over steps.

    G_new = scale · sym(rowsᵀ rows) / lookups        sym(M) = (M + Mᵀ)/2
    G     ← decay·G + (1−decay)·G_new                Ĝ = G / (1 − decay^count)

Source: Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), section 5; docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import BOOL, F32, F64, I64, body, op

__all__ = ["factor_debias", "output_factor_update"]


@body
def output_factor_update(G: FLOAT, count: INT64, rows: FLOAT, lookups: FLOAT, scale: FLOAT, decay: float):
    """Take one batch of gradient rows into G; with no lookup, G and count stay."""
    rho = op.Cast(op.Constant(value_float=decay), to=F64)
    fresh = op.Sub(op.Cast(op.Constant(value_float=1.0), to=F64), rho)
    half_fresh = op.Mul(fresh, op.Cast(op.Constant(value_float=0.5), to=F64))
    any_lookup = op.Greater(lookups, op.Constant(value_float=0.0))
    product = op.MatMul(op.Transpose(rows, perm=[1, 0]), rows)
    taken = op.Mul(op.Cast(half_fresh, to=F32), op.Div(scale, lookups))
    batch = op.Mul(taken, op.Add(product, op.Transpose(product, perm=[1, 0])))
    new_G = op.Where(any_lookup, op.Add(op.Mul(op.Cast(rho, to=F32), G), batch), G)
    return new_G, op.Add(count, op.Cast(any_lookup, to=I64))


@body
def factor_debias(G: FLOAT, count: INT64, decay: float):
    """Compute Ĝ = G / (1 − decay^count); G before the first count."""
    one64 = op.Cast(op.Constant(value_float=1.0), to=F64)
    rho = op.Cast(op.Constant(value_float=decay), to=F64)
    unbiased = op.Div(one64, op.Sub(one64, op.Pow(rho, op.Cast(count, to=F64))))
    return op.Mul(G, op.Cast(op.Where(op.Cast(count, to=BOOL), unbiased, one64), to=F32))
