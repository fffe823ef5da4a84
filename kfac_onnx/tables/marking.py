"""Writes an accepted site into the graph: its ids, rows and kept lookups as three values.

ids int64[N], rows float32[N, D] (dL/d(table row) of each lookup) and keep float32[N] (0 where the graph
drops the row; absent where it drops none) of all uses, one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.metadata import IdCheck, Phase, Site
from kfac_onnx.tables.match_uses import MatchedUse, whole_ids
from kfac_onnx.tables.padding import drop_padding
from kfac_onnx.tables.terms import DenseTerm, RowTerm

if TYPE_CHECKING:
    from kfac_onnx.graph.emit import Emitter
    from kfac_onnx.tables.matching import SiteMatch
    from kfac_onnx.tables.penalties import Coefficient
    from kfac_onnx.tables.terms import RowStep

__all__ = ["id_checks", "mark"]

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


def id_checks(site: SiteMatch) -> list[IdCheck]:
    """Return the checks of every lookup whose ids come from the batch."""
    return [
        IdCheck(str(site.weight.name), _checked_ids(use), use.lookup.vocab_size, use.negatives)
        for use in site.uses
        if use.lookup.ids is not None and use.lookup.constant_ids is None and not _masks_ids(use.term)
    ]


def _checked_ids(use: MatchedUse) -> str:
    """Return the ids that must be rows: a lookup that clamps has none that are not, but its scatter may."""
    term = use.term
    found = term.indices if use.clamps and isinstance(term, RowTerm) else use.lookup.ids
    return "" if found is None else str(found.name)


def _masks_ids(term: RowTerm | DenseTerm) -> bool:
    """Say whether ids that are no row have a meaning: a one-hot row of them is zero."""
    return isinstance(term, RowTerm) and bool(term.before)


def mark(site: SiteMatch, emitter: Emitter, padding: int | None = None) -> Site:
    """Emit the site's ids, rows and keep, and return its metadata with their names.

    `padding` is a row that the user says is padding, where the graph does not.
    """
    emit = emitter.derive(site=site.weight.name, phase=Phase.GRADIENTS)
    parts = [_Rows(use, emit).emit() for use in site.uses]
    dim = site.pulled.embedding_dim
    ids = _joined(emit, [part[0] for part in parts], "ids", INT64, [None])
    rows = _joined(emit, [part[1] for part in parts], "rows", FLOAT, [None, dim])
    keep: ir.Value | None = None
    if any(part[2] is not None for part in parts):
        masks = [part[2] if part[2] is not None else _ones(emit, part[0]) for part in parts]
        keep = _joined(emit, masks, "keep", FLOAT, [None])
    described = site.describe()
    penalty = _penalty(site, emit)
    dense = described.gradient if site.dense_terms else None
    if dense is not None and penalty is not None:
        rest = emit.node(
            "Sub", [site.gradient, penalty], name="projected", dtype=penalty.dtype, shape=penalty.shape
        )
        dense = str(rest.name)
    marked = replace(
        described,
        penalty=None if penalty is None else str(penalty.name),
        decay=None if site.decay is None else str(_decay(site.decay, emit).name),
        ids=ids.name,
        rows=rows.name,
        keep=None if keep is None else keep.name,
        dense=dense,
    )
    if padding is None or padding == described.padding_idx:
        return marked
    values = {str(value.name): value for value in (ids, rows, keep) if value is not None}
    return drop_padding(site, marked, padding, values, emit)


def _penalty(site: SiteMatch, emit: Emitter) -> ir.Value | None:
    """Emit the gradient of a table's penalties, as the parameter is stored."""
    if not site.penalty_parts:
        return None
    if len(site.penalty_parts) == 1:
        return site.penalty_parts[0]
    like = site.gradient
    return emit.node("Sum", site.penalty_parts, name="penalty", dtype=like.dtype, shape=like.shape)


def _decay(decay: Coefficient, emit: Emitter) -> ir.Value:
    """Emit the number c of a penalty's gradient c·W, float32[]."""
    summands: list[ir.Value] = []
    scalar = emit.constant(np.zeros(0, np.int64), "scalar")
    for factors in decay.summands:
        number = emit.constant(np.float32(1.0), "one")
        for factor in factors:
            if not isinstance(factor.number, ir.Value):
                other = emit.constant(np.float32(factor.number), "factor")
            else:
                other = factor.number
                if other.dtype != FLOAT:
                    other = emit.node("Cast", [other], attributes={"to": FLOAT}, name="factor", dtype=FLOAT)
                other = emit.node("Reshape", [other, scalar], name="factor", dtype=FLOAT, shape=[])
            op = "Div" if factor.divide else "Mul"
            number = emit.node(op, [number, other], name="decay", dtype=FLOAT, shape=[])
        summands.append(number)
    return emit.node("Sum", summands, name="decay", dtype=FLOAT, shape=[])


def _joined(
    emit: Emitter, parts: list[ir.Value], name: str, dtype: ir.DataType, shape: list[int | None]
) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    return emit.node("Concat", parts, attributes={"axis": 0}, name=name, dtype=dtype, shape=shape)


def _ones(emit: Emitter, ids: ir.Value) -> ir.Value:
    shape = emit.node("Shape", [ids], name="count", dtype=INT64, shape=[1])
    one = ir.tensor(np.ones(1, np.float32))
    return emit.node(
        "ConstantOfShape", [shape], attributes={"value": one}, name="keep", dtype=FLOAT, shape=[None]
    )


class _Rows:
    """Emits one use's ids, rows and keep, applying what lies between the scatter and the gradient."""

    def __init__(self, use: MatchedUse, emit: Emitter) -> None:
        self.use = use
        self.emitter = emit
        self.keep: ir.Value | None = None

    def emit(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Return ids int64[n], rows float32[n, D] and keep float32[n] or None."""
        term, emit = self.use.term, self.emitter
        if isinstance(term, DenseTerm):
            width = _width(term.value.shape)
            rows = self._flat_rows(term.value, width)
            ids = emit.constant(np.asarray(whole_ids(term, self.use.pulled), np.int64), "table_rows")
            for step in self.use.pulled.steps:
                if step.kind not in ("shift", "window"):
                    ids, rows = self._apply(step, ids, rows)
            return ids, rows, None
        ids = self._ids(term)
        rows = self._rows(term)
        for other, _ in self.use.also:
            rows = emit.node("Add", [rows, self._rows(other)], name="rows", dtype=FLOAT, shape=rows.shape)
        if term.mask is not None and (not term.mask.exact or term.mask.padding_idx is not None):
            self._also_keep(self._mask(term))
        if self.use.negatives == "wrap":
            ids = self._wrapped(ids, self._scattered_rows(term))
        for step in (*term.before, *self.use.pulled.steps):
            ids, rows = self._apply(step, ids, rows)
        return ids, rows, self.keep

    def _scattered_rows(self, term: RowTerm) -> int:
        return term.shape[term.axis]

    def _ids(self, term: RowTerm) -> ir.Value:
        emit = self.emitter
        if term.indices is None:
            raise AssertionError("a row term always has its operator's indices")
        ids = term.indices
        if ids.dtype != INT64:
            ids = emit.node("Cast", [ids], attributes={"to": INT64}, name="ids_int64", dtype=INT64)
        if ids.shape is not None and len(ids.shape) == 1:
            return ids
        flat = emit.constant(np.asarray([-1], np.int64), "flat")
        return emit.node("Reshape", [ids, flat], name="ids", dtype=INT64, shape=[None])

    def _rows(self, term: RowTerm) -> ir.Value:
        width = 1 if len(term.shape) == 1 else term.shape[1 - term.axis]
        updates = _unmasked(term)
        if term.columns and term.axis == 1:
            updates = self.emitter.node(
                "Transpose",
                [updates],
                attributes={"perm": [1, 0]},
                name="rows_first",
                dtype=updates.dtype,
            )
        if term.order is not None:
            order = {"perm": term.order}
            updates = self.emitter.node(
                "Transpose", [updates], attributes=order, name="rows_first", dtype=updates.dtype
            )
        return self._flat_rows(updates, width)

    def _flat_rows(self, updates: ir.Value, width: int) -> ir.Value:
        emit = self.emitter
        if updates.dtype != FLOAT:
            updates = emit.node("Cast", [updates], attributes={"to": FLOAT}, name="rows_float32", dtype=FLOAT)
        if updates.shape is not None and len(updates.shape) == 2 and updates.shape[1] == width:
            return updates
        shape = emit.constant(np.asarray([-1, width], np.int64), "one_row_a_lookup")
        return emit.node("Reshape", [updates, shape], name="rows", dtype=FLOAT, shape=[None, width])

    def _mask(self, term: RowTerm) -> ir.Value:
        """Emit the kept lookups as bool[n]; the condition may be broadcast over rows."""
        emit, mask = self.emitter, term.mask
        if mask is None or term.indices is None:
            raise AssertionError("asked for the mask of a term that has none")
        condition = mask.condition
        if mask.drops_where:
            condition = emit.node("Not", [condition], name="kept", dtype=BOOL)
        where = _where_of(term)
        shape = emit.node("Shape", [where], name="updates_shape", dtype=INT64)
        rank = len(where.shape) if where.shape is not None else 2
        # One flag a row: the condition is constant along the row, so its first entry speaks for it.
        condition = emit.node("Expand", [condition, shape], name="kept_everywhere", dtype=BOOL)
        flat = emit.constant(np.asarray([-1], np.int64), "flat")
        if len(term.shape) == 1:  # rows of one entry without an axis of their own: one flag each already
            return emit.node("Reshape", [condition, flat], name="kept_lookups", dtype=BOOL, shape=[None])
        first = [np.asarray([value], np.int64) for value in (0, 1, rank - 1)]
        bounds = [emit.constant(item, "bound") for item in first]
        condition = emit.node("Slice", [condition, *bounds], name="kept_rows", dtype=BOOL)
        return emit.node("Reshape", [condition, flat], name="kept_lookups", dtype=BOOL, shape=[None])

    def _also_keep(self, kept: ir.Value) -> None:
        emit = self.emitter
        flags = emit.node("Cast", [kept], attributes={"to": FLOAT}, name="keep", dtype=FLOAT, shape=[None])
        if self.keep is not None:
            flags = emit.node("Mul", [self.keep, flags], name="keep", dtype=FLOAT, shape=[None])
        self.keep = flags

    def _wrapped(self, ids: ir.Value, vocab_size: int) -> ir.Value:
        emit = self.emitter
        size = emit.constant(np.asarray(vocab_size, np.int64), "vocab_size")
        return emit.node("Mod", [ids, size], name="ids_wrapped", dtype=INT64, shape=[None])

    def _wrapped_once(self, ids: ir.Value, vocab_size: int) -> ir.Value:
        emit = self.emitter
        zero = emit.constant(np.asarray(0, np.int64), "zero_id")
        size = emit.constant(np.asarray(vocab_size, np.int64), "vocab_size")
        negative = emit.node("Less", [ids, zero], name="negative", dtype=BOOL, shape=[None])
        above = emit.node("Add", [ids, size], name="ids_from_end", dtype=INT64, shape=[None])
        return emit.node("Where", [negative, above, ids], name="ids_wrapped", dtype=INT64, shape=[None])

    def _apply(self, step: RowStep, ids: ir.Value, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
        emit = self.emitter
        match step.kind:
            case "negate":
                return ids, emit.node("Neg", [rows], name="rows", dtype=FLOAT, shape=rows.shape)
            case "scale" | "scale-rows":
                return ids, self._scaled(step, ids, rows)
            case "wrap":
                return self._wrapped_once(ids, step.stop), rows
            case "shift":
                start = emit.constant(np.asarray(step.start, np.int64), "first_row")
                return emit.node("Add", [ids, start], name="ids", dtype=INT64, shape=[None]), rows
            case "columns":
                bounds = [np.asarray([value], np.int64) for value in (step.start, step.stop, 1)]
                inputs = [rows, *(emit.constant(item, "bound") for item in bounds)]
                width = step.stop - step.start
                return ids, emit.node("Slice", inputs, name="rows", dtype=FLOAT, shape=[None, width])
            case "window":
                return self._windowed(step, ids, rows)

    def _scaled(self, step: RowStep, ids: ir.Value, rows: ir.Value) -> ir.Value:
        emit, operand = self.emitter, step.operand
        if operand is None:
            raise AssertionError("a scaling has its factor")
        if operand.dtype != FLOAT:
            operand = emit.node("Cast", [operand], attributes={"to": FLOAT}, name="factor", dtype=FLOAT)
        flat = emit.constant(np.asarray([-1], np.int64), "flat")
        operand = emit.node("Reshape", [operand, flat], name="factor", dtype=FLOAT)
        if step.kind == "scale-rows":
            operand = emit.node("Gather", [operand, ids], name="factor", dtype=FLOAT, shape=[None])
            one_column = emit.constant(np.asarray([-1, 1], np.int64), "one_column")
            operand = emit.node("Reshape", [operand, one_column], name="factor", dtype=FLOAT)
        return emit.node(
            "Div" if step.divide else "Mul", [rows, operand], name="rows", dtype=FLOAT, shape=rows.shape
        )

    def _windowed(self, step: RowStep, ids: ir.Value, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keep ids in [start, stop); the others become id 0 with a zero row that does not count."""
        emit = self.emitter
        start = emit.constant(np.asarray(step.start, np.int64), "first_row")
        size = emit.constant(np.asarray(step.stop - step.start, np.int64), "vocab_size")
        zero = emit.constant(np.asarray(0, np.int64), "zero_id")
        shifted = emit.node("Sub", [ids, start], name="ids_shifted", dtype=INT64, shape=[None])
        above = emit.node("GreaterOrEqual", [shifted, zero], name="from_first_row", dtype=BOOL, shape=[None])
        below = emit.node("Less", [shifted, size], name="to_last_row", dtype=BOOL, shape=[None])
        inside = emit.node("And", [above, below], name="in_table", dtype=BOOL, shape=[None])
        ids = emit.node("Where", [inside, shifted, zero], name="ids", dtype=INT64, shape=[None])
        axis = emit.constant(np.asarray([1], np.int64), "last_axis")
        rowwise = emit.node("Unsqueeze", [inside, axis], name="rows_in_table", dtype=BOOL, shape=[None, 1])
        nothing = emit.constant(np.asarray(0, np.float32), "nothing")
        rows = emit.node("Where", [rowwise, rows, nothing], name="rows", dtype=FLOAT, shape=rows.shape)
        self._also_keep(inside)
        return ids, rows


def _width(shape: ir.Shape | None) -> int:
    last = None if shape is None else shape[-1]
    if not isinstance(last, int):
        raise AssertionError("matching accepted a table of unknown width")
    return last


def _unmasked(term: RowTerm) -> ir.Value:
    """Return the rows before a mask that drops no valid id: ids are checked, so it would change nothing.

    Reshapes between the mask and the scatter do not matter, since rows are brought to [n, D] anyway.
    """
    mask = term.mask
    if mask is None or not mask.exact or mask.padding_idx is not None or not mask.drops_negatives:
        return term.updates
    if term.columns and term.axis == 1:
        return term.updates
    where = _where_of(term)
    node = where.producer()
    if node is None or node.op_type != "Where":
        return term.updates
    rows = node.inputs[2] if mask.drops_where else node.inputs[1]
    if rows is None or rows.shape is None or where.shape is None or list(rows.shape) != list(where.shape):
        return term.updates
    return rows


def _where_of(term: RowTerm) -> ir.Value:
    """Return the output of the Where that masks the rows."""
    value = term.updates
    while (node := value.producer()) is not None and node.op_type != "Where":
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value
