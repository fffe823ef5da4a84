"""Which rows of a step a second moment takes in: a sample of them, in some steps.

Of the M rows that count, n = min(M, rows) are taken, and

    G_new = scale · gᵀg / n        over the sample: its mean, so its expectation is the mean over all M rows

In the other steps n = 0, which leaves G and its count as they are. G takes in the steps 1, 2, 4, 8 and the
multiples of `every`, and every step until it has had a batch. The counts A take in every row of every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import BOOL, FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.place import Place

__all__ = ["GradientRows", "Sample"]

LEAST_ROWS: Final = 1024
"""So many rows are taken whatever their width."""


@dataclass(frozen=True)
class GradientRows:
    """The rows of a step that a second moment averages: rows float32[N, D], number float32 scalar.

    `kept` float32[N] is 0 for a row that does not count and is all zero (None: all count); `scale` is what
    the moment is multiplied by (None: 1).
    """

    rows: ir.Value
    number: ir.Value
    kept: ir.Value | None = None
    scale: ir.Value | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """At most `rows` rows of a batch (None: all), evenly spread and others each time, every `every` steps.

    With `per_column`, and no `rows`, at most max(1024, per_column·D) of them where every row counts: enough
    that G is as good as from all (64 of 1,024 rows changed a loss by 0.0006 where seeds differ by 0.013).
    """

    rows: int | None = None
    every: int = 1
    per_column: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UserError(f"g-rows must be at least 1, not {self.rows}")
        if self.every < 1:
            raise UserError(f"g-every must be at least 1, not {self.every}")

    def bounded(self, dim: int, *, masked: bool) -> Sample:
        """Return the sample for rows of D columns, of which some do not count (`masked`) or all do."""
        if self.rows is not None or self.per_column is None or masked:
            return replace(self, per_column=None)
        return replace(self, rows=max(LEAST_ROWS, self.per_column * dim), per_column=None)

    @property
    def partial(self) -> bool:
        """Whether rows or steps are left out, so that the moment may be zero where the gradient is not."""
        return self.rows is not None or self.every > 1

    def take(self, batch: GradientRows, count: ir.Value, place: Place) -> tuple[ir.Value, ir.Value]:
        """Return the rows of this step, float32[n, D], and their number as the moment divides by it.

        `count` int64 is how many batches the moment has had.
        """
        if not self.partial:
            return batch.rows, batch.number
        now = None if self.every == 1 else self._now(count, place)
        if self.rows is not None:
            return self._sample(self.rows, batch, count, now, place)
        if now is None:
            raise AssertionError("what leaves nothing out is no sample")
        emit = place.emitter(Phase.GRADIENTS)
        start = emit.constant(np.asarray([0], np.int64), "first")
        size = emit.node("Shape", [batch.rows], attributes={"end": 1}, name="rows", dtype=INT64, shape=[1])
        (end,) = place.op("TakeNow", [size, now], [Out("rows_for_g", INT64, [1])])
        rows = emit.node(
            "Slice",
            [batch.rows, start, end, start],
            name="rows_for_g",
            dtype=FLOAT,
            shape=[None, _width(batch.rows)],
        )
        number = emit.node(
            "Where", [now, batch.number, place.number(0.0)], name="number_for_g", dtype=FLOAT, shape=[]
        )
        return rows, number

    def _now(self, count: ir.Value, place: Place) -> ir.Value:
        """Return whether the moment takes in this step."""
        emit = place.emitter(Phase.GRADIENTS)
        zero = emit.constant(np.asarray(0, np.int64), "zero")
        first = emit.node("Equal", [count, zero], name="g_has_no_batch", dtype=BOOL, shape=[])
        return emit.node("Or", [place.draft.due(self.every), first], name="g_now", dtype=BOOL, shape=[])

    def _sample(
        self, size: int, batch: GradientRows, count: ir.Value, now: ir.Value | None, place: Place
    ) -> tuple[ir.Value, ir.Value]:
        emit = place.emitter(Phase.GRADIENTS)
        wanted = emit.constant(np.asarray(size, np.int64), "g_rows")
        if now is not None:
            (wanted,) = place.op("TakeNow", [wanted, now], [Out("g_rows_now", INT64, [])])
        places: ir.Value | None = None
        if batch.kept is not None:
            axis = emit.constant(np.asarray([0], np.int64), "first")
            places = emit.node("NonZero", [batch.kept], name="places", dtype=INT64, shape=[1, None])
            places = emit.node("Squeeze", [places, axis], name="places", dtype=INT64, shape=[None])
            total = emit.node("Size", [places], name="total", dtype=INT64, shape=[])
        else:
            scalar = emit.constant(np.asarray([], np.int64), "scalar")
            total = emit.node(
                "Shape", [batch.rows], attributes={"end": 1}, name="total", dtype=INT64, shape=[1]
            )
            total = emit.node("Reshape", [total, scalar], name="total", dtype=INT64, shape=[])
        (index,) = place.op("SampleRows", [total, wanted, count], [Out("sample", INT64, [None])])
        if places is not None:
            index = emit.node("Gather", [places, index], name="sample", dtype=INT64, shape=[None])
        rows = emit.node(
            "Gather", [batch.rows, index], name="rows_for_g", dtype=FLOAT, shape=[None, _width(batch.rows)]
        )
        number = emit.node("Size", [index], name="number_for_g", dtype=INT64, shape=[])
        number = emit.node(
            "Cast", [number], attributes={"to": FLOAT}, name="number_for_g", dtype=FLOAT, shape=[]
        )
        if now is not None:
            number = emit.node(
                "Where", [now, number, place.number(0.0)], name="number_for_g", dtype=FLOAT, shape=[]
            )
        return rows, number


def _width(rows: ir.Value) -> int | str | None:
    dim = None if rows.shape is None else rows.shape[1]
    return dim if isinstance(dim, int) else None
