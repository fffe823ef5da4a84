"""Scales per row learnt from the rows themselves: for presets that square rows, and plain Adagrad.

All take merged rows (one per distinct id), because they square them. Source: Duchi, Hazan &
Singer 2011 (https://jmlr.org/papers/v12/duchi11a.html), section 1.1; docs/mathematics.md.
"""

from __future__ import annotations

from onnxscript import DOUBLE, FLOAT, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, F64, I64, body, op

__all__ = [
    "row_adagrad",
    "row_adagrad_step",
    "row_element_adagrad",
    "row_element_adagrad_step",
    "row_window",
    "row_window_step",
    "window_decay",
]


@body
def row_adagrad(rows: FLOAT, acc: FLOAT, epsilon: float):
    """Compute acc' = acc + mean over D of rows², update = rows / (sqrt(acc') + epsilon)."""
    axis = op.Constant(value_ints=[1])
    new_acc = op.Add(acc, op.ReduceMean(op.Mul(rows, rows), axis, keepdims=0))
    scale = op.Add(op.Sqrt(new_acc), op.Constant(value_float=epsilon))
    return op.Div(rows, op.Unsqueeze(scale, axis)), new_acc


@body
def row_adagrad_step(rows: FLOAT, place: INT64, acc: FLOAT, scale: FLOAT, epsilon: float):
    """Compute acc' = acc + mean over D of rows[place]², step = scale · rows / (sqrt(acc') + epsilon).

    `rows` holds the sum of an id's rows at one of its lookups; `place` names that one for each lookup.
    """
    axis = op.Constant(value_ints=[1])
    mean = op.ReduceMean(op.Mul(rows, rows), axis, keepdims=0)
    new_acc = op.Add(acc, op.Gather(mean, place))
    weight = op.Div(scale, op.Add(op.Sqrt(new_acc), op.Constant(value_float=epsilon)))
    return op.Mul(rows, op.Unsqueeze(weight, axis)), new_acc


@body
def row_window_step(rows: FLOAT, place: INT64, r: FLOAT, fresh: FLOAT, scale: FLOAT):
    """Compute r' = r + fresh · mean over D of rows[place]², step = scale · rows / sqrt(r'), 0 if r' = 0."""
    axis = op.Constant(value_ints=[1])
    zero = op.Constant(value_float=0.0)
    mean = op.ReduceMean(op.Mul(rows, rows), axis, keepdims=0)
    new_r = op.Add(r, op.Mul(fresh, op.Gather(mean, place)))
    weight = op.Where(op.Equal(new_r, zero), zero, op.Div(scale, op.Sqrt(new_r)))
    return op.Mul(rows, op.Unsqueeze(weight, axis)), new_r


@body
def row_element_adagrad_step(rows: FLOAT, place: INT64, acc: FLOAT, epsilon: float):
    """Compute acc' = acc + rows[place]², update = rows / (sqrt(acc') + epsilon), entry by entry."""
    new_acc = op.Add(acc, op.Gather(op.Mul(rows, rows), place))
    return op.Div(rows, op.Add(op.Sqrt(new_acc), op.Constant(value_float=epsilon))), new_acc


@body
def row_element_adagrad(rows: FLOAT, acc: FLOAT, epsilon: float):
    """Compute acc' = acc + rows², update = rows / (sqrt(acc') + epsilon), entry by entry."""
    new_acc = op.Add(acc, op.Mul(rows, rows))
    return op.Div(rows, op.Add(op.Sqrt(new_acc), op.Constant(value_float=epsilon))), new_acc


@body
def window_decay(scale: DOUBLE, count: INT64, lookups: FLOAT, power: float, least: float):
    """Advance the widening window b = 1 − max(t^(−power), least), t = count + 1, of r = scale · r̃.

    scale' = b·scale (1 at t = 1, where b = 0), retain = b·scale, fresh = 1 − b, unscale = 1/scale'.
    With no lookup scale and count stay, retain = scale and fresh = 0.
    """
    one64 = op.Cast(op.Constant(value_float=1.0), to=F64)
    zero64 = op.Sub(one64, one64)
    any_lookup = op.Greater(lookups, op.Constant(value_float=0.0))
    t = op.Cast(op.Add(count, op.Constant(value_int=1)), to=F64)
    widened = op.Pow(t, op.Neg(op.Cast(op.Constant(value_float=power), to=F64)))
    fresh = op.Max(widened, op.Cast(op.Constant(value_float=least), to=F64))
    decayed = op.Mul(scale, op.Sub(one64, fresh))
    restarted = op.Where(op.Greater(decayed, zero64), decayed, one64)
    new_scale = op.Where(any_lookup, restarted, scale)
    new_count = op.Add(count, op.Cast(any_lookup, to=I64))
    retain = op.Cast(op.Where(any_lookup, decayed, scale), to=F32)
    taken = op.Cast(op.Where(any_lookup, fresh, zero64), to=F32)
    unscale = op.Cast(op.Div(one64, new_scale), to=F32)
    return new_scale, new_count, retain, taken, unscale


@body
def row_window(rows: FLOAT, r: FLOAT, fresh: FLOAT):
    """Compute r' = r + fresh · mean over D of rows², update = rows / sqrt(r'), and 0 where r' = 0."""
    axis = op.Constant(value_ints=[1])
    zero = op.Constant(value_float=0.0)
    new_r = op.Add(r, op.Mul(fresh, op.ReduceMean(op.Mul(rows, rows), axis, keepdims=0)))
    root = op.Unsqueeze(op.Sqrt(new_r), axis)
    return op.Where(op.Equal(root, zero), op.Mul(rows, zero), op.Div(rows, root)), new_r
