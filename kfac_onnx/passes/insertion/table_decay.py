"""Decoupled decay of a table's rows, made up when a row is looked up: O(lookups·D) a step.

    l_t = l_{t−1} + log(1 − lr_t·λ)                    one number per table
    W[u] ← W[u]·exp(l_t − l[u]) − lr_t·update[u]       l[u] ← l_t, for each looked-up id u once

l[u] is l as of the step that last looked u up (0 at first), so at each of its lookups a row has shrunk by the
product of 1 − lr_s·λ over all steps s since: exactly what decay of the whole table in each step takes off,
whatever the schedule and however seldom the row comes. Dividing lr·λ by a row's frequency p instead is right
on average only, and overshoots where p < lr·λ. What a row has yet to lose while nobody looks it up is not
seen by its next lookup's forward pass, nor by an export. A whole-table update decays the whole table.

Sources: Loshchilov & Hutter 2019, algorithm 2 (https://arxiv.org/abs/1711.05101); rows that catch up:
Langford, Li & Zhang 2009, section 5 (https://jmlr.org/papers/v10/langford09a.html).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.fisher.place import Place
from kfac_onnx.fisher.row_scales import RowUpdate, merge_lookups
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.passes.insertion.writing import rows_at
from kfac_onnx.step.draft import BOOL, DOUBLE, FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.metadata import Site
    from kfac_onnx.step.draft import Draft

__all__ = ["with_decay"]

_LEAST: Final = 1e-30
"""What is left of a row by a step whose lr·λ is 1 or more."""
_WIDTH: Final = 1
"""Columns of what is merged to tell which ids are looked up."""


def with_decay(
    site: Site, result: RowUpdate, rate: ir.Value, decay: float, draft: Draft
) -> tuple[RowUpdate, ir.Value]:
    """Return the update of a table's rows with their decay added, and the rate that it is taken with."""
    if result.ids is None:
        raise AssertionError("a whole table decays where it is written")
    place = Place(draft, f"kfac/{site.parameter}", site.parameter)
    ids, shrink = _shrinkage(site, rate, decay, place)
    emit, width = place.emitter(Phase.PRECONDITION), [None, site.embedding_dim]
    before = rows_at(emit, draft.parameter(site.parameter), ids, site)
    rows = emit.node("Mul", [before, shrink], name="decay", dtype=FLOAT, shape=width)
    update = result.update
    if not result.step:  # then W ← W − 1·(lr·update − decay): a decay over lr would need lr > 0
        update = emit.node("Mul", [update, rate], name="scaled", dtype=FLOAT, shape=width)
        rows = emit.node("Neg", [rows], name="decay", dtype=FLOAT, shape=width)
    along = {"axis": 0}
    all_ids = emit.node("Concat", [result.ids, ids], attributes=along, name="ids", dtype=INT64, shape=[None])
    decayed = emit.node("Concat", [update, rows], attributes=along, name="decayed", dtype=FLOAT, shape=width)
    draft.remember(before, all_ids, decayed)
    draft.flag(decayed)
    rate = rate if result.step else place.number(1.0)
    return replace(result, ids=all_ids, update=decayed, unique=False), rate


def _shrinkage(site: Site, rate: ir.Value, decay: float, place: Place) -> tuple[ir.Value, ir.Value]:
    """Emit ids int64[K] and exp(l_t − l[u]) − 1, float32[K, 1]: 0 but once for each id that is looked up."""
    draft, emit = place.draft, place.emitter(Phase.PRECONDITION)
    now = _logarithm(rate, decay, place)
    ids, places, count = merge_lookups(
        draft.value(site.ids or ""), _ones(site, place), site.vocab_size, place, slot="decay.slot"
    )
    state = draft.state(
        f"{place.prefix}/decay.at", DOUBLE, [site.vocab_size], "zeros", "optimizer", parameter=site.parameter
    )
    before = emit.node("GatherElements", [state, ids], name="decay.before", dtype=DOUBLE, shape=[None])
    draft.remember(before)
    axis = emit.constant(np.asarray([1], np.int64), "last_axis")
    count = emit.node("Squeeze", [count, axis], name="count", dtype=FLOAT, shape=[None])
    # An id may come again, with a count of 0; and its lookups may all be ones that the graph drops.
    first = emit.node("Greater", [count, place.number(0.0)], name="first", dtype=BOOL, shape=[None])
    present = emit.node("Gather", [first, places], name="present", dtype=BOOL, shape=[None])
    after = emit.node("Where", [present, now, before], name="decay.after", dtype=DOUBLE, shape=[None])
    (written,) = place.op(
        "WriteRows", [state, ids, after], [Out("decay.at", DOUBLE, state.shape)], Phase.COMMIT
    )
    node = written.producer()
    if node is not None:
        draft.guard(node, 2, before)
    draft.write(state, written, Phase.COMMIT)
    since = emit.node("Sub", [now, before], name="since", dtype=DOUBLE, shape=[None])
    left = emit.node("Exp", [since], name="left", dtype=DOUBLE, shape=[None])
    one, zero = (emit.constant(np.float64(number), "number64") for number in (1.0, 0.0))
    less = emit.node("Sub", [left, one], name="shrink", dtype=DOUBLE, shape=[None])
    once = emit.node("Where", [first, less, zero], name="shrink", dtype=DOUBLE, shape=[None])
    shrink = emit.node("Cast", [once], attributes={"to": FLOAT}, name="shrink", dtype=FLOAT, shape=[None])
    return ids, emit.node("Unsqueeze", [shrink, axis], name="shrink", dtype=FLOAT, shape=[None, 1])


def _logarithm(rate: ir.Value, decay: float, place: Place) -> ir.Value:
    """Emit l_t, float64 scalar, and keep it."""
    emit = place.emitter(Phase.PRECONDITION)
    old = place.counter("decay.log", DOUBLE)
    factor, one, least = (emit.constant(np.float64(number), "number64") for number in (decay, 1.0, _LEAST))
    rate = emit.node("Cast", [rate], attributes={"to": DOUBLE}, name="rate", dtype=DOUBLE, shape=[])
    lost = emit.node("Mul", [rate, factor], name="lost", dtype=DOUBLE, shape=[])
    left = emit.node("Sub", [one, lost], name="left", dtype=DOUBLE, shape=[])
    left = emit.node("Max", [left, least], name="left", dtype=DOUBLE, shape=[])
    term = emit.node("Log", [left], name="log", dtype=DOUBLE, shape=[])
    new = emit.node("Add", [old, term], name="decay.log", dtype=DOUBLE, shape=[])
    place.draft.keep(old, new, Phase.PRECONDITION)
    return new


def _ones(site: Site, place: Place) -> ir.Value:
    """Return what each lookup counts, float32[N, 1]: 1, or 0 where the graph drops it."""
    emit, draft = place.emitter(Phase.GRADIENTS), place.draft
    axis = emit.constant(np.asarray([1], np.int64), "last_axis")
    if site.keep is not None:
        keep = draft.value(site.keep)
        return emit.node("Unsqueeze", [keep, axis], name="kept", dtype=FLOAT, shape=[None, _WIDTH])
    size = emit.node("Shape", [draft.value(site.ids or "")], name="ids_shape", dtype=INT64, shape=[1])
    shape = emit.node("Concat", [size, axis], attributes={"axis": 0}, name="shape", dtype=INT64, shape=[2])
    return emit.node("Expand", [place.number(1.0), shape], name="ones", dtype=FLOAT, shape=[None, _WIDTH])
