"""Making the scatters of a graph safe to run with many threads (see `lowering.scatter`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx.canonical.lowering.rows import scatter_nd
from kfac_onnx.canonical.lowering.scatter import scatter_elements
from kfac_onnx.canonical.row_sums import add_rows, joined_column
from kfac_onnx.errors import UserError
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import HALF_TYPES, Emitter, Miss, replace_node
from kfac_onnx.graph.values import (
    ONNX_DOMAINS,
    all_graphs,
    constant,
    dtype_of,
    int_attribute,
    is_filled,
    static_shape,
)
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


__all__ = ["RaceFreeScatters", "make_scatters_race_free", "provably_unique"]


def make_scatters_race_free(model: ir.Model) -> int:
    """Rewrite every reducing ScatterND whose indices may repeat to ScatterElements; return how many.

    Reducing scatters in half precision get their sums in float32: they have no CPU kernel of their own.

    Raises:
        UserError: if a reducing ScatterND has an unknown type or number of index columns.

    """
    names = Context.of(model)
    changed = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if not _races(node):
                continue
            rewrite = _as_elements if node.op_type == "ScatterND" else _in_float
            _replace(node, rewrite(Emitter.in_place_of(names, node, "scatter"), node))
            changed += 1
    return changed


def _races(node: ir.Node) -> bool:
    """Say whether a scatter may add to one place from two threads, or has no kernel for its type."""
    if node.domain not in ONNX_DOMAINS or _reduction(node) == "none":
        return False
    if node.op_type == "ScatterND":
        return not provably_unique(node)
    return node.op_type == "ScatterElements" and dtype_of(node.inputs[2]) in HALF_TYPES


def _reduction(node: ir.Node) -> str:
    found = node.attributes.get("reduction")
    return "none" if found is None else found.as_string()


def _replace(node: ir.Node, outcome: tuple[Emitter, ir.Value] | Miss) -> None:
    if isinstance(outcome, Miss):
        raise UserError(
            f"the scatter node '{node.name}' cannot be made safe for several threads: {outcome.reason}",
            help="export the model with static shapes of its index tensors",
        )
    emit, result = outcome
    replace_node(node, emit, [result])


def _as_elements(emit: Emitter, node: ir.Node) -> tuple[Emitter, ir.Value] | Miss:
    data, indices, updates = node.inputs[:3]
    dtype = dtype_of(updates) or dtype_of(data)
    if data is None or indices is None or updates is None or dtype is None:
        return Miss("the type of its updates is unknown")
    static = static_shape(data) or static_shape(node.outputs[0])
    shape = emit.ints(*static) if static is not None else emit.op("Shape", data)
    if _reduction(node) == "add" and data.producer() is not None and is_filled(data, 0):
        joined = joined_column(indices)
        if joined is not None:
            return emit, add_rows(emit, shape, static, joined, updates, dtype)
    result = scatter_nd(emit, data, shape, static, indices, updates, dtype, _reduction(node))
    return result if isinstance(result, Miss) else (emit, result)


def _in_float(emit: Emitter, node: ir.Node) -> tuple[Emitter, ir.Value] | Miss:
    data, indices, updates = node.inputs[:3]
    dtype = dtype_of(updates)
    if data is None or indices is None or updates is None or dtype is None:
        return Miss("the type of its updates is unknown")
    result = scatter_elements(
        emit,
        data,
        emit.op("Shape", data),
        indices,
        updates,
        axis=int_attribute(node, "axis", 0),
        dtype=dtype,
        reduction=_reduction(node),
    )
    return emit, result


def provably_unique(node: ir.Node) -> bool:
    """Say whether the indices are constants that never name one place twice."""
    indices, shape = constant(node.inputs[1]), static_shape(node.inputs[0])
    if indices is None or shape is None or indices.ndim == 0:
        return False
    columns = indices.shape[-1]
    rows = indices.reshape(-1, columns)
    wrapped = np.where(rows < 0, rows + np.array(shape[:columns]), rows)
    return len(np.unique(wrapped, axis=0)) == len(wrapped)


@register
@dataclass(frozen=True, kw_only=True)
class RaceFreeScatters(Pass):
    """Make scatters safe to run with many threads: ScatterElements instead of a reducing ScatterND.

    A ScatterND whose indices are constant and never name a place twice stays. Scatters in half precision
    add up in float32. Where the ids of a sum into zeros join several vectors, each vector gets a scatter.
    """

    name: ClassVar[str] = "race-free-scatters"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not any(_races(node) for graph in all_graphs(model.graph) for node in graph):
            return NO_CHANGES
        census = Census(model)
        if count := make_scatters_race_free(model):
            log.note(f"scatters made safe for several threads: {count}")
            log.count("scatters", count)
        return census.changes()
