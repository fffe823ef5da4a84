"""Writing rows into tables, merging repeated rows, and the finite flag.

A body that writes state ends in the one scatter that makes its output, with no node after it: that is
what lets onnxruntime write through a bound buffer. Where rows may repeat there are two bodies:
`_elements` (ScatterElements: sequential, right on every host) and `_nd` (ScatterND: fast, right only in
a session of one thread or on a device with atomic adds).
"""

from __future__ import annotations

from onnxscript import FLOAT, INT32, INT64  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import F32, I32, I64, body, op

__all__ = [
    "add_rows_elements",
    "add_rows_nd",
    "all_finite",
    "apply_columns",
    "apply_flat",
    "apply_rows_elements",
    "apply_rows_nd",
    "merge_lookups_elements",
    "merge_lookups_nd",
    "merge_rows_elements",
    "merge_rows_nd",
    "scatter_rows_elements",
    "scatter_rows_nd",
    "write_rows",
]


@body
def merge_rows_elements(ids: INT64, rows: FLOAT):
    """Distinct ids in ascending order and the sum of the rows of each."""
    unique_ids, _, inverse = op.Unique(ids, sorted=1)
    index = op.Expand(op.Unsqueeze(inverse, op.Constant(value_ints=[1])), op.Shape(rows))
    shape = op.Concat(op.Shape(unique_ids), op.Shape(rows, start=1), axis=0)
    zeros = op.Expand(op.Constant(value_float=0.0), shape)
    return unique_ids, op.ScatterElements(zeros, index, rows, axis=0, reduction="add")


@body
def merge_rows_nd(ids: INT64, rows: FLOAT):
    """Distinct ids in ascending order and the sum of the rows of each."""
    unique_ids, _, inverse = op.Unique(ids, sorted=1)
    shape = op.Concat(op.Shape(unique_ids), op.Shape(rows, start=1), axis=0)
    zeros = op.Expand(op.Constant(value_float=0.0), shape)
    index = op.Unsqueeze(inverse, op.Constant(value_ints=[-1]))
    return unique_ids, op.ScatterND(zeros, index, rows, reduction="add")


@body
def merge_lookups_elements(slot: INT32, ids: INT64, rows: FLOAT):
    """Sum the rows of each id at one of its lookups; the rows of its other lookups become 0.

    Each lookup writes its position to the slot of its id, and reads there which one won: the same for all
    lookups of an id. What else is in `slot` is never read. Nothing is sorted and nothing is compacted.
    """
    one = op.Constant(value_int=1)
    count = op.Squeeze(op.Shape(ids))
    positions = op.Range(op.Constant(value_int=0), count, one)
    new_slot = op.ScatterElements(slot, ids, op.Cast(positions, to=I32), axis=0)
    place = op.Cast(op.GatherElements(new_slot, ids, axis=0), to=I64)
    index = op.Expand(op.Unsqueeze(place, op.Constant(value_ints=[1])), op.Shape(rows))
    zeros = op.Expand(op.Constant(value_float=0.0), op.Shape(rows))
    merged = op.ScatterElements(zeros, index, rows, axis=0, reduction="add")
    return new_slot, op.Identity(ids), place, merged


@body
def merge_lookups_nd(slot: INT32, ids: INT64, rows: FLOAT):
    """Sum the rows of each id, in one thread; the ids that occur, in the order of their last lookups.

    The lookup that won is told as by the other body. Only those that won are kept: what comes after works on
    as many rows as there are ids, a quarter of the lookups where ids follow Zipf's law.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    positions = op.Range(zero, op.Squeeze(op.Shape(ids)), one)
    new_slot = op.ScatterElements(slot, ids, op.Cast(positions, to=I32), axis=0)
    winner = op.Cast(op.GatherElements(new_slot, ids, axis=0), to=I64)
    winners = op.Squeeze(op.NonZero(op.Equal(winner, positions)), op.Constant(value_ints=[0]))
    place = op.Range(zero, op.Squeeze(op.Shape(winners)), one)
    rank = op.Gather(op.ScatterElements(positions, winners, place, axis=0), winner)
    zeros = op.Expand(
        op.Constant(value_float=0.0), op.Concat(op.Shape(winners), op.Shape(rows, start=1), axis=0)
    )
    index = op.Unsqueeze(rank, op.Constant(value_ints=[-1]))
    return new_slot, op.Gather(ids, winners), place, op.ScatterND(zeros, index, rows, reduction="add")


@body
def add_rows_elements(W: FLOAT, ids: INT64, rows: FLOAT):
    """W[ids] += rows, repeated ids adding up; W is [V, D]."""
    index = op.Expand(op.Unsqueeze(ids, op.Constant(value_ints=[1])), op.Shape(rows))
    return op.ScatterElements(W, index, rows, axis=0, reduction="add")


@body
def add_rows_nd(W: FLOAT, ids: INT64, rows: FLOAT):
    """W[ids] += rows, repeated ids adding up; W is [V, D]."""
    return op.ScatterND(W, op.Unsqueeze(ids, op.Constant(value_ints=[-1])), rows, reduction="add")


@body
def apply_rows_elements(W: FLOAT, ids: INT64, update: FLOAT, lr: FLOAT):
    """W[ids] −= lr·update, repeated ids adding up; W is [V, D]."""
    index = op.Expand(op.Unsqueeze(ids, op.Constant(value_ints=[1])), op.Shape(update))
    return op.ScatterElements(W, index, op.Mul(op.Neg(lr), update), axis=0, reduction="add")


@body
def apply_rows_nd(W: FLOAT, ids: INT64, update: FLOAT, lr: FLOAT):
    """W[ids] −= lr·update, repeated ids adding up; W is [V, D]."""
    index = op.Unsqueeze(ids, op.Constant(value_ints=[-1]))
    return op.ScatterND(W, index, op.Mul(op.Neg(lr), update), reduction="add")


@body
def apply_columns(W: FLOAT, ids: INT64, update: FLOAT, lr: FLOAT):
    """W[:, ids] −= lr·updateᵀ, repeated ids adding up; W is [D, V]."""
    columns = op.Transpose(op.Mul(op.Neg(lr), update), perm=[1, 0])
    index = op.Expand(op.Unsqueeze(ids, op.Constant(value_ints=[0])), op.Shape(columns))
    return op.ScatterElements(W, index, columns, axis=1, reduction="add")


@body
def apply_flat(W: FLOAT, ids: INT64, update: FLOAT, lr: FLOAT):
    """W[ids·D + d] −= lr·update[:, d], repeated ids adding up; W is a table stored as [V·D]."""
    flat = op.Constant(value_ints=[-1])
    D = op.Shape(update, start=1)
    zero = op.Constant(value_int=0)
    inside = op.Unsqueeze(
        op.Range(zero, op.Squeeze(D), op.Constant(value_int=1)), op.Constant(value_ints=[0])
    )
    index = op.Add(op.Mul(op.Unsqueeze(ids, op.Constant(value_ints=[1])), D), inside)
    values = op.Reshape(op.Mul(op.Neg(lr), update), flat)
    return op.ScatterElements(W, op.Reshape(index, flat), values, axis=0, reduction="add")


@body
def write_rows(table: FLOAT, ids: INT64, values: FLOAT):
    """table[ids] = values; repeated ids must carry equal values."""
    return op.ScatterND(table, op.Unsqueeze(ids, op.Constant(value_ints=[-1])), values)


@body
def scatter_rows_elements(ids: INT64, rows: FLOAT, vocab_size: int):
    """[V, D] gradient of a table: the rows of each id summed, zero elsewhere."""
    V = op.Constant(value_int=vocab_size)
    shape = op.Concat(op.Unsqueeze(V, op.Constant(value_ints=[0])), op.Shape(rows, start=1), axis=0)
    zeros = op.Expand(op.Constant(value_float=0.0), shape)
    index = op.Expand(op.Unsqueeze(ids, op.Constant(value_ints=[1])), op.Shape(rows))
    return op.ScatterElements(zeros, index, rows, axis=0, reduction="add")


@body
def scatter_rows_nd(ids: INT64, rows: FLOAT, vocab_size: int):
    """[V, D] gradient of a table: the rows of each id summed, zero elsewhere."""
    V = op.Constant(value_int=vocab_size)
    shape = op.Concat(op.Unsqueeze(V, op.Constant(value_ints=[0])), op.Shape(rows, start=1), axis=0)
    zeros = op.Expand(op.Constant(value_float=0.0), shape)
    return op.ScatterND(zeros, op.Unsqueeze(ids, op.Constant(value_ints=[-1])), rows, reduction="add")


@body
def all_finite(x: FLOAT):
    """0 where every entry of x is finite as float32 and so is the sum of their sizes, else NaN: 0·Σ|x|."""
    return op.Mul(op.ReduceL1(op.Cast(x, to=F32), keepdims=0), op.Constant(value_float=0.0))
