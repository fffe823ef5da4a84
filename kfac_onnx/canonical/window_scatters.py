"""Scatters that name every entry of a row or column, raised to scatters of rows.

A lookup of columns, `jnp.take(table, ids, axis=1)`, has a gradient that JAX scatters in windows of one
column. jax2onnx spells each window out, entry by entry, with n ids and a table [D, V]:

    base    = Concat(zeros, ids) along axis 1                          int64[n, 2]: where each window begins
    places  = Reshape([n, 1, 2] base + [1, D, 2] offsets, [n * D, 2])  offsets (0, 0), (1, 0), .. (D - 1, 0)
    result  = ScatterND(table, places, entries[n * D], add)

Where a window covers all of every axis but one, that is a scatter of n rows into the table with that axis
first:

    result  = Transpose(ScatterND(Transpose(table), ids[n, 1], Reshape(entries, [n, D]), add))

A structure that differs in anything is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, replace_node
from kfac_onnx.graph.values import (
    ONNX_DOMAINS,
    all_graphs,
    int_attribute,
    rank_of,
    static_shape,
)
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from kfac_onnx.pipeline.log import Log

__all__ = ["RaiseWindowScatters", "raise_window_scatters"]


def raise_window_scatters(model: ir.Model) -> int:
    """Replace every scatter of whole rows or columns by entries; return how many there were."""
    names = Context.of(model)
    facts = Constants(model.graph.inputs, model.opset_imports.get("", 18))
    raised = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if _names_entries(node) and _raise(names, node, facts):
                raised += 1
    return raised


def _names_entries(node: ir.Node) -> bool:
    if node.domain not in ONNX_DOMAINS or node.op_type != "ScatterND" or len(node.inputs) < 3:
        return False
    return rank_of(node.inputs[2]) == 1


def _raise(names: Context, node: ir.Node, facts: Constants) -> bool:
    base, places, entries = node.inputs[:3]
    shape = static_shape(base) or static_shape(node.outputs[0])
    if base is None or entries is None or shape is None or rank_of(entries) != 1:
        return False
    found = _windows(places, shape, facts)
    if found is None:
        return False
    ids, axis = found
    others = [index for index in range(len(shape)) if index != axis]
    order = [axis, *others]
    emit = Emitter.in_place_of(names, node, "window")
    rows = _rows(emit, entries, [shape[index] for index in others])
    table = emit.op("Transpose", base, perm=order)
    reduction = node.attributes.get("reduction")
    result = emit.op(
        "ScatterND",
        table,
        _only_column(ids, facts),
        rows,
        reduction="none" if reduction is None else reduction.as_string(),
    )
    for value in (table, result):
        value.type, value.shape = base.type, ir.Shape([shape[index] for index in order])
    back = [order.index(index) for index in range(len(shape))]
    replace_node(node, emit, [emit.op("Transpose", result, perm=back)])
    return True


def _rows(emit: Emitter, entries: ir.Value, row: list[int]) -> ir.Value:
    """Return the entries as one row of this shape per window, as they were before they were flattened."""
    flat = _producer(entries, "Reshape", "Flatten")
    source = None if flat is None else flat.inputs[0]
    if source is not None and source.shape is not None and list(source.shape)[1:] == row:
        return source
    rows = emit.op("Reshape", entries, emit.ints(-1, *row))
    rows.type, rows.shape = entries.type, ir.Shape([None, *row])
    return rows


def _only_column(ids: ir.Value, facts: Constants) -> ir.Value:
    """Return the matrix that a column is read from, if it has no other column."""
    read = _producer(ids, "Gather")
    if (
        read is None
        or int_attribute(read, "axis", 0) not in (1, -1)
        or facts.constant(read.inputs[1]) is None
    ):
        return ids
    source = read.inputs[0]
    return source if source is not None and rank_of(source) == 2 and _last(source) == 1 else ids


def _windows(
    places: ir.Value | None, shape: tuple[int, ...], facts: Constants
) -> tuple[ir.Value, int] | None:
    """Match windows over all axes but one; return where they are on it, int[n, 1], and that axis."""
    rank = len(shape)
    flat = _producer(places, "Reshape")
    if flat is None or rank < 2 or rank_of(places) != 2 or _last(places) != rank:
        return None
    total = _producer(flat.inputs[0], "Add")
    if total is None or rank_of(flat.inputs[0]) != 3 or _last(flat.inputs[0]) != rank:
        return None
    for index in (0, 1):
        offsets, begins = facts.constant(total.inputs[index]), total.inputs[1 - index]
        if offsets is None or begins is None or rank_of(begins) != 3:
            continue
        axis = _covered(offsets, shape)
        ids = None if axis is None else _begins(begins, axis, rank, facts)
        if axis is not None and ids is not None:
            return ids, axis
    return None


def _covered(offsets: np.ndarray, shape: tuple[int, ...]) -> int | None:
    """Return the one axis that the offsets [1, W, rank] stand still on, if they cover all others in order."""
    rank = len(shape)
    if offsets.ndim == 3 and len(offsets) == 1:
        offsets = offsets[0]
    if offsets.ndim != 2 or offsets.shape[1] != rank:
        return None
    for axis in range(rank):
        window = [1 if index == axis else dim for index, dim in enumerate(shape)]
        if np.array_equal(offsets, np.indices(window).reshape(rank, -1).T):
            return axis
    return None


def _begins(value: ir.Value, axis: int, rank: int, facts: Constants) -> ir.Value | None:
    """Match [n, 1, rank], expanded over the window, that is zero but on one axis; return that as [n, 1]."""
    node = _producer(value, "Expand")
    narrow = value if node is None else node.inputs[0]
    if narrow is None or rank_of(narrow) != 3 or _last(narrow) != rank or _middle(narrow) != 1:
        return None
    matrix = _producer(narrow, "Reshape", "Unsqueeze")
    source = None if matrix is None else matrix.inputs[0]
    columns = _producer(source, "Concat")
    if columns is None or rank_of(source) != 2 or int_attribute(columns, "axis", 0) not in (1, -1):
        return None
    if len(columns.inputs) != rank or any(_last(item) != 1 for item in columns.inputs):
        return None
    others = [item for index, item in enumerate(columns.inputs) if index != axis]
    return columns.inputs[axis] if all(facts.is_zeros(item) for item in others) else None


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value, through Identity, if it is one of these operators."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.domain in ONNX_DOMAINS and node.op_type in op_types else None


def _last(value: ir.Value | None) -> int | None:
    return _dim(value, -1)


def _middle(value: ir.Value | None) -> int | None:
    return _dim(value, 1)


def _dim(value: ir.Value | None, index: int) -> int | None:
    shape = None if value is None else value.shape
    dim = None if shape is None or len(shape) == 0 else shape[index]
    return dim if isinstance(dim, int) else None


@register
@dataclass(frozen=True, kw_only=True)
class RaiseWindowScatters(Pass):
    """Make a scatter of rows of one that names every entry of whole rows or columns.

    A window over all axes but one becomes a row of the table with that axis first, between two Transposes.
    What differs from that structure in anything stays.
    """

    name: ClassVar[str] = "raise-window-scatters"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not any(_names_entries(node) for graph in all_graphs(model.graph) for node in graph):
            return NO_CHANGES
        census = Census(model)
        if count := raise_window_scatters(model):
            log.note(f"scatters of every entry made scatters of rows: {count}")
            log.count("scatters", count)
        return census.changes()
