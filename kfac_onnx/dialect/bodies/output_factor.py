"""The output factor G: the second moment of dL/d(row) over lookups, averaged over steps.

    G_new = scale · sym(rowsᵀ rows) / lookups        sym(M) = (M + Mᵀ)/2
    G     ← decay·G + (1−decay)·G_new                Ĝ = G / (1 − decay^count) with debias, otherwise G

Source: spec sections 1 and 2; Martens & Grosse 2015, section 5.
"""

from __future__ import annotations

from onnxscript import FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import BOOL, F32, F64, I64, body, op

__all__ = ["output_factor_update"]


@body
def output_factor_update(
    G: FLOAT, count: INT64, rows: FLOAT, lookups: FLOAT, scale: FLOAT, decay: float, debias: int
):
    """Take one batch of gradient rows into G; with no lookup, G and count stay."""
    one64 = op.Cast(op.Constant(value_float=1.0), to=F64)
    rho = op.Cast(op.Constant(value_float=decay), to=F64)
    any_lookup = op.Greater(lookups, op.Constant(value_float=0.0))
    product = op.MatMul(op.Transpose(rows, perm=[1, 0]), rows)
    symmetric = op.Mul(op.Add(product, op.Transpose(product, perm=[1, 0])), op.Constant(value_float=0.5))
    batch = op.Mul(symmetric, op.Div(scale, lookups))
    kept = op.Mul(op.Cast(rho, to=F32), G)
    taken = op.Mul(op.Cast(op.Sub(one64, rho), to=F32), batch)
    new_G = op.Where(any_lookup, op.Add(kept, taken), G)
    new_count = op.Add(count, op.Cast(any_lookup, to=I64))
    counted = op.And(op.Cast(op.Constant(value_int=debias), to=BOOL), op.Cast(new_count, to=BOOL))
    unbiased = op.Div(one64, op.Sub(one64, op.Pow(rho, op.Cast(new_count, to=F64))))
    G_hat = op.Mul(new_G, op.Cast(op.Where(counted, unbiased, one64), to=F32))
    return new_G, new_count, G_hat
