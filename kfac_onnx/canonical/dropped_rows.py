"""Rows that a graph drops before it scatters them, as masks.

JAX adds the rows of a gradient whose id is valid, and only those, as jax2onnx writes it:

    kept   = NonZero(And(ids >= 0, ids <= V - 1))
    result = ScatterND(base, Gather(ids, kept), Gather(rows, kept), add)

Adding zeros changes nothing, so the same is

    result = ScatterND(base, Where(valid, ids, 0), Where(valid, rows, 0), add)

in which every row of dL/d(lookup) is still there, with a condition that says whether it is dropped. Where
the ids are the same at every step and all valid, nothing is dropped and no condition needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.numbering import Numbering
from kfac_onnx.graph.operators import SCATTERS, VIEWS
from kfac_onnx.graph.values import (
    ONNX_DOMAINS,
    all_graphs,
    constant,
    dtype_of,
    int_attribute,
    operators_in,
    rank_of,
)
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


__all__ = ["MaskDroppedRows", "mask_dropped_rows"]


def mask_dropped_rows(model: ir.Model) -> int:
    """Rewrite scatters of selected rows to scatters of masked rows; return how many there were."""
    names, numbering = Context.of(model), Numbering()
    facts = Constants(model.graph.inputs, model.opset_imports.get("", 18))
    changed = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if node.domain not in ONNX_DOMAINS or not _adds_rows(node):
                continue
            changed += _mask(names, numbering, facts, node)
    return changed


def _adds_rows(node: ir.Node) -> bool:
    if node.op_type not in SCATTERS:
        return False
    reduction = node.attributes.get("reduction")
    adds = reduction is not None and reduction.as_string() == "add"
    return adds and (node.op_type == "ScatterND" or int_attribute(node, "axis", 0) == 0)


def _mask(names: Context, numbering: Numbering, facts: Constants, node: ir.Node) -> bool:
    picked_ids, picked_rows = _selection(node.inputs[1]), _selection(node.inputs[2])
    if picked_ids is None or picked_rows is None or not numbering.same(picked_ids[1], picked_rows[1]):
        return False
    (ids, kept), (rows, _) = picked_ids, picked_rows
    always = facts.constant(kept)
    if always is not None and np.all(always):
        node.replace_input_with(1, ids)
        node.replace_input_with(2, rows)
        return True
    kind, number = dtype_of(rows), dtype_of(ids)
    ranks = (rank_of(ids), rank_of(rows))
    if kind is None or number is None or any(rank is None or rank == 0 for rank in ranks):
        return False
    emit = Emitter.in_place_of(names, node, "kept")
    for index, value, dtype, rank in ((1, ids, number, ranks[0]), (2, rows, kind, ranks[1])):
        axes = emit.ints(*range(1, rank or 1))
        condition = kept if rank == 1 else emit.op("Unsqueeze", kept, axes)
        masked = emit.op("Where", condition, value, emit.scalar(0, dtype))
        masked.type, masked.shape = value.type, value.shape
        node.replace_input_with(index, masked)
    if node.graph is not None:
        node.graph.insert_before(node, emit.nodes)
    return True


def _selection(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return (source, bool[n]) of a value that is the rows of the source where the condition is true."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ONNX_DOMAINS or len(node.inputs) < 2:
        return None
    source, chosen = node.inputs[:2]
    if source is None or chosen is None:
        return None
    match node.op_type:
        case "Gather" if int_attribute(node, "axis", 0) == 0 and rank_of(chosen) == 1:
            condition = _condition_of_positions(chosen)
        case "GatherND" if int_attribute(node, "batch_dims", 0) == 0 and rank_of(chosen) == 2:
            condition = _condition_of_positions(chosen)
        case "Compress" if "axis" in node.attributes and int_attribute(node, "axis", 0) == 0:
            condition = chosen
        case _:
            condition = None
    return None if condition is None else (source, condition)


def _condition_of_positions(value: ir.Value | None) -> ir.Value | None:
    """Return the bool[n] whose true positions a value lists, otherwise None."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            return None
        if node.op_type == "NonZero":
            found = node.inputs[0]
            return found if rank_of(found) == 1 and _is_bool(found) else None
        if node.op_type == "Gather":
            if not _is_only_row(node):
                return None
        elif node.op_type not in VIEWS:  # of NonZero's int64[1, n]
            return None
        value = node.inputs[0]
    return None


def _is_only_row(node: ir.Node) -> bool:
    """Say whether a Gather reads the first and only row of a matrix, as of NonZero's int64[1, n]."""
    source, index = node.inputs[0], constant(node.inputs[1])
    one_row = source is not None and source.shape is not None and list(source.shape)[:1] == [1]
    first = index is not None and index.size == 1 and not np.any(index)
    return one_row and rank_of(source) == 2 and first and int_attribute(node, "axis", 0) == 0


def _is_bool(value: ir.Value | None) -> bool:
    dtype = dtype_of(value)
    return dtype is not None and dtype.name == "BOOL"


@register
@dataclass(frozen=True, kw_only=True)
class MaskDroppedRows(Pass):
    """Scatter all rows of a gradient, masked, where a graph selects the valid ones before it scatters them.

    The rows that Gather, GatherND or Compress select by NonZero of a condition become
    Where(condition, row, 0), and their ids Where(condition, id, 0). Where the condition is constant and
    always true, the selection goes.
    """

    name: ClassVar[str] = "mask-dropped-rows"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not operators_in(model) & {"NonZero", "Compress"}:
            return NO_CHANGES
        census = Census(model)
        if count := mask_dropped_rows(model):
            log.note(f"rows dropped before a scatter are masked: {count}")
            log.count("scatters", count)
        return census.changes()
