"""Parts of a vector of different lengths, one per iteration: the bags of an embedding bag.

Iteration t reads x[starts_t : ends_t]. All parts are read at once by their places, and summed by a
scatter over the number of the part, so that the cost is that of the entries read, not of T times N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.canonical.loops.lanes import Lane, Ragged, Segments
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.canonical.loops.vectorizer import Vectorizer

__all__ = ["ragged_slices", "reduce_ragged"]


def ragged_slices(
    vec: Vectorizer, data: ir.Value, starts: ir.Value, ends: ir.Value, mask: ir.Value | None
) -> Lane:
    """Return the lane of data[starts_t : ends_t] along axis 0; `starts` and `ends` are int64[T]."""
    rank = vec.rank(data)
    if rank is None:
        return Miss(f"the rank of '{data.name}' is not known")
    key = (starts, ends, mask)
    if key not in vec.segments:
        vec.segments[key] = _segments(vec, data, starts, ends, mask)
    segments = vec.segments[key]
    part = vec.emit.op("Gather", data, segments.place, axis=0)
    vec.describe(part, data, None)
    return Ragged(part, rank, segments)


def _segments(
    vec: Vectorizer, data: ir.Value, starts: ir.Value, ends: ir.Value, mask: ir.Value | None
) -> Segments:
    emit = vec.emit
    zero, one = (vec.names.constant(np.array(item, np.int64)) for item in (0, 1))
    size = emit.entry(emit.op("Shape", data), 0)
    begin, end = (_bound(vec, item, size) for item in (starts, ends))
    lengths = emit.op("Max", emit.op("Sub", end, begin), zero)
    if mask is not None:
        lengths = emit.op("Where", mask, lengths, zero)
    first = emit.many("CumSum", [lengths, zero], 1, {"exclusive": 1})[0]
    total = emit.op("ReduceSum", lengths, keepdims=0)
    marks = emit.op("Expand", zero, emit.op("Reshape", emit.op("Add", total, one), emit.ints(-1)))
    ones = emit.op("Expand", one, emit.op("Shape", first))
    marked = emit.op("ScatterElements", marks, first, ones, axis=0, reduction="add")
    upto = emit.op("Slice", emit.op("CumSum", marked, zero), emit.ints(0), emit.ints(-1), emit.ints(0))
    number = emit.op("Sub", upto, one)
    moved = emit.op("Gather", emit.op("Sub", begin, first), number, axis=0)
    place = emit.op("Add", emit.op("Range", zero, total, one), moved)
    return Segments(number, place, lengths, first)


def _bound(vec: Vectorizer, bound: ir.Value, size: ir.Value) -> ir.Value:
    """Return the bound of a Slice as a place in [0, size]."""
    emit = vec.emit
    zero = vec.names.constant(np.array(0, np.int64))
    wrapped = emit.op("Where", emit.op("Less", bound, zero), emit.op("Add", bound, size), bound)
    return emit.op("Min", emit.op("Max", wrapped, zero), size)


def reduce_ragged(vec: Vectorizer, kind: str, lane: Ragged, *, keepdims: bool) -> Lane:
    """Return ReduceSum or ReduceMean over axis 0 of every instance; the mean of no entries is 0."""
    emit = vec.emit
    dtype = dtype_of(lane.value)
    if dtype is None:
        return Miss(f"the type of '{lane.value.name}' is not known")
    segments = lane.segments
    key = (lane.value, segments.number)
    total = vec.sums.get(key)
    if total is None:
        shape = emit.op("Shape", lane.value)
        column = emit.op("Reshape", segments.number, emit.ints(-1, *(1,) * (lane.rank - 1)))
        index = emit.op("Expand", column, shape)
        sizes = vec.counts()
        if lane.rank > 1:
            known = list(lane.value.shape or ())[1:]
            rest = [dim for dim in known if isinstance(dim, int)]
            static = len(rest) == lane.rank - 1
            sizes = emit.concat(sizes, emit.ints(*rest) if static else emit.part(shape, 1, lane.rank))
        zeros = emit.zeros(sizes, dtype)
        total = emit.op("ScatterElements", zeros, index, lane.value, axis=0, reduction="add")
        vec.describe(total, lane.value, vec.static_count())
        vec.sums[key] = total
    result = total
    if kind == "ReduceMean":
        one = vec.names.constant(np.array(1, np.int64))
        count = emit.cast(emit.op("Max", segments.lengths, one), dtype)
        count = emit.op("Reshape", count, emit.ints(-1, *(1,) * (lane.rank - 1)))
        result = emit.op("Div", total, count)
    if keepdims:
        result = emit.op("Unsqueeze", result, emit.ints(1))
    return vec.stacked(result, lane.rank if keepdims else lane.rank - 1)
