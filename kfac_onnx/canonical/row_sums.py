"""Sums of rows by id, emitted so that every lookup of a table keeps a term of its own.

Exporters that join the ids and rows of several lookups before they scatter once hide which rows belong to
which lookup. Here the joined form is taken apart again:

    scatter([ids_1, ids_2], [rows_1, rows_2]) = scatter(ids_1, rows_1) + scatter(ids_2, rows_2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kfac_onnx.canonical.lowering.scatter import scatter_slices
from kfac_onnx.graph.operators import ORDERED_VIEWS
from kfac_onnx.graph.values import constant, dtype_of, int_attribute, rank_of, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter

__all__ = ["add_rows", "joined_column"]

Length: TypeAlias = "tuple[str, int | str | ir.Value]"
"""How long a value is along its first axis: a number, a named dimension, or the size of another value."""


def add_rows(
    emit: Emitter,
    shape: ir.Value,
    static: tuple[int, ...] | None,
    ids: ir.Value,
    rows: ir.Value,
    dtype: ir.DataType,
) -> ir.Value:
    """Return zeros of `shape` int64[rank] with `rows` [n, ...] added in at `ids` [n] along the first axis.

    `static` is the shape where it is known. Where `ids` joins several vectors, the result is a Sum with one
    scatter per vector; its rows are the joined rows where their lengths provably agree, else a Split.
    """
    vectors = _joined(ids)
    if len(vectors) == 1 or not dtype.is_floating_point():
        return scatter_slices(emit, None, shape, ids, rows, axis=0, dtype=dtype, static=static)
    parts = _joined(rows)
    if len(parts) != len(vectors) or not all(map(_as_long, vectors, parts)):
        counts = emit.concat(*(emit.op("Shape", value) for value in vectors))
        parts = list(emit.many("Split", [rows, counts], len(vectors), {"axis": 0}))
    terms = [
        scatter_slices(emit, None, shape, own, part, axis=0, dtype=dtype, static=static)
        for own, part in zip(vectors, parts, strict=True)
    ]
    return emit.op("Sum", *terms)


def joined_column(indices: ir.Value) -> ir.Value | None:
    """Return the vector [n] of which indices [n, 1] are the column, if it joins several; otherwise None."""
    node = indices.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.domain or node.op_type not in ("Unsqueeze", "Reshape"):
        return None
    vector, target = node.inputs[0], constant(node.inputs[1])
    wanted = ([-1], [1]) if node.op_type == "Unsqueeze" else ([-1, 1],)
    if vector is None or target is None or target.reshape(-1).tolist() not in wanted:
        return None
    return vector if rank_of(vector) == 1 and len(_joined(vector)) > 1 else None


def _joined(value: ir.Value) -> list[ir.Value]:
    """Return the values that are joined along the first axis to make this one; itself if none are."""
    source, node = value, value.producer()
    while node is not None and node.op_type in ORDERED_VIEWS and not node.domain:
        inner = node.inputs[0]
        if inner is None or not _same_rows(node, inner):
            break
        source, node = inner, inner.producer()
    if node is None or node.domain or node.op_type != "Concat":
        return [value]
    rank = rank_of(source)
    axis = int_attribute(node, "axis", 0)
    if axis != 0 and (rank is None or axis % rank != 0):
        return [value]
    found: list[ir.Value] = []
    for part in node.inputs:
        if part is None:
            return [value]
        found.extend(_joined(part))
    return found


def _same_rows(node: ir.Node, source: ir.Value) -> bool:
    """Say whether an operator passes each row on as it is: no Reshape to other rows, no rounding Cast."""
    if node.op_type == "Identity":
        return True
    own, other = node.outputs[0].shape, source.shape
    if node.op_type in ("Cast", "CastLike"):
        before, after = dtype_of(source), dtype_of(node.outputs[0])
        return before is not None and after is not None and before.is_integer() and after.is_integer()
    if own is None or other is None or len(own) != len(other):
        return False
    tails = list(own)[1:], list(other)[1:]
    return tails[0] == tails[1] and all(isinstance(dim, int) for dim in tails[0])


def _as_long(one: ir.Value, other: ir.Value) -> bool:
    """Say whether two values are provably of the same length along their first axis."""
    return bool(_lengths(one) & _lengths(other))


def _lengths(value: ir.Value) -> set[Length]:
    """Return what the graph says about how long a value is along its first axis."""
    found: set[Length] = set()
    static = static_shape(value)
    first = value.shape[0] if value.shape is not None and len(value.shape) > 0 else None
    if static:
        found.add(("number", static[0]))
    elif isinstance(first, int):
        found.add(("number", first))
    elif first is not None and first.value is not None:
        found.add(("dimension", str(first.value)))
    node = value.producer()
    if node is None or node.domain:
        return found
    if node.op_type in ("Identity", "Cast") and node.inputs[0] is not None:
        found |= _lengths(node.inputs[0])
    elif node.op_type == "Reshape":
        found |= _first_entry(node.inputs[1], node.inputs[0], rank_of(value))
    return found


def _first_entry(target: ir.Value | None, source: ir.Value | None, rank: int | None) -> set[Length]:
    """Return what is known of the first entry of the shape that `source` is reshaped to."""
    array = constant(target)
    if array is not None and array.size > 0:
        first = int(array.reshape(-1)[0])
        if first > 0:
            return {("number", first)}
        return {("size", source)} if first == -1 and rank == 1 and source is not None else set()
    node = None if target is None else target.producer()
    if node is None or node.domain:
        return set()
    if node.op_type in ORDERED_VIEWS | {"Concat"}:
        return _first_entry(node.inputs[0], source, rank)
    if node.op_type == "Size" and node.inputs[0] is not None:
        return {("size", node.inputs[0])}
    return set()
