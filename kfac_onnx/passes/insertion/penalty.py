"""The gradient of a table's penalty, beside its preconditioned rows.

    all    W ← W − lr·(update + T)          T the penalty's gradient, dense in the table: O(V·D) a step
    rows   W[u] ← W[u] − lr·(update + c·W[u])   T = c·W, for each looked-up id u once: O(lookups·D) a step

A penalty that goes through a preconditioner is no longer the one that was asked for: Loshchilov & Hutter
2019, section 2, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from kfac_onnx.fisher.row_scales import RowUpdate
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.passes.insertion.writing import as_float32, rows_at, to_rows
from kfac_onnx.step.draft import FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter
    from kfac_onnx.metadata import Site
    from kfac_onnx.step.draft import Draft

__all__ = ["with_penalty"]


def with_penalty(
    site: Site, result: RowUpdate, where: Literal["all", "rows", "refuse"], draft: Draft
) -> RowUpdate:
    """Return the update of a table with the gradient of its penalty added."""
    if site.penalty is None or result.step:
        raise AssertionError("only an update of a penalized table, without its learning rate, is completed")
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    if where == "rows" and result.ids is not None:
        decay = _looked_up(site, result.ids, emit, draft)
        update = emit.node(
            "Add", [result.update, decay], name="penalized", dtype=FLOAT, shape=[None, site.embedding_dim]
        )
        draft.flag(update)
        return replace(result, update=update)
    shape = [site.vocab_size, site.embedding_dim]
    table = result.update
    if result.ids is not None:
        (table,) = draft.op(
            "ScatterRows",
            [result.ids, result.update],
            [Out("scattered", FLOAT, shape)],
            Phase.PRECONDITION,
            vocab_size=site.vocab_size,
        )
    penalty = to_rows(emit, as_float32(emit, draft.value(site.penalty), "penalty"), site)
    total = emit.node("Add", [table, penalty], name="penalized", dtype=FLOAT, shape=shape)
    draft.flag(total)
    return RowUpdate(None, total, unique=True)


def _looked_up(site: Site, ids: ir.Value, emit: Emitter, draft: Draft) -> ir.Value:
    """Emit c·W[u] for each lookup, divided among those of an id so that it counts once, float32[N, D]."""
    if site.decay is None:
        raise AssertionError("the pass refuses rows of a penalty that is no number times the table")
    width = [None, site.embedding_dim]
    _, _, place, count = emit.node(
        "Unique",
        [ids],
        outputs=[
            Out("unique_ids", INT64, [None]),
            Out("first", INT64, [None]),
            Out("place", INT64, [None]),
            Out("count", INT64, [None]),
        ],
    )
    lookups = emit.node("Gather", [count, place], name="lookups_of_id", dtype=INT64, shape=[None])
    divisor = emit.node(
        "Cast", [lookups], attributes={"to": FLOAT}, name="divisor", dtype=FLOAT, shape=[None]
    )
    share = emit.node("Div", [draft.value(site.decay), divisor], name="share", dtype=FLOAT, shape=[None])
    if site.keep is not None and ids is draft.values.get(site.ids or ""):
        share = emit.node("Mul", [share, draft.value(site.keep)], name="share", dtype=FLOAT, shape=[None])
    axis = emit.constant(np.asarray([1], np.int64), "last_axis")
    share = emit.node("Unsqueeze", [share, axis], name="share", dtype=FLOAT, shape=[None, 1])
    rows = rows_at(emit, draft.parameter(site.parameter), ids, site)
    draft.remember(rows)
    return emit.node("Mul", [rows, share], name="decay", dtype=FLOAT, shape=width)
