"""What scales the rows of an embedding's update: the input factor A, or the rows' own history.

    Counts      (c·(a_u + λ_A))^e          a_u the averaged lookups of row u
    SquareSum   1/(√Σ q_u + ε)             q_u = mean over D of the row's squares, after G's power
    Window      1/√(window of q_u)         the window widens up to a bound: 1 − max(t^(−p), least)

`Counts` is linear in the rows, so it is applied to each lookup's row and repeated rows add up when the table
is written. The other two square, so the rows of equal ids are merged first: at one of an id's lookups, the
others keeping rows of zeros or being left out (`MergeLookups`, which needs a slot for each row of the table
and no sorting), or to distinct ids in order where the rows are handed out (`MergeRows`). Sources: Martens &
Grosse 2015 (https://arxiv.org/abs/1503.05671); Duchi, Hazan & Singer 2011
(https://jmlr.org/papers/v12/duchi11a.html); docs/mathematics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kfac_onnx.fisher.input_factor import EmbeddingInputKroneckerFactor, running_scale
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import DOUBLE, FLOAT, INT32, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.lookups import Lookups
    from kfac_onnx.fisher.place import Place
    from kfac_onnx.fisher.settings import Average

__all__ = [
    "Counts",
    "InputPower",
    "RowScale",
    "RowUpdate",
    "SquareSum",
    "TableGradient",
    "Window",
    "merge_lookups",
]


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


@dataclass(frozen=True)
class TableGradient:
    """A table's gradient in a step: rows float32[N, D] of its lookups, or all of it, float32[V, D]."""

    lookups: Lookups
    rows: ir.Value
    dense: ir.Value | None
    vocab_size: int
    embedding_dim: int
    in_place: bool = True
    """Whether the step adds the rows to the table, so that an id may come again with rows of zeros."""


@dataclass(frozen=True)
class InputPower:
    """(c·(A + λ_A))^exponent: the factor, its damping λ_A, the power, and the block's coefficient c."""

    factor: EmbeddingInputKroneckerFactor
    damping: ir.Value
    exponent: float
    coefficient: float

    def times(self, scalar: ir.Value, place: Place) -> ir.Value:
        """Return c times a value of A's size or a scalar."""
        if self.coefficient == 1.0:
            return scalar
        emit = place.emitter(Phase.PRECONDITION)
        c = place.number(self.coefficient)
        return emit.node("Mul", [scalar, c], name="times_coefficient", dtype=FLOAT, shape=scalar.shape)


class RowScale(Protocol):
    """A scale per row of the update, on top of G's power."""

    def update(
        self,
        gradient: TableGradient,
        root: ir.Value,
        power: InputPower | None,
        rate: ir.Value | None,
        place: Place,
    ) -> RowUpdate:
        """Emit scale(Grad · root); `power` is that of A, where the block has one.

        Given the learning rate, a scale may put −lr into rows (`RowUpdate.step`).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The input factor itself: averaged counts of lookups, of which `share` says if they are divided by M."""

    average: Average
    share: bool = False

    def update(
        self,
        gradient: TableGradient,
        root: ir.Value,
        power: InputPower | None,
        rate: ir.Value | None,
        place: Place,
    ) -> RowUpdate:
        """Emit (c·(a + λ_A))^exponent · Grad · root, row by row or over the whole table."""
        if power is None:
            raise AssertionError("counts are an input factor")
        phase, ids = Phase.PRECONDITION, gradient.lookups.ids
        a, damping = power.factor.rows(ids), power.times(power.damping, place)
        if gradient.dense is not None:
            reading = power.factor.reading
            (update,) = place.op(
                "PreconditionDense",
                [
                    gradient.dense,
                    place.float32(reading.stored, phase),
                    power.times(reading.gain, place),
                    damping,
                    root,
                ],
                [Out("update", FLOAT, [gradient.vocab_size, gradient.embedding_dim])],
                phase,
                exponent=power.exponent,
            )
            return RowUpdate(None, update, unique=True)
        scale = _scale(rate, place)
        (update,) = place.op(
            "PreconditionRows",
            [gradient.rows, power.times(a, place), damping, root, scale],
            [Out("update" if rate is None else "step", FLOAT, [None, gradient.embedding_dim])],
            phase,
            exponent=power.exponent,
        )
        return RowUpdate(ids, update, unique=False, step=rate is not None)


@dataclass(frozen=True)
class _MergedRows:
    """Merged rows after G's power, with the state that scales them, as it was at those rows.

    `ids` are None where the rows are the whole table's. `places`, where there are any, says for each id at
    which one of the rows its own were added up.
    """

    ids: ir.Value | None
    rotated: ir.Value
    state: ir.Value
    before: ir.Value
    places: ir.Value | None = None


def merge_lookups(
    ids: ir.Value, rows: ir.Value, vocab_size: int, place: Place, *, slot: str = "slot"
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Emit the rows of each id added up: ids, for each at which row its sum is, and those rows.

    A session's stage of one thread leaves each id once. Elsewhere (a device's sizes may not depend on values)
    the ids are those of all lookups, and where no sum is, rows are zeros. The slots are written in each step
    before they are read, so that a skipped step has nothing to restore; `slot` names their state.
    """
    slots = place.state(slot, INT32, [vocab_size], "zeros", "scratch")
    width = rows.shape[1] if rows.shape is not None else None
    width = width if isinstance(width, int) else None
    outs = [
        Out(slot, INT32, [vocab_size]),
        Out("merged_ids", INT64, [None]),
        Out("place", INT64, [None]),
        Out("merged", FLOAT, [None, width]),
    ]
    written, merged_ids, places, merged = place.op("MergeLookups", [slots, ids, rows], outs, Phase.COUNT)
    place.draft.write(slots, written, Phase.COUNT)
    return merged_ids, places, merged


def _merged(what: str, gradient: TableGradient, root: ir.Value, place: Place) -> _MergedRows:
    """Emit the merged rows times the root, and a state float32[V] at them; a dense gradient is merged."""
    phase, emit = Phase.PRECONDITION, place.emitter(Phase.PRECONDITION)
    ids, places = gradient.lookups.ids, None
    if gradient.dense is not None:
        ids, rows = None, gradient.dense
    elif gradient.in_place:
        ids, places, rows = merge_lookups(ids, gradient.rows, gradient.vocab_size, place)
    else:
        outs = [Out("unique_ids", INT64, [None]), Out("merged", FLOAT, [None, gradient.embedding_dim])]
        ids, rows = place.op("MergeRows", [ids, gradient.rows], outs, phase)
    rotated = emit.node("MatMul", [rows, root], name="rotated", dtype=FLOAT, shape=rows.shape)
    state = before = place.state(what, FLOAT, [gradient.vocab_size], "zeros")
    if ids is not None:
        before = emit.node("GatherElements", [state, ids], name=f"{what}.before", dtype=FLOAT, shape=[None])
    place.draft.remember(before)
    return _MergedRows(ids, rotated, state, before, places)


def _scale(rate: ir.Value | None, place: Place) -> ir.Value:
    """Return −lr, or 1 where rows are no steps."""
    if rate is None:
        return place.number(1.0)
    emit = place.emitter(Phase.PRECONDITION)
    return emit.node("Neg", [rate], name="scale", dtype=FLOAT, shape=[])


def _written(
    what: str,
    merged: _MergedRows,
    new: ir.Value,
    update: ir.Value,
    place: Place,
    *,
    step: bool = False,
) -> RowUpdate:
    """Keep the new entries of the state: in place at the rows' ids, or the whole vector.

    Where an id comes again its entry is written again, with the same number.
    """
    place.flag(new)
    if merged.ids is None:
        place.draft.keep(merged.state, new, Phase.PRECONDITION)
        return RowUpdate(None, update, unique=True)
    outs = [Out(what, FLOAT, merged.state.shape)]
    (written,) = place.op("WriteRows", [merged.state, merged.ids, new], outs, Phase.COMMIT)
    node = written.producer()
    if node is not None:
        place.draft.guard(node, 2, merged.before)
    place.draft.write(merged.state, written, Phase.COMMIT)
    return RowUpdate(merged.ids, update, unique=merged.places is None, step=step)


@dataclass(frozen=True, kw_only=True)
class SquareSum:
    """Row-wise Adagrad: the sum of all mean squares of a row; `epsilon` is added to its root."""

    epsilon: float = 1e-10

    def update(
        self,
        gradient: TableGradient,
        root: ir.Value,
        power: InputPower | None,
        rate: ir.Value | None,
        place: Place,
    ) -> RowUpdate:
        """Emit Grad·root over the root of the summed squares, epsilon added."""
        merged = _merged("squares", gradient, root, place)
        if merged.places is not None:
            step, new = place.op(
                "RowAdagradStep",
                [merged.rotated, merged.places, merged.before, _scale(rate, place)],
                [Out("step", FLOAT, merged.rotated.shape), Out("squares", FLOAT, merged.before.shape)],
                Phase.PRECONDITION,
                epsilon=self.epsilon,
            )
            return _written("squares", merged, new, step, place, step=rate is not None)
        update, new = place.op(
            "RowAdagrad",
            [merged.rotated, merged.before],
            [Out("update", FLOAT, merged.rotated.shape), Out("squares", FLOAT, merged.before.shape)],
            Phase.PRECONDITION,
            epsilon=self.epsilon,
        )
        return _written("squares", merged, new, update, place)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window over the mean squares of a row that widens, 1 − max(t^(−`power`), `least`), and so forgets.

    A row's first step is lr/√max(t^(−power), least): `least` bounds it for rows that are met late.
    """

    power: float = 0.8
    least: float = 0.01

    def update(
        self,
        gradient: TableGradient,
        root: ir.Value,
        power: InputPower | None,
        rate: ir.Value | None,
        place: Place,
    ) -> RowUpdate:
        """Emit Grad·root over the root of the window."""
        emit = place.emitter(Phase.PRECONDITION)
        merged = _merged("window", gradient, root, place)
        shape = merged.before.shape
        stored = None if merged.ids is None else merged.state
        retain, fresh, unscale = self._advanced(stored, gradient.lookups.number, place)
        decayed = emit.node("Mul", [merged.before, retain], name="window.decayed", dtype=FLOAT, shape=shape)
        if merged.places is not None and unscale is not None:
            step, new = place.op(
                "RowWindowStep",
                [merged.rotated, merged.places, decayed, fresh, _scale(rate, place)],
                [Out("step", FLOAT, merged.rotated.shape), Out("window", FLOAT, shape)],
                Phase.PRECONDITION,
            )
            new = emit.node("Mul", [new, unscale], name="window.stored", dtype=FLOAT, shape=shape)
            return _written("window", merged, new, step, place, step=rate is not None)
        update, new = place.op(
            "RowWindow",
            [merged.rotated, decayed, fresh],
            [Out("update", FLOAT, merged.rotated.shape), Out("window", FLOAT, shape)],
            Phase.PRECONDITION,
        )
        if unscale is not None:
            new = emit.node("Mul", [new, unscale], name="window.stored", dtype=FLOAT, shape=shape)
        return _written("window", merged, new, update, place)

    def _advanced(
        self, vector: ir.Value | None, lookups: ir.Value, place: Place
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Return retain, fresh and unscale; a window over the whole table has no running scale."""
        count = place.counter("window.count")
        one = place.emitter(Phase.GRADIENTS).constant(np.float64(1.0), "one64")
        scale = one if vector is None else place.counter("window.scale", DOUBLE, 1.0)
        outs = [
            Out("window.scale", DOUBLE, []),
            Out("window.count", INT64, []),
            Out("retain", FLOAT, []),
            Out("fresh", FLOAT, []),
            Out("unscale", FLOAT, []),
        ]
        new_scale, new_count, retain, fresh, unscale = place.op(
            "WindowDecay", [scale, count, lookups], outs, power=self.power, least=self.least
        )
        place.draft.keep(count, new_count, Phase.GRADIENTS)
        if vector is None:
            return retain, fresh, None
        running_scale(place, scale, new_scale, vector)
        return retain, fresh, unscale
