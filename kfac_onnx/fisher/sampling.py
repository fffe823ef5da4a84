"""Which rows of a step the second moment G takes in: a sample of them (`g-rows`), in some steps (`g-every`).

Of the M rows that count, n = min(M, g-rows) are taken, and

    G_new = scale · gᵀg / n        over the sample: its mean, so its expectation is the mean over all M rows

In the other steps n = 0, which leaves G and its count as they are. G takes in the steps 1, 2, 4, 8 and the
multiples of `g-every`, and every step until it has had a batch. The counts A take in every row of every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.graph.rewriter import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import BOOL, FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.presets import Preset
    from kfac_onnx.graph.rewriter import Emitter
    from kfac_onnx.step.draft import Draft

__all__ = ["rows_for_g"]


def rows_for_g(
    rows: ir.Value,
    kept: ir.Value | None,
    lookups: ir.Value,
    count: ir.Value,
    preset: Preset,
    draft: Draft,
    emitter: Emitter,
) -> tuple[ir.Value, ir.Value]:
    """Return the rows that G takes in this step, float32[n, D], and their number as G divides by it.

    `rows` float32[N, D] are zero where `kept` float32[N] is; `lookups` is M, float32; `count` int64 is how
    many batches G has had.
    """
    emit = emitter.derive(phase=Phase.GRADIENTS)
    now = None if preset.g_every == 1 else _now(preset.g_every, count, draft, emit)
    if preset.g_rows is not None:
        return _sample(rows, kept, count, now, preset.g_rows, draft, emit)
    if now is None:
        return rows, lookups
    nothing = emit.constant(np.float32(0.0), "nothing")
    start = emit.constant(np.asarray([0], np.int64), "first")
    size = emit.node("Shape", [rows], attributes={"end": 1}, name="rows", dtype=INT64, shape=[1])
    (end,) = draft.op("TakeNow", [size, now], [Out("rows_for_g", INT64, [1])], Phase.GRADIENTS)
    taken = emit.node(
        "Slice", [rows, start, end, start], name="rows_for_g", dtype=FLOAT, shape=[None, _width(rows)]
    )
    return taken, emit.node("Where", [now, lookups, nothing], name="number_for_g", dtype=FLOAT, shape=[])


def _now(every: int, count: ir.Value, draft: Draft, emit: Emitter) -> ir.Value:
    """Return whether G takes in this step."""
    zero = emit.constant(np.asarray(0, np.int64), "zero")
    first = emit.node("Equal", [count, zero], name="g_has_no_batch", dtype=BOOL, shape=[])
    return emit.node("Or", [draft.due(every), first], name="g_now", dtype=BOOL, shape=[])


def _sample(
    rows: ir.Value,
    kept: ir.Value | None,
    count: ir.Value,
    now: ir.Value | None,
    size: int,
    draft: Draft,
    emit: Emitter,
) -> tuple[ir.Value, ir.Value]:
    wanted = emit.constant(np.asarray(size, np.int64), "g_rows")
    if now is not None:
        (wanted,) = draft.op("TakeNow", [wanted, now], [Out("g_rows_now", INT64, [])], Phase.GRADIENTS)
    places = None
    if kept is not None:
        axis = emit.constant(np.asarray([0], np.int64), "first")
        places = emit.node("NonZero", [kept], name="places", dtype=INT64, shape=[1, None])
        places = emit.node("Squeeze", [places, axis], name="places", dtype=INT64, shape=[None])
        total = emit.node("Size", [places], name="total", dtype=INT64, shape=[])
    else:
        scalar = emit.constant(np.asarray([], np.int64), "scalar")
        total = emit.node("Shape", [rows], attributes={"end": 1}, name="total", dtype=INT64, shape=[1])
        total = emit.node("Reshape", [total, scalar], name="total", dtype=INT64, shape=[])
    (index,) = draft.op("SampleRows", [total, wanted, count], [Out("sample", INT64, [None])], Phase.GRADIENTS)
    if places is not None:
        index = emit.node("Gather", [places, index], name="sample", dtype=INT64, shape=[None])
    taken = emit.node("Gather", [rows, index], name="rows_for_g", dtype=FLOAT, shape=[None, _width(rows)])
    number = emit.node("Size", [index], name="number_for_g", dtype=INT64, shape=[])
    number = emit.node("Cast", [number], attributes={"to": FLOAT}, name="number_for_g", dtype=FLOAT, shape=[])
    if now is not None:
        nothing = emit.constant(np.float32(0.0), "nothing")
        number = emit.node("Where", [now, number, nothing], name="number_for_g", dtype=FLOAT, shape=[])
    return taken, number


def _width(rows: ir.Value) -> int | str | None:
    dim = None if rows.shape is None else rows.shape[1]
    return dim if isinstance(dim, int) else None
