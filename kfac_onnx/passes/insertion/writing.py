"""Writes an update into a parameter: rows in place, or a whole tensor in two buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase, RowGradient, Site
from kfac_onnx.step.draft import FLOAT, INT64, Draft

if TYPE_CHECKING:
    from kfac_onnx.fisher.row_scales import RowUpdate
    from kfac_onnx.graph.emit import Emitter

__all__ = [
    "as_float32",
    "drop_gradient",
    "from_rows",
    "keep_parameter",
    "rows_at",
    "takes_steps",
    "to_rows",
    "write_table",
]

_APPLY = {"rows": "ApplyRows", "columns": "ApplyColumns", "flat": "ApplyFlat"}


def drop_gradient(draft: Draft, name: str | None) -> None:
    """Take a gradient out of the graph's outputs: the step uses it, nobody else needs it.

    Where the exporter gave it as rows and their ids, those go too.
    """
    names = [] if name is None else [name]
    for pair in metadata.read_list(draft.model, "row_gradients", RowGradient):
        names += [pair.values, pair.indices] if pair.gradient == name else []
    for value in map(draft.values.get, names):
        while value is not None and value.is_graph_output():
            draft.model.graph.outputs.remove(value)
            draft.emitter.count(removed=1)


def as_float32(emit: Emitter, value: ir.Value, name: str) -> ir.Value:
    """Return a value as float32."""
    if value.dtype == FLOAT:
        return value
    return emit.node("Cast", [value], attributes={"to": FLOAT}, name=name, dtype=FLOAT, shape=value.shape)


def keep_parameter(draft: Draft, weight: ir.Value, new: ir.Value) -> None:
    """Make float32 `new` the parameter's next value, in the parameter's own dtype."""
    if weight.dtype is not None and weight.dtype != FLOAT:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        new = emit.node(
            "Cast", [new], attributes={"to": weight.dtype}, name="new", dtype=weight.dtype, shape=weight.shape
        )
        draft.flag(new)  # what is finite in float32 may be beyond half precision
    draft.keep(weight, new, Phase.PRECONDITION)


def write_table(site: Site, result: RowUpdate, rate: ir.Value, draft: Draft, *, decay: float = 0.0) -> None:
    """Emit W ← W − lr · update: a scatter in the commit phase, or a whole-table step for tied tables.

    `decay` is of whole-table steps alone: rows bring theirs in `result`.
    """
    weight = draft.parameter(site.parameter)
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    if result.ids is None:
        _write_whole(site, result.update, weight, rate, draft, decay)
        return
    if result.step:
        (written,) = draft.op(
            "AddRows",
            [weight, result.ids, result.update],
            [Out("written", FLOAT, weight.shape)],
            Phase.COMMIT,
        )
        _in_place(draft, weight, written, None)
        return
    if weight.dtype == FLOAT:
        (written,) = draft.op(
            _APPLY[site.layout],
            [weight, result.ids, result.update, rate],
            [Out("written", FLOAT, weight.shape)],
            Phase.COMMIT,
        )
        _in_place(draft, weight, written, None)
        return
    if site.layout != "rows":
        shape = [site.vocab_size, site.embedding_dim]
        (table,) = draft.op(
            "ScatterRows",
            [result.ids, result.update],
            [Out("scattered", FLOAT, shape)],
            Phase.PRECONDITION,
            vocab_size=site.vocab_size,
        )
        _write_whole(site, table, weight, rate, draft)
        return
    # A half-precision table: repeated rows are summed in float32 and rounded once.
    ids, update = result.ids, result.update
    if not result.unique:
        outs = [Out("unique_ids", INT64, [None]), Out("merged", FLOAT, [None, site.embedding_dim])]
        ids, update = draft.op("MergeRows", [ids, update], outs, Phase.PRECONDITION)
    before = emit.node("Gather", [weight, ids], name="rows_before", dtype=weight.dtype, shape=update.shape)
    draft.remember(before)
    (after,) = draft.op(
        "Sgd",
        [as_float32(emit, before, "rows_before"), update, rate],
        [Out("rows_after", FLOAT, update.shape)],
        Phase.PRECONDITION,
    )
    rounded = emit.node(
        "Cast",
        [after],
        attributes={"to": weight.dtype},
        name="rows_after",
        dtype=weight.dtype,
        shape=update.shape,
    )
    draft.flag(rounded)
    (written,) = draft.op(
        "WriteRows", [weight, ids, rounded], [Out("written", weight.dtype, weight.shape)], Phase.COMMIT
    )
    _in_place(draft, weight, written, before)


def to_rows(emit: Emitter, gradient: ir.Value, site: Site) -> ir.Value:
    """Return a gradient in the parameter's layout as float32[V, D]."""
    if gradient.dtype != FLOAT:
        gradient = emit.node("Cast", [gradient], attributes={"to": FLOAT}, name="gradient", dtype=FLOAT)
    shape = [site.vocab_size, site.embedding_dim]
    if site.layout == "columns":
        return emit.node(
            "Transpose", [gradient], attributes={"perm": [1, 0]}, name="gradient", dtype=FLOAT, shape=shape
        )
    if site.layout == "flat":
        target = emit.constant(np.asarray(shape, np.int64), "table_shape")
        return emit.node("Reshape", [gradient, target], name="gradient", dtype=FLOAT, shape=shape)
    return gradient


def rows_at(emit: Emitter, weight: ir.Value, ids: ir.Value, site: Site) -> ir.Value:
    """Return the rows of some ids of a stored table, float32[N, D]; nothing of the table's size is made."""
    shape, axis = [None, site.embedding_dim], {"axis": 0}
    if site.layout == "flat":
        target = emit.constant(np.asarray([site.vocab_size, site.embedding_dim], np.int64), "table_shape")
        weight = emit.node("Reshape", [weight, target], name="table", dtype=weight.dtype)
    if site.layout == "columns":
        shape, axis = shape[::-1], {"axis": 1}
    rows = emit.node(
        "Gather", [weight, ids], attributes=axis, name="rows_before", dtype=weight.dtype, shape=shape
    )
    if site.layout == "columns":
        turned = {"perm": [1, 0]}
        rows = emit.node("Transpose", [rows], attributes=turned, name="rows_before", dtype=rows.dtype)
    rows.shape = ir.Shape([None, site.embedding_dim])
    return as_float32(emit, rows, "rows_before")


def from_rows(emit: Emitter, table: ir.Value, site: Site) -> ir.Value:
    """Return float32[V, D] in the parameter's layout."""
    if site.layout == "columns":
        shape = [site.embedding_dim, site.vocab_size]
        return emit.node(
            "Transpose", [table], attributes={"perm": [1, 0]}, name="stored", dtype=FLOAT, shape=shape
        )
    if site.layout == "flat":
        flat = emit.constant(np.asarray([-1], np.int64), "flat")
        size = site.vocab_size * site.embedding_dim
        return emit.node("Reshape", [table, flat], name="stored", dtype=FLOAT, shape=[size])
    return table


def takes_steps(site: Site, draft: Draft) -> bool:
    """Return whether the table's rows can be given as their whole step, the learning rate included."""
    if site.penalty is not None:
        return False
    return site.layout == "rows" and site.dense is None and draft.value(site.parameter).dtype == FLOAT


def _in_place(draft: Draft, weight: ir.Value, written: ir.Value, fallback: ir.Value | None) -> None:
    node = written.producer()
    if node is not None:
        draft.guard(node, 2, fallback)
    draft.write(weight, written, Phase.COMMIT)


def _write_whole(
    site: Site, update: ir.Value, weight: ir.Value, rate: ir.Value, draft: Draft, decay: float = 0.0
) -> None:
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    table = (
        to_rows(emit, weight, site)
        if weight.dtype == FLOAT
        else to_rows(emit, as_float32(emit, weight, "W"), site)
    )
    if decay:
        outs = [Out("decayed", FLOAT, table.shape)]
        (table,) = draft.op("DecayWeights", [table, rate], outs, Phase.PRECONDITION, decay=decay)
    (new,) = draft.op(
        "Sgd",
        [table, update, rate],
        [Out("new", FLOAT, [site.vocab_size, site.embedding_dim])],
        Phase.PRECONDITION,
    )
    keep_parameter(draft, weight, from_rows(emit, new, site))


def zeros_like(emit: Emitter, dtype: ir.DataType) -> ir.Value:
    """Return the scalar zero of a dtype, for a `Where`."""
    return emit.constant(np.zeros((), dtype.numpy()), "nothing")
