"""The input factor of an embedding: diagonal, because a one-hot input has a diagonal second moment.

    A ← decay·A + (1 − decay)·counts (divided by the number of lookups, or not)       A = gain·Ã

Held as Ã with a running scale, so that an update costs as much as its lookups, and in float64: a batch's
increments are added to Ã one by one, which in float32 costs the hottest row of a Zipf batch 1.7e-5 of its
counts in 20 steps. What is read of Ã is float32. For decays below 0.5, where the scale would vanish, and
where projections count too, which reach all V rows anyway, A itself is held, float32, and all V entries are
averaged, from counts that are added up before. Source: Martens & Grosse 2015
(https://arxiv.org/abs/1503.05671), section 5; docs/mathematics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.fisher.errors import FisherValueError
from kfac_onnx.fisher.lookups import Lookups, as_towers, tower_lookups
from kfac_onnx.fisher.settings import FactorSettings
from kfac_onnx.fisher.symbols import SparseRows, Update
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import BOOL, DOUBLE, FLOAT, INT64, Renormalization, Undo

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.fisher.place import Place
    from kfac_onnx.fisher.settings import Average

__all__ = ["EmbeddingInputKroneckerFactor", "Reading", "running_scale"]

RENORMALIZE_BELOW: Final = 2.0**-20
"""Below this running scale the vector takes the scale in, so that it never overflows."""

PLAIN_DECAY: Final = 0.5
"""Below this decay the running scale would vanish at once: A is averaged over the whole vocabulary."""


@dataclass(frozen=True)
class Reading:
    """The factor as it is read: A = gain·stored, float32[V], and ΣA, float32 scalar.

    `stored` is float64 where it is Ã.
    """

    stored: ir.Value
    gain: ir.Value
    total: ir.Value


def running_scale(place: Place, old: ir.Value, new: ir.Value, vector: ir.Value) -> ir.Value:
    """Keep a running scale, float64; where it becomes small, `vector` takes it in and it starts again at 1.

    Returns the scale that is kept.
    """
    draft, emit = place.draft, place.emitter(Phase.GRADIENTS)
    least = emit.constant(np.float64(RENORMALIZE_BELOW), "renormalize_below")
    one = emit.constant(np.float64(1.0), "one64")
    due = emit.node("Less", [new, least], name="renormalize_now", dtype=BOOL, shape=[])
    scale = emit.node("Where", [due, one, new], name="scale_kept", dtype=DOUBLE, shape=[])
    factor = new
    if vector.dtype == FLOAT:
        factor = emit.node(
            "Cast", [new], attributes={"to": FLOAT}, name="scale_float32", dtype=FLOAT, shape=[]
        )
    draft.keep(old, scale, Phase.GRADIENTS)
    draft.remember(due, factor)
    name = str(vector.name)
    draft.renormalizations[name] = Renormalization(name, str(due.name), str(factor.name))
    return scale


class EmbeddingInputKroneckerFactor:
    """Averaged counts of lookups per row.

    `input_ids` are integer [B] or [B, K] per tower, or per tower and use (ids outside [0, V) count in
    the divisor only), or the `Lookups` of a training step. `share` divides counts by the number of
    lookups. State `<prefix>/A`, float64[V] with a running scale and float32[V] without, and scalars.
    """

    def __init__(
        self,
        input_ids: Lookups | ir.Value | Sequence[ir.Value | Sequence[ir.Value]],
        vocab_size: int,
        average: Average | None = None,
        *,
        place: Place,
        settings: FactorSettings | None = None,
        share: bool = True,
    ) -> None:
        self._settings = FactorSettings() if settings is None else settings
        self._ids = input_ids if isinstance(input_ids, Lookups) else as_towers(input_ids)
        self._average = self._settings.average if average is None else average
        self._place = place
        self._share = share
        self.vocab_size = vocab_size
        start = self._average.start
        soft = isinstance(input_ids, Lookups) and bool(input_ids.soft)
        scaled = self._average.decay >= PLAIN_DECAY and not soft
        self._dtype = DOUBLE if scaled else FLOAT
        self._A = place.state("A", self._dtype, [vocab_size], {0.0: "zeros", 1.0: "ones"}.get(start, start))
        self._scale = self._total = self._count = None
        if scaled:
            self._scale = place.counter("A.scale", DOUBLE, 1.0)
            self._total = place.counter("A.total", DOUBLE, start * vocab_size)
            self._count = place.counter("A.count")
        elif self._average.debias:
            self._count = place.counter("A.count")
        self._reading: Reading | None = None

    @property
    def states(self) -> tuple[ir.Value, ...]:
        """All state of the factor."""
        states = (self._A, self._scale, self._total, self._count)
        return tuple(state for state in states if state is not None)

    @property
    def reading(self) -> Reading:
        """The factor as it is: from its states, or after the update that `follow` was told of."""
        if self._reading is None:
            self._reading = self._read_states()
        return self._reading

    def total(self) -> ir.Value:
        """Return the trace of the factor, ΣA, float32 scalar."""
        return self.reading.total

    def get_cov_var(self) -> ir.Value:
        """Return the diagonal A, float32[V]."""
        reading = self.reading
        stored = self._place.float32(reading.stored)
        return self._node("Mul", [stored, reading.gain], shape=[self.vocab_size])

    def get_cov(self) -> ir.Value:
        """Return diag(A), float32[V, V]; for tests, it costs V² memory."""
        V, diagonal = self.vocab_size, self.get_cov_var()
        column = self._node("Unsqueeze", [diagonal, self._ints(1)], shape=[V, 1])
        zero = self._place.number(0.0)
        square = self._node("Expand", [zero, self._ints(V, V)], shape=[V, V])
        eye = self._node("EyeLike", [square], shape=[V, V])
        eye = self._place.emitter(Phase.GRADIENTS).node("Cast", [eye], attributes={"to": BOOL}, dtype=BOOL)
        return self._node("Where", [eye, column, zero], shape=[V, V])

    def rows(self, indices: ir.Value) -> ir.Value:
        """Return A at the indices, float32[N]; they may be any integers inside the table."""
        emit = self._place.emitter(Phase.PRECONDITION)
        if indices.dtype != INT64:
            indices = emit.node("Cast", [indices], attributes={"to": INT64}, dtype=INT64, shape=indices.shape)
        reading = self.reading
        counts = emit.node(
            "GatherElements", [reading.stored, indices], name="A.after", dtype=self._dtype, shape=[None]
        )
        draft, name = self._place.draft, str(self._A.name)
        undo = draft.undo.get(name)
        if undo is not None and undo.ids == indices.name:
            draft.remember(counts)
            draft.undo[name] = Undo(name, undo.ids, undo.before, str(counts.name))
        counts = self._place.float32(counts, Phase.PRECONDITION)
        return emit.node("Mul", [counts, reading.gain], name="a", dtype=FLOAT, shape=[None])

    def left_power(
        self, x: ir.Value | SparseRows, damping: ir.Value, exponent: float
    ) -> ir.Value | SparseRows:
        """Return (A + damping)^exponent times the rows of x."""
        a = self.rows(x.indices) if isinstance(x, SparseRows) else self.get_cov_var()
        damped = self._node("Add", [a, damping], shape=[None])
        weight = self._node("Pow", [damped, self._place.number(exponent)], shape=[None])
        column = self._node("Unsqueeze", [weight, self._ints(1)], shape=[None, 1])
        if isinstance(x, SparseRows):
            return SparseRows(x.indices, self._node("Mul", [column, x.values]), x.dense_shape)
        return self._node("Mul", [column, x])

    def left_multiply(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return (A + damping) times the rows of x."""
        return self.left_power(x, damping, 1.0)

    def left_multiply_inverse(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return 1/(A + damping) times the rows of x; live, nothing is stored."""
        return self.left_power(x, damping, -1.0)

    def register_damped_inverse(self, damping: object) -> None:
        """Do nothing: a diagonal is inverted where it is read."""

    def make_inverse_update_ops(self) -> list[Update]:
        """Return no update: a diagonal is inverted where it is read."""
        return []

    def make_covariance_update_op(self, ema_decay: float | None = None) -> Update:
        """Return the update that averages in a batch; `ema_decay`, where given, must be the factor's own.

        Raises FisherTypeError or FisherValueError for ids that are no integers [B] or [B, K].
        """
        update, _ = self._averaged_in(ema_decay)
        return update

    def take_in(self) -> None:
        """Average in the batch of a training step; from here on the factor is read as it is after that."""
        _, self._reading = self._averaged_in(None)

    def _averaged_in(self, ema_decay: float | None) -> tuple[Update, Reading]:
        check_decay(ema_decay, self._average.decay)
        towers, strategy = self._ids, self._settings.towers
        if isinstance(towers, Lookups):
            lookups = towers
        else:
            lookups = tower_lookups(towers, self.vocab_size, strategy, self._place)
        if self._scale is None or self._total is None or self._count is None:
            return self._plain(lookups)
        return self._scaled(lookups, self._scale, self._total, self._count)

    def _scaled(
        self, lookups: Lookups, scale: ir.Value, total: ir.Value, count: ir.Value
    ) -> tuple[Update, Reading]:
        place, draft, phase = self._place, self._place.draft, Phase.GRADIENTS
        start, start_total = self._A, total
        if self._average.forgets_its_start:
            nothing = place.emitter(phase).constant(np.float64(0.0), "nothing64")
            start = self._where_first(count, nothing, self._A, DOUBLE, [self.vocab_size])
            start_total = self._where_first(count, nothing, total, DOUBLE, [])
        new_scale, new_total, new_count, increment, gain, total_a = self._advanced(
            scale, start_total, count, lookups.number
        )
        if lookups.share is not None:
            new_total, total_a = self._shared(lookups.share, new_scale, new_total, gain)
        draft.keep(total, new_total, phase)
        draft.keep(count, new_count, phase)
        scale_after = running_scale(place, scale, new_scale, self._A)
        before = place.emitter(phase).node(
            "GatherElements", [start, lookups.ids], name="A.before", dtype=DOUBLE, shape=[None]
        )
        draft.remember(before)
        increments = self._increments(lookups, increment, before)
        (counted,) = place.op(
            "InputFactorUpdate",
            [start, lookups.ids, increments],
            [Out("A", DOUBLE, [self.vocab_size])],
            Phase.COUNT,
        )
        draft.write(self._A, counted, Phase.COUNT)
        name = str(self._A.name)
        draft.undo[name] = Undo(name, str(lookups.ids.name), str(before.name))
        pairs = ((self._A, counted), (scale, scale_after), (total, new_total), (count, new_count))
        return Update(pairs), Reading(counted, gain, total_a)

    def _advanced(
        self, scale: ir.Value, total: ir.Value, count: ir.Value, lookups: ir.Value
    ) -> tuple[ir.Value, ...]:
        """Return scale, total and count after `lookups` more, the increment of one, gain and ΣA."""
        outs = [
            Out("A.scale", DOUBLE, []),
            Out("A.total", DOUBLE, []),
            Out("A.count", INT64, []),
            Out("increment", FLOAT, []),
            Out("gain", FLOAT, []),
            Out("total_a", FLOAT, []),
        ]
        return self._place.op(
            "InputFactorDecay",
            [scale, total, count, lookups],
            outs,
            decay=self._average.decay,
            debias=int(self._average.debias),
            normalize=int(self._share),
        )

    def _increments(self, lookups: Lookups, increment: ir.Value, before: ir.Value) -> ir.Value:
        """Return the increment of each lookup plus 0·before: counts written in place are read before that."""
        emit = self._place.emitter(Phase.COUNT)
        if lookups.weights is not None:
            increment = lookups.weighted(increment, self._place)
        increment = emit.node(
            "Cast",
            [increment],
            attributes={"to": DOUBLE},
            name="increment64",
            dtype=DOUBLE,
            shape=increment.shape,
        )
        zero = emit.constant(np.float64(0.0), "nothing64")
        nothing = emit.node("Mul", [before, zero], name="nothing", dtype=DOUBLE, shape=[None])
        return emit.node("Add", [nothing, increment], name="increments", dtype=DOUBLE, shape=[None])

    def _shared(
        self, share: ir.Value, scale: ir.Value, total: ir.Value, gain: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Return total and ΣA where counts do not add up to the number of lookups, as the operator has it."""
        emit = self._place.emitter(Phase.GRADIENTS)
        one = emit.constant(np.float64(1.0), "one64")
        fresh = emit.constant(np.float64(1.0 - self._average.decay), "fresh")
        excess = emit.node("Sub", [share, one], dtype=DOUBLE, shape=[])
        excess = emit.node("Mul", [fresh, excess], dtype=DOUBLE, shape=[])
        total = emit.node("Add", [total, excess], name="A.total", dtype=DOUBLE, shape=[])
        gain64 = emit.node("Cast", [gain], attributes={"to": DOUBLE}, dtype=DOUBLE, shape=[])
        correction = emit.node("Div", [gain64, scale], dtype=DOUBLE, shape=[])
        total_a = emit.node("Mul", [total, correction], dtype=DOUBLE, shape=[])
        return total, emit.node(
            "Cast", [total_a], attributes={"to": FLOAT}, name="total_a", dtype=FLOAT, shape=[]
        )

    def _plain(self, lookups: Lookups) -> tuple[Update, Reading]:
        place, draft, phase = self._place, self._place.draft, Phase.GRADIENTS
        emit, one, number = place.emitter(phase), place.number(1.0), lookups.number
        start = self._A
        if self._average.forgets_its_start and self._count is not None:
            start = self._where_first(self._count, place.number(0.0), start, FLOAT, [self.vocab_size])
        divisor = (
            number if self._share else emit.node("Min", [number, one], name="any", dtype=FLOAT, shape=[])
        )
        ids, weights = lookups.with_soft_counts(self.vocab_size, place)
        (averaged,) = place.op(
            "InputFactorAverage",
            [start, ids, weights, divisor],
            [Out("A", FLOAT, [self.vocab_size])],
            decay=self._average.decay,
        )
        draft.keep(self._A, averaged, phase)
        pairs = [(self._A, averaged)]
        new_count: ir.Value | None = None
        if self._count is not None:
            some = emit.node("Cast", [number], attributes={"to": BOOL}, name="any", dtype=BOOL, shape=[])
            step = emit.node("Cast", [some], attributes={"to": INT64}, name="any", dtype=INT64, shape=[])
            new_count = emit.node("Add", [self._count, step], name="A.count", dtype=INT64, shape=[])
            draft.keep(self._count, new_count, phase)
            pairs.append((self._count, new_count))
        return Update(tuple(pairs)), self._plain_reading(averaged, new_count)

    def _plain_reading(self, stored: ir.Value, count: ir.Value | None) -> Reading:
        emit = self._place.emitter(Phase.GRADIENTS)
        gain = self._place.number(1.0)
        if count is not None:
            # As the operator rounds the decay to float32, so does the correction; the rest is exact enough.
            one64 = emit.constant(np.float64(1.0), "one64")
            n = emit.node("Cast", [count], attributes={"to": DOUBLE}, name="n", dtype=DOUBLE, shape=[])
            n = emit.node("Max", [n, one64], name="n", dtype=DOUBLE, shape=[])
            rho = emit.constant(np.float64(np.float32(self._average.decay)), "decay_a")
            power = emit.node("Pow", [rho, n], name="bias", dtype=DOUBLE, shape=[])
            seen = emit.node("Sub", [one64, power], name="bias", dtype=DOUBLE, shape=[])
            seen = emit.node("Reciprocal", [seen], name="gain", dtype=DOUBLE, shape=[])
            gain = emit.node("Cast", [seen], attributes={"to": FLOAT}, name="gain", dtype=FLOAT, shape=[])
        total = emit.node(
            "ReduceSum", [stored], attributes={"keepdims": 0}, name="total_a", dtype=FLOAT, shape=[]
        )
        total = emit.node("Mul", [total, gain], name="total_a", dtype=FLOAT, shape=[])
        return Reading(stored, gain, total)

    def _read_states(self) -> Reading:
        """Return the factor as its states have it: a batch without lookups changes nothing."""
        average, V = self._average, self.vocab_size
        if self._scale is None or self._total is None or self._count is None:
            reading = self._plain_reading(self._A, self._count)
        else:
            nothing = self._place.number(0.0)
            advanced = self._advanced(self._scale, self._total, self._count, nothing)
            reading = Reading(self._A, advanced[4], advanced[5])
        if self._count is None or not (average.forgets_its_start or average.unknown_before_first):
            return reading
        shown = np.nan if average.unknown_before_first else 1.0
        gain = self._where_first(self._count, self._place.number(shown), reading.gain, FLOAT, [])
        start = self._place.number(shown * average.start * V)
        return Reading(self._A, gain, self._where_first(self._count, start, reading.total, FLOAT, []))

    def _where_first(
        self, count: ir.Value, first: ir.Value, later: ir.Value, dtype: ir.DataType, shape: list[int]
    ) -> ir.Value:
        """Return `first` as long as there was no batch, then `later`."""
        emit = self._place.emitter(Phase.GRADIENTS)
        zero = emit.constant(np.asarray(0, np.int64), "zero")
        none = emit.node("Equal", [count, zero], name="no_batch", dtype=BOOL, shape=[])
        return emit.node("Where", [none, first, later], dtype=dtype, shape=shape)

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value], shape: Sequence[int | None] | None = None
    ) -> ir.Value:
        return self._place.emitter(Phase.GRADIENTS).node(op_type, inputs, dtype=FLOAT, shape=shape)

    def _ints(self, *numbers: int) -> ir.Value:
        return self._place.emitter(Phase.GRADIENTS).constant(np.asarray(numbers, np.int64), "numbers")


def check_decay(asked: float | None, own: float) -> None:
    """Raise FisherValueError for a decay out of range, or another than the factor's own."""
    if asked is None:
        return
    if not 0.0 <= asked <= 1.0:
        raise FisherValueError(f"the decay of an average must be between 0 and 1, not {asked:g}")
    if asked != own:
        raise FisherValueError(
            f"the factor averages with decay {own:g}, not {asked:g}",
            help="give the collection its decay: LayerCollection(FactorSettings(decay=...))",
        )
