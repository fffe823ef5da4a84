"""The diagonal input factor A: how often each row of the table is looked up, averaged over steps.

A is stored as `A = scale · Ã`, so that the decay of all V entries is one multiplication of a scalar:

    A ← decay·A + (1−decay)·counts        becomes        scale ← decay·scale,  Ã[ids] += (1−decay)/scale

Scalars are float64 inside. Source: spec section 2; Martens & Grosse 2015, section 5.
"""

from __future__ import annotations

from onnxscript import DOUBLE, FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import BOOL, F32, F64, I64, body, op

__all__ = [
    "input_factor_average",
    "input_factor_decay",
    "input_factor_update_elements",
    "input_factor_update_nd",
]


@body
def input_factor_decay(
    scale: DOUBLE, total: DOUBLE, count: INT64, lookups: FLOAT, decay: float, debias: int, normalize: int
):
    """Advance the running scale of A by one batch of `lookups` lookups.

    scale' = decay·scale,  count' = count + 1,  total' = decay·total + (1−decay)·(lookups or 1),
    increment = (1−decay)/(scale'·(1 or lookups)),  gain = scale'·c,  total_a = total'·c,
    c = 1/(1−decay^count') with debias, otherwise 1. With no lookup, the state stays.
    """
    one = op.Constant(value_float=1.0)
    one64 = op.Cast(one, to=F64)
    rho = op.Cast(op.Constant(value_float=decay), to=F64)
    fresh = op.Sub(one64, rho)
    lookups64 = op.Cast(lookups, to=F64)
    any_lookup = op.Greater(lookups, op.Constant(value_float=0.0))
    per_lookup = op.Cast(op.Constant(value_int=normalize), to=BOOL)
    weight = op.Where(per_lookup, one64, lookups64)
    divisor = op.Where(per_lookup, lookups64, one64)
    new_scale = op.Where(any_lookup, op.Mul(rho, scale), scale)
    new_total = op.Where(any_lookup, op.Add(op.Mul(rho, total), op.Mul(fresh, weight)), total)
    new_count = op.Add(count, op.Cast(any_lookup, to=I64))
    step = op.Div(fresh, op.Mul(new_scale, divisor))
    increment = op.Cast(op.Where(any_lookup, step, op.Sub(one64, one64)), to=F32)
    counted = op.And(op.Cast(op.Constant(value_int=debias), to=BOOL), op.Cast(new_count, to=BOOL))
    unbiased = op.Div(one64, op.Sub(one64, op.Pow(rho, op.Cast(new_count, to=F64))))
    correction = op.Where(counted, unbiased, one64)
    gain = op.Cast(op.Mul(new_scale, correction), to=F32)
    total_a = op.Cast(op.Mul(new_total, correction), to=F32)
    return new_scale, new_total, new_count, increment, gain, total_a


@body
def input_factor_update_elements(A: FLOAT, ids: INT64, increments: FLOAT):
    """Ã[ids] += increments, repeated ids adding up, on any host and any number of threads."""
    return op.ScatterElements(A, ids, increments, axis=0, reduction="add")


@body
def input_factor_update_nd(A: FLOAT, ids: INT64, increments: FLOAT):
    """Ã[ids] += increments, repeated ids adding up, where scatters are sequential or atomic."""
    return op.ScatterND(A, op.Unsqueeze(ids, op.Constant(value_ints=[-1])), increments, reduction="add")


@body
def input_factor_average(A: FLOAT, ids: INT64, weights: FLOAT, lookups: FLOAT, decay: float):
    """Compute A' = decay·A + (1−decay)·Σ weights at ids / lookups, over all V entries; A with no lookup.

    The plain form, O(V): for decays below 0.5 (0 too), where the running scale would vanish.
    """
    one = op.Constant(value_float=1.0)
    rho = op.Constant(value_float=decay)
    batch = op.ScatterElements(op.Mul(A, op.Constant(value_float=0.0)), ids, weights, axis=0, reduction="add")
    averaged = op.Add(op.Mul(rho, A), op.Mul(op.Sub(one, rho), op.Div(batch, lookups)))
    return op.Where(op.Greater(lookups, op.Constant(value_float=0.0)), averaged, A)
