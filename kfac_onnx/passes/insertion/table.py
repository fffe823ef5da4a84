"""The nodes that one table's block needs: preconditioned rows on top of its factors.

With ids u and rows g of the lookups of a step, and the table's gradient Grad:

    update = (A + damping_a)^e · Grad · (G + damping_g·I)^e · c^e        c = 1, or U for U independent uses

The map from Grad to update is linear, so for the row scale `factor` it is applied to each lookup's row and
repeated rows add up when the table is written. `adagrad` and `window` square, so rows are merged first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.graph.rewriter import Emitter, Out
from kfac_onnx.metadata import Phase, Site
from kfac_onnx.passes.insertion.factors import TableFactors
from kfac_onnx.step.draft import DOUBLE, FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RowUpdate", "TableBlock"]


@dataclass(frozen=True)
class RowUpdate:
    """What a table's rows get: ids int64[N] with update float32[N, D], or `dense` float32[V, D]."""

    ids: ir.Value | None
    update: ir.Value
    unique: bool
    """Whether no id occurs twice."""
    step: bool = False
    """Whether −lr is in it, so that the rows are added as they are."""

    @property
    def dense(self) -> bool:
        """Whether the update covers the whole table."""
        return self.ids is None


class TableBlock(TableFactors):
    """Emits the block of one site: its factors, and the update of its rows."""

    def update(self, rate: ir.Value | None = None) -> RowUpdate:
        """Emit everything and return the update of the table's rows.

        Given the learning rate, the rows of a sparse update are what is added to the table: −lr is in them.
        """
        with self.draft.at(self.emit):
            lookups = self._lookups()
            if self.preset.row_scale == "factor":
                gain, total = self._input_factor(lookups)
                ghat = self._output_factor(lookups)
                damping_a, damping_g = self._dampings(total, ghat)
                root = self._active(self._root(ghat, damping_g), ghat, lookups)
                result = self._by_counts(gain, damping_a, root, rate)
            else:
                ghat = self._output_factor(lookups)
                one = self.emit.constant(np.float32(1.0), "one")
                _, damping_g = self._dampings(one, ghat)
                root = self._active(self._root(ghat, damping_g), ghat, lookups)
                result = self._by_squares(root, lookups)
            self.draft.flag(result.update)
        return result

    def dense_gradient(self) -> ir.Value:
        """Return the table's whole gradient as float32[V, D] (a tied table)."""
        emit = self.emit.derive(phase=Phase.PRECONDITION)
        if self.site.dense is None:
            raise AssertionError("only tied tables have a dense gradient")
        return to_rows(emit, self.draft.value(self.site.dense), self.site)

    def _by_counts(
        self, gain: ir.Value, damping_a: ir.Value, root: ir.Value, rate: ir.Value | None
    ) -> RowUpdate:
        draft, exponent = self.draft, self.preset.exponent
        emit = self.emit.derive(phase=Phase.PRECONDITION)
        counts = emit.node(
            "GatherElements", [self.counts, self.ids], name="A.after", dtype=FLOAT, shape=[None]
        )
        draft.remember(counts)
        for entry in draft.settings.get("undo", []):
            if entry["state"] == self._name("A"):
                entry["after"] = counts.name
        if self.preset.coefficient != 1.0:  # (c·(a + damping_a))^e = c^e·(a + damping_a)^e
            c = emit.constant(np.float32(self.preset.coefficient), "coefficient")
            gain = emit.node("Mul", [gain, c], name="gain", dtype=FLOAT, shape=[])
            damping_a = emit.node("Mul", [damping_a, c], name="damping_a", dtype=FLOAT, shape=[])
        if self.site.dense is not None:
            (update,) = draft.op(
                "PreconditionDense",
                [self.dense_gradient(), self.counts, gain, damping_a, root],
                [Out("update", FLOAT, [self.V, self.D])],
                Phase.PRECONDITION,
                exponent=exponent,
            )
            return RowUpdate(None, update, unique=True)
        a = emit.node("Mul", [counts, gain], name="a", dtype=FLOAT, shape=[None])
        if rate is None:
            scale = emit.constant(np.float32(1.0), "one")
        else:
            scale = emit.node("Neg", [rate], name="scale", dtype=FLOAT, shape=[])
        (update,) = draft.op(
            "PreconditionRows",
            [self.rows, a, damping_a, root, scale],
            [Out("update" if rate is None else "step", FLOAT, [None, self.D])],
            Phase.PRECONDITION,
            exponent=exponent,
        )
        return RowUpdate(self.ids, update, unique=False, step=rate is not None)

    def _by_squares(self, root: ir.Value, lookups: ir.Value) -> RowUpdate:
        """Row scales from squares of the rotated gradient: presets `adagrad` and `adaptive`."""
        draft, emit = self.draft, self.emit.derive(phase=Phase.PRECONDITION)
        dense = self.site.dense is not None
        if dense:
            ids, rows = None, self.dense_gradient()
        else:
            outs = [Out("unique_ids", INT64, [None]), Out("merged", FLOAT, [None, self.D])]
            ids, rows = draft.op("MergeRows", [self.ids, self.rows], outs, Phase.PRECONDITION)
        rotated = emit.node("MatMul", [rows, root], name="rotated", dtype=FLOAT, shape=rows.shape)
        what = "squares" if self.preset.row_scale == "adagrad" else "window"
        old = draft.state(self._name(what), FLOAT, [self.V], "zeros", "factor", parameter=self.site.parameter)
        held = (
            old
            if ids is None
            else emit.node("GatherElements", [old, ids], name=f"{what}.before", dtype=FLOAT, shape=[None])
        )
        draft.remember(held)
        outs = [Out("update", FLOAT, rows.shape), Out(what, FLOAT, held.shape)]
        if self.preset.row_scale == "adagrad":
            update, new = draft.op(
                "RowAdagrad", [rotated, held], outs, Phase.PRECONDITION, epsilon=self.preset.epsilon
            )
        else:
            retain, fresh, unscale = self._window(None if dense else old, lookups)
            decayed = emit.node("Mul", [held, retain], name="window.decayed", dtype=FLOAT, shape=held.shape)
            update, new = draft.op("RowWindow", [rotated, decayed, fresh], outs, Phase.PRECONDITION)
            if unscale is not None:
                new = emit.node("Mul", [new, unscale], name="window.stored", dtype=FLOAT, shape=held.shape)
        draft.flag(new)
        if ids is None:
            draft.keep(old, new, Phase.PRECONDITION)
            return RowUpdate(None, update, unique=True)
        (written,) = draft.op("WriteRows", [old, ids, new], [Out(what, FLOAT, [self.V])], Phase.COMMIT)
        node = written.producer()
        if node is not None:
            draft.guard(node, 2, held)
        draft.write(old, written, Phase.COMMIT)
        return RowUpdate(ids, update, unique=True)

    def _window(
        self, vector: ir.Value | None, lookups: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Return retain, fresh and unscale; a dense `window` is stored as it is, without a running scale."""
        emit = self.emit.derive(phase=Phase.GRADIENTS)
        count = self._counter("window.count", INT64, 0.0)
        one = emit.constant(np.float64(1.0), "one64")
        scale = one if vector is None else self._counter("window.scale", DOUBLE, 1.0)
        outs = [
            Out("window.scale", DOUBLE, []),
            Out("window.count", INT64, []),
            Out("retain", FLOAT, []),
            Out("fresh", FLOAT, []),
            Out("unscale", FLOAT, []),
        ]
        new_scale, new_count, retain, fresh, unscale = self.draft.op(
            "WindowDecay", [scale, count, lookups], outs, Phase.GRADIENTS, power=self.preset.window_power
        )
        self.draft.keep(count, new_count, Phase.GRADIENTS)
        if vector is None:
            return retain, fresh, None
        self._renormalized(scale, new_scale, vector)
        return retain, fresh, unscale


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
