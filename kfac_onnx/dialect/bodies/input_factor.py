"""The diagonal input factor A: how often each row of the table is looked up, averaged over steps.

A is stored as `A = scale · Ã`, so that the decay of all V entries is one multiplication of a scalar:

    A ← decay·A + (1−decay)·counts        becomes        scale ← decay·scale,  Ã[ids] += (1−decay)/scale

Scalars are float64 inside, and so is Ã: increments of a batch are added to it one by one. Source: Martens &
Grosse 2015 (https://arxiv.org/abs/1503.05671), section 5; docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import DOUBLE, FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, F64, I64, body, op

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
    c = 1/(1−decay^max(count', 1)) with debias, otherwise 1. With no lookup, the state stays.
    """
    one64 = op.Cast(op.Constant(value_float=1.0), to=F64)
    decay64 = op.Cast(op.Constant(value_float=decay), to=F64)
    lookups64 = op.Cast(lookups, to=F64)
    any_lookup = op.Sign(lookups64)  # 0 or 1, so decay^any is 1 or decay to the last bit
    rho = op.Pow(decay64, any_lookup)
    least = op.Max(lookups64, op.Cast(op.Constant(value_float=1e-30), to=F64))
    divisor = op.Pow(least, op.Cast(op.Constant(value_int=normalize), to=F64))
    fresh = op.Div(op.Sub(one64, rho), divisor)
    new_scale = op.Mul(rho, scale)
    new_total = op.Add(op.Mul(rho, total), op.Mul(fresh, lookups64))
    new_count = op.Add(count, op.Cast(any_lookup, to=I64))
    increment = op.Cast(op.Div(fresh, new_scale), to=F32)
    forgotten = op.Mul(decay64, op.Cast(op.Constant(value_int=debias), to=F64))
    steps = op.Max(op.Cast(new_count, to=F64), one64)
    correction = op.Reciprocal(op.Sub(one64, op.Pow(forgotten, steps)))
    gain = op.Cast(op.Mul(new_scale, correction), to=F32)
    total_a = op.Cast(op.Mul(new_total, correction), to=F32)
    return new_scale, new_total, new_count, increment, gain, total_a


@body
def input_factor_update_elements(A: DOUBLE, ids: INT64, increments: DOUBLE):
    """Ã[ids] += increments, repeated ids adding up, on any host and any number of threads."""
    return op.ScatterElements(A, ids, increments, axis=0, reduction="add")


@body
def input_factor_update_nd(A: DOUBLE, ids: INT64, increments: DOUBLE):
    """Ã[ids] += increments, repeated ids adding up, where scatters are atomic."""
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
