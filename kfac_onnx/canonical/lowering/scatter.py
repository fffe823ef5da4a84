"""Adding rows into a tensor without losing any, whatever runs the graph.

`ScatterND(reduction="add")` loses updates on a multi-threaded CPU session when rows repeat;
`ScatterElements(reduction="add")` walks its indices in order. Everything here ends in the latter.
Half-precision sums are made in float32: neither scatter adds in half precision on CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.emit import HALF_TYPES

if TYPE_CHECKING:
    from kfac_onnx.graph.emit import Emitter

__all__ = ["END", "linear_index", "scatter_elements", "scatter_slices"]

END = np.iinfo(np.int64).max
"""`Slice` end that means "to the end"."""


def scatter_elements(
    emit: Emitter,
    base: ir.Value | None,
    shape: ir.Value,
    index: ir.Value,
    updates: ir.Value,
    *,
    axis: int,
    dtype: ir.DataType,
    reduction: str = "add",
) -> ir.Value:
    """Return `base` (zeros of `shape` if None) with `updates` reduced into it along `axis`."""
    total = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    start = emit.zeros(shape, total) if base is None else emit.cast(base, total, dtype)
    rows = emit.cast(updates, total, dtype)
    added = emit.op("ScatterElements", start, index, rows, axis=axis, reduction=reduction)
    return emit.cast(added, dtype, total)


def scatter_slices(
    emit: Emitter,
    base: ir.Value | None,
    shape: ir.Value,
    ids: ir.Value,
    updates: ir.Value,
    *,
    axis: int,
    dtype: ir.DataType,
    static: tuple[int, ...] | None,
    reduction: str = "add",
) -> ir.Value:
    """Return `base[.., ids, ..] += updates` along `axis`; negative ids count from the end.

    `ids` is an integer tensor of any rank, `updates` has shape[:axis] + ids.shape + shape[axis+1:].
    `shape` is the result's shape at run time, `static` the same where it is known (else None; then
    `axis` may not be negative, except -1).
    """
    flat = emit.ints(-1)
    if static is not None:
        axis %= len(static)
        after = len(static) - axis - 1
        rows_shape = emit.ints(*static[:axis], -1, *static[axis + 1 :])
        ids_shape = emit.ints(-1, *(1,) * after)
    elif axis == -1:
        rows_shape = emit.concat(emit.part(shape, 0, -1), flat)
        ids_shape = flat
    else:
        tail = emit.part(shape, axis + 1, END)
        head = [emit.part(shape, 0, axis)] if axis > 0 else []
        rows_shape = emit.concat(*head, flat, tail)
        ids_shape = emit.concat(flat, emit.op("Expand", emit.ints(1), emit.op("Shape", tail)))
    rows = emit.op("Reshape", updates, rows_shape)
    index = emit.op("Expand", emit.op("Reshape", ids, ids_shape), emit.op("Shape", rows))
    return scatter_elements(emit, base, shape, index, rows, axis=axis, dtype=dtype, reduction=reduction)


def linear_index(emit: Emitter, indices: ir.Value, shape: ir.Value, columns: int) -> ir.Value:
    """Return int64[...]: the position of each k-column index (int64[..., k]) in the first k dimensions.

    Negative entries count from the end of their dimension, as in ScatterND.
    """
    if columns == 1:
        return emit.op("Squeeze", indices, emit.ints(-1))
    dims = emit.part(shape, 0, columns)
    negative = emit.op("Less", indices, emit.constant(np.array(0, np.int64)))
    wrapped = emit.op("Where", negative, emit.op("Add", indices, dims), indices)
    position: ir.Value | None = None
    for column in range(columns):
        entry = emit.op("Gather", wrapped, emit.constant(np.array(column, np.int64)), axis=-1)
        if position is not None:
            entry = emit.op("Add", emit.op("Mul", position, emit.entry(dims, column)), entry)
        position = entry
    if position is None:
        raise ValueError("an index has at least one column")
    return position
