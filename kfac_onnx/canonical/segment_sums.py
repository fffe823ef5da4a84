"""Raising lowered segment sums back to scatters.

TensorFlow gives the gradient of a lookup as UnsortedSegmentSum(rows, ids, V). tf2onnx has no operator for it
and writes, with n ids, a grid [V, most] of positions, where row v names the rows whose id is v and then -1:

    sorted, order        = TopK(ids, n)
    _, _, inverse, count = Unique(sorted)
    place                = Mod(Range(0, n, 1), Gather(count, inverse))
    grid                 = ScatterND(-1 of [V, max(count)], [sorted, place], order)
    result               = ReduceSum(Gather(Concat(rows, one row of zeros), grid), axis 1)

Equal ids are neighbours in `sorted`, and c consecutive integers modulo c differ, so every position
occurs in the grid once, in the row of its id; -1 reads the zeros that were appended. The sum is therefore
ScatterElements(zeros, ids, rows, add), at the cost of n rows instead of V times the largest count. A
structure that differs in anything is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.row_sums import add_rows
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, replace_node
from kfac_onnx.graph.values import (
    ONNX_DOMAINS,
    all_graphs,
    constant,
    dtype_of,
    int_attribute,
    is_filled,
    operators_in,
    rank_of,
    static_shape,
)
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from kfac_onnx.pipeline.log import Log

__all__ = ["RaiseSegmentSums", "raise_segment_sums"]


def raise_segment_sums(model: ir.Model) -> int:
    """Replace every lowered segment sum by a scatter; return how many there were.

    Ids are int64[n] and rows [n, ...], both of any static or dynamic n. Ids in [-V, -1] count from the end,
    as in the grid.
    """
    names = Context.of(model)
    raised = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            found = _segment_sum(node)
            if found is None:
                continue
            ids, rows, segments = found
            emit = Emitter.in_place_of(names, node, "segment-sum")
            result = _scatter(emit, node.outputs[0], ids, rows, segments)
            if result is not None:
                replace_node(node, emit, [result])
                raised += 1
    return raised


def _scatter(
    emit: Emitter, output: ir.Value, ids: ir.Value, rows: ir.Value, segments: ir.Value
) -> ir.Value | None:
    dtype = dtype_of(rows)
    if dtype is None:
        return None
    static = static_shape(output) or _known_shape(rows, segments)
    if static is not None:
        shape = emit.ints(*static)
    else:
        tail = emit.part(emit.op("Shape", rows), 1, np.iinfo(np.int64).max)
        shape = emit.concat(emit.cast(segments, ir.DataType.INT64), tail)
    return add_rows(emit, shape, static, ids, rows, dtype)


def _known_shape(rows: ir.Value, segments: ir.Value) -> tuple[int, ...] | None:
    count = constant(segments)
    if count is None or count.size != 1 or rows.shape is None:
        return None
    tail = [dim for dim in list(rows.shape)[1:] if isinstance(dim, int)]
    return (int(count.reshape(-1)[0]), *tail) if len(tail) == len(rows.shape) - 1 else None


def _segment_sum(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return ids, rows and the number of segments if the node is the last of a lowered segment sum."""
    if not _is(node, "ReduceSum") or int_attribute(node, "keepdims", 1) != 0:
        return None
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.reshape(-1).tolist() != [1]:
        return None
    gather = _producer(node.inputs[0], "Gather")
    if gather is None or int_attribute(gather, "axis", 0) != 0:
        return None
    rows, grid = _without_zero_row(gather.inputs[0]), gather.inputs[1]
    found = None if grid is None else _grid(grid)
    return None if rows is None or found is None else (found[0], rows, found[1])


def _without_zero_row(value: ir.Value | None) -> ir.Value | None:
    """Match Concat(rows, one row of zeros) along the first axis, and return the rows."""
    concat = _producer(value, "Concat")
    if concat is None or int_attribute(concat, "axis", 0) != 0 or len(concat.inputs) != 2:
        return None
    rows, extra = concat.inputs
    return rows if _is_one_zero_row(extra) else None


def _is_one_zero_row(value: ir.Value | None) -> bool:
    array = constant(value)
    if array is not None:
        return array.ndim > 0 and len(array) == 1 and not array.any()
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain not in ONNX_DOMAINS:
        return False
    if node.op_type == "Unsqueeze":
        axes = constant(node.inputs[1])
        return axes is not None and axes.reshape(-1).tolist() == [0] and is_filled(node.inputs[0], 0)
    first = value.shape[0] if value.shape is not None and len(value.shape) > 0 else None
    return first == 1 and is_filled(value, 0)


def _grid(grid: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Match the grid of positions; return the ids and the number of segments (an int64 of one entry)."""
    node = _producer(grid, "ScatterND")
    if node is None or len(node.inputs) < 3 or not _plain_scatter(node):
        return None
    base, places, order = node.inputs[:3]
    topk = None if order is None else order.producer()
    if topk is None or not _is(topk, "TopK") or order is not topk.outputs[1] or topk.inputs[0] is None:
        return None
    ids, ranked = topk.inputs[0], topk.outputs[0]
    if int_attribute(topk, "sorted", 1) != 1 or not _covers_all(topk, ids):
        return None
    columns = _columns(places)
    if columns is None or columns[0] is not ranked:
        return None
    counts = _counts_within(columns[1], ranked, (ids, ranked))
    segments = None if counts is None else _grid_rows(base, counts)
    return None if segments is None else (ids, segments)


def _plain_scatter(node: ir.Node) -> bool:
    found = node.attributes.get("reduction")
    return found is None or found.as_string() == "none"


def _covers_all(topk: ir.Node, ids: ir.Value) -> bool:
    """Say whether a TopK sorts all of a vector."""
    rank = rank_of(ids)
    count = topk.inputs[1] if len(topk.inputs) > 1 else None
    whole = _producer(count, "Shape")
    if rank is None and whole is not None and whole.inputs[0] is ids:
        rank = 1  # the number of entries is itself one entry
    return rank == 1 and int_attribute(topk, "axis", -1) in (0, -1) and _is_length(count, (ids,))


def _is_length(value: ir.Value | None, vectors: tuple[ir.Value, ...]) -> bool:
    """Say whether a value of one entry is the length of one of these vectors (which are equally long)."""
    node = _producer(value, "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity")
    if node is not None:
        return _is_length(node.inputs[0], vectors)
    node = _producer(value, "Shape", "Size")
    if node is not None:
        return any(node.inputs[0] is vector for vector in vectors) and not (
            int_attribute(node, "start", 0) or "end" in node.attributes
        )
    array = constant(value)
    if array is None or array.size != 1:
        return False
    return any(static_shape(vector) == (int(array.reshape(-1)[0]),) for vector in vectors)


def _columns(places: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Match two vectors side by side, [n, 2], and return them."""
    concat = _producer(places, "Concat")
    if concat is None or int_attribute(concat, "axis", 0) not in (1, -1) or len(concat.inputs) != 2:
        return None
    found: list[ir.Value] = []
    for value in concat.inputs:
        column = _producer(value, "Unsqueeze", "Reshape")
        if column is None or column.inputs[0] is None:
            return None
        target = constant(column.inputs[1])
        wanted = ([-1], [1]) if column.op_type == "Unsqueeze" else ([-1, 1],)
        if target is None or target.reshape(-1).tolist() not in wanted:
            return None
        found.append(column.inputs[0])
    return found[0], found[1]


def _counts_within(value: ir.Value, ranked: ir.Value, vectors: tuple[ir.Value, ...]) -> ir.Value | None:
    """Match Range(0, n, 1) modulo how often each sorted id occurs, and return the counts of distinct ids."""
    node = _producer(value, "Mod")
    if node is None or not _counts_from_zero(node.inputs[0], vectors):
        return None
    occurs = _producer(node.inputs[1], "Gather")
    if occurs is None or int_attribute(occurs, "axis", 0) != 0:
        return None
    counts, inverse = occurs.inputs[:2]
    unique = _producer(counts, "Unique")
    if unique is None or unique.inputs[0] is not ranked or len(unique.outputs) < 4:
        return None
    return counts if counts is unique.outputs[3] and inverse is unique.outputs[2] else None


def _counts_from_zero(value: ir.Value | None, vectors: tuple[ir.Value, ...]) -> bool:
    """Say whether a value is 0, 1, 2, ... as long as these vectors."""
    array = constant(value)
    if array is not None:
        length = len(array) if array.ndim == 1 else -1
        counted = length >= 0 and np.array_equal(array, np.arange(length))
        return counted and any(static_shape(vector) == (length,) for vector in vectors)
    node = _producer(value, "Range")
    if node is None:
        return False
    start, step = constant(node.inputs[0]), constant(node.inputs[2])
    if start is None or step is None or start.reshape(-1).tolist() != [0] or step.reshape(-1).tolist() != [1]:
        return False
    return _is_length(node.inputs[1], vectors)


def _grid_rows(base: ir.Value | None, counts: ir.Value) -> ir.Value | None:
    """Match -1 everywhere in [segments, largest count], and return the number of segments."""
    node = _producer(base, "ConstantOfShape")
    if node is None or not is_filled(base, -1):
        return None
    shape = _producer(node.inputs[0], "Concat")
    if shape is None or len(shape.inputs) != 2:
        return None
    segments, most = shape.inputs
    while (step := _producer(most, "Unsqueeze", "Reshape", "Identity", "Cast")) is not None:
        most = step.inputs[0]
    largest = _producer(most, "ReduceMax")
    if largest is None or largest.inputs[0] is not counts:
        return None
    return segments


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.domain in ONNX_DOMAINS and node.op_type in op_types


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes a value if it is one of these operators, looking through Identity."""
    node = None if value is None else value.producer()
    while node is not None and _is(node, "Identity") and "Identity" not in op_types:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node if node is not None and _is(node, *op_types) else None


@register
@dataclass(frozen=True, kw_only=True)
class RaiseSegmentSums(Pass):
    """Make a scatter of a lowered segment sum, as tf2onnx writes it with TopK, Unique and ReduceSum.

    Where the ids join several vectors, there is one scatter per vector, and their sum. What differs from that
    structure in anything stays.
    """

    name: ClassVar[str] = "raise-segment-sums"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not operators_in(model) & {"TopK"}:
            return NO_CHANGES
        census = Census(model)
        if count := raise_segment_sums(model):
            log.note(f"lowered segment sums made scatters: {count}")
            log.count("scatters", count)
        return census.changes()
