"""The input factor of an embedding: diagonal, because a one-hot input has a diagonal second moment.

Held as A = gain · Ã with a running scale, so that an update costs as much as its lookups (spec section 2),
except for decays below 0.5, where the scale would vanish and all V entries are averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.fisher.errors import FisherTypeError, FisherValueError
from kfac_onnx.fisher.settings import FactorSettings
from kfac_onnx.graph.symbols import SparseRows, Update, apply, call, constant, ints, variable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.graph.symbols import Variable

__all__ = ["EmbeddingInputKroneckerFactor", "as_towers", "row_count"]

SMALLEST_SCALE: Final = 2.0**-20
"""Below this running scale Ã takes the scale in, so that it never overflows."""

_FLOAT: Final = int(ir.DataType.FLOAT)
_DOUBLE: Final = int(ir.DataType.DOUBLE)
_INT: Final = int(ir.DataType.INT64)


def as_towers(
    tensors: ir.Value | Sequence[ir.Value | Sequence[ir.Value]],
) -> tuple[tuple[ir.Value, ...], ...]:
    """Return tensors as towers of uses: a single tensor, or one per tower, or several uses per tower."""
    if isinstance(tensors, ir.Value):
        return ((tensors,),)
    return tuple((tower,) if isinstance(tower, ir.Value) else tuple(tower) for tower in tensors)


def row_count(value: ir.Value) -> ir.Value:
    """Return the size of the first dimension, float32 scalar."""
    return call("Cast", call("Squeeze", call("Shape", value, start=0, end=1)), to=_FLOAT)


class EmbeddingInputKroneckerFactor:
    """Averaged counts of lookups per row, divided by the rows of the batch.

    `input_ids` integer [B] or [B, K], per tower, or per tower and use. Ids outside [0, V) count in B
    only. State `<name>/A` float32[V] and five scalars.
    """

    def __init__(
        self,
        input_ids: ir.Value | Sequence[ir.Value | Sequence[ir.Value]],
        vocab_size: int,
        *,
        settings: FactorSettings | None = None,
        name: str = "input_factor",
    ) -> None:
        self._towers = as_towers(input_ids)
        self._settings = FactorSettings() if settings is None else settings
        self.vocab_size = vocab_size
        start = 0.0 if self._settings.start_at_zero else 1.0
        unknown = self._settings.unknown_before_first
        shown = np.nan if unknown else 1.0
        total = np.nan if unknown else start * vocab_size
        self._A = variable(f"{name}/A", np.full(vocab_size, start, np.float32))
        self._scale = variable(f"{name}/scale", np.array(1.0))
        self._total = variable(f"{name}/total", np.array(start * vocab_size))
        self._count = variable(f"{name}/count", np.array(0, np.int64))
        self._gain = variable(f"{name}/gain", np.array(shown, np.float32))
        self._total_a = variable(f"{name}/total_a", np.array(total, np.float32))

    @property
    def variables(self) -> tuple[Variable, ...]:
        """All state of the factor."""
        return (self._A, self._scale, self._total, self._count, self._gain, self._total_a)

    @property
    def stored(self) -> ir.Value:
        """Ã, float32[V]; A = gain·Ã."""
        return self._A.value

    @property
    def gain(self) -> ir.Value:
        """The scalar that Ã is multiplied by."""
        return self._gain.value

    def total(self) -> ir.Value:
        """Return the trace of the factor, ΣA, float32 scalar."""
        return self._total_a.value

    def get_cov_var(self) -> ir.Value:
        """Return the diagonal A, float32[V]."""
        return call("Mul", self.stored, self.gain)

    def get_cov(self) -> ir.Value:
        """Return diag(A), float32[V, V]; for tests, it costs V² memory."""
        column = call("Unsqueeze", self.get_cov_var(), ints(1))
        shape = ints(self.vocab_size, self.vocab_size)
        eye = call("EyeLike", call("Expand", constant(0.0), shape))
        return call("Where", call("Cast", eye, to=int(ir.DataType.BOOL)), column, constant(0.0))

    def rows(self, indices: ir.Value) -> ir.Value:
        """Return A at the indices, float32[N]."""
        return call("Mul", call("Gather", self.stored, call("Cast", indices, to=_INT)), self.gain)

    def left_power(
        self, x: ir.Value | SparseRows, damping: ir.Value, exponent: float
    ) -> ir.Value | SparseRows:
        """Return (A + damping)^exponent times the rows of x."""
        a = self.rows(x.indices) if isinstance(x, SparseRows) else self.get_cov_var()
        weight = call("Pow", call("Add", a, damping), constant(exponent))
        column = call("Unsqueeze", weight, ints(1))
        if isinstance(x, SparseRows):
            return SparseRows(x.indices, call("Mul", column, x.values), x.dense_shape)
        return call("Mul", column, x)

    def left_multiply(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return (A + damping) times the rows of x."""
        return self.left_power(x, damping, 1.0)

    def left_multiply_inverse(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return 1/(A + damping) times the rows of x; live, nothing is stored."""
        return self.left_power(x, damping, -1.0)

    def register_damped_inverse(self, damping: ir.Value) -> None:
        """Do nothing: a diagonal is inverted where it is read."""

    def make_inverse_update_ops(self) -> list[Update]:
        """Return no update: a diagonal is inverted where it is read."""
        return []

    def make_covariance_update_op(self, ema_decay: float) -> Update:
        """Return the update that averages in a batch; raises for ids that are not integer [B] or [B, K]."""
        if not 0.0 <= ema_decay <= 1.0:
            raise FisherValueError(f"the decay of an average must be between 0 and 1, not {ema_decay:g}")
        ids, weights, lookups = self._batch()
        # How much a row counts on average; an empty batch changes nothing.
        some = call("Greater", lookups, constant(0.0))
        share = call("Div", call("ReduceSum", weights, keepdims=0), lookups)
        share = call("Where", some, share, constant(1.0))
        start_A, start_total = self._A.value, self._total.value
        if self._settings.zero_debias and not self._settings.start_at_zero:
            first = call("Equal", self._count.value, constant(0, np.int64))
            start_A = call("Where", first, constant(0.0), start_A)
            start_total = call("Where", first, constant(0.0, np.float64), start_total)
        share64 = call("Cast", share, to=_DOUBLE)
        if ema_decay >= 0.5:
            return self._scaled(ema_decay, ids, weights, lookups, share64, start_A, start_total)
        return self._averaged(ema_decay, ids, weights, lookups, share64, start_A, start_total)

    def _batch(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return all ids inside the table int64[N], their weights float32[N], and what divides them."""
        separate = self._settings.towers == "separate"
        flat: list[ir.Value] = []
        weights: list[ir.Value] = []
        total: ir.Value | None = None
        for tower in self._towers:
            rows: ir.Value | None = None
            for use in tower:
                rows = row_count(use) if rows is None else call("Add", rows, row_count(use))
            if rows is None:
                raise FisherValueError("a tower was registered without any ids")
            total = rows if total is None else call("Add", total, rows)
            for use in tower:
                ids, inside = self._flat(use)
                flat.append(ids)
                weight = call("Mul", rows, constant(float(len(self._towers))))
                weights.append(call("Div", inside, weight) if separate else inside)
        if total is None:
            raise FisherValueError("the input factor has no ids")
        lookups = constant(1.0) if separate else total
        return call("Concat", *flat, axis=0), call("Concat", *weights, axis=0), lookups

    def _flat(self, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        if ids.dtype is not None and not ids.dtype.is_integer():
            raise FisherTypeError(f"ids '{ids.name}' must be integers, not {ids.dtype.name}")
        if ids.shape is None:
            raise FisherValueError(f"ids '{ids.name}' must have a known rank, 1 or 2")
        if ids.shape.rank() not in (1, 2):
            raise FisherValueError(f"ids '{ids.name}' must have rank 1 or 2, not {ids.shape.rank()}")
        flat = call("Reshape", call("Cast", ids, to=_INT), ints(-1))
        last = constant(self.vocab_size - 1, np.int64)
        clipped = call("Clip", flat, constant(0, np.int64), last)
        return clipped, call("Cast", call("Equal", clipped, flat), to=_FLOAT)

    def _scaled(
        self,
        decay: float,
        ids: ir.Value,
        weights: ir.Value,
        lookups: ir.Value,
        share: ir.Value,
        start_A: ir.Value,
        start_total: ir.Value,
    ) -> Update:
        debias = int(self._settings.zero_debias)
        state = (self._scale.value, start_total, self._count.value, lookups)
        scale, total, count, increment, gain, _ = apply(
            "InputFactorDecay", *state, decay=decay, debias=debias, normalize=1
        )
        (A,) = apply("InputFactorUpdate", start_A, ids, call("Mul", increment, weights))
        # The operator counts every lookup once; here a row may hold K ids, or ids outside the table.
        one = constant(1.0, np.float64)
        excess = call("Mul", constant(1.0 - decay, np.float64), call("Sub", share, one))
        total = call("Add", total, excess)
        small = call("Less", scale, constant(SMALLEST_SCALE, np.float64))
        fold = call("Where", small, scale, one)
        fold32 = call("Cast", fold, to=_FLOAT)
        shown = call("Div", gain, fold32)
        correction = call("Div", call("Cast", gain, to=_DOUBLE), scale)
        return self._assign(
            call("Mul", A, fold32),
            call("Div", scale, fold),
            total,
            count,
            shown,
            call("Mul", total, correction),
        )

    def _averaged(
        self,
        decay: float,
        ids: ir.Value,
        weights: ir.Value,
        lookups: ir.Value,
        share: ir.Value,
        start_A: ir.Value,
        start_total: ir.Value,
    ) -> Update:
        unscaled = call("Mul", start_A, call("Cast", self._scale.value, to=_FLOAT))
        (A,) = apply("InputFactorAverage", unscaled, ids, weights, lookups, decay=decay)
        one, rho = constant(1.0, np.float64), constant(decay, np.float64)
        kept = call("Mul", rho, start_total)
        total = call("Add", kept, call("Mul", constant(1.0 - decay, np.float64), share))
        some = call("Greater", lookups, constant(0.0))
        total = call("Where", some, total, start_total)
        count = call("Add", self._count.value, call("Cast", some, to=_INT))
        correction = one
        if self._settings.zero_debias:
            weight = call("Sub", one, call("Pow", rho, call("Cast", count, to=_DOUBLE)))
            never = call("Equal", count, constant(0, np.int64))
            correction = call("Where", never, one, call("Div", one, weight))
        gain = call("Cast", correction, to=_FLOAT)
        return self._assign(A, one, total, count, gain, call("Mul", total, correction))

    def _assign(
        self,
        A: ir.Value,
        scale: ir.Value,
        total: ir.Value,
        count: ir.Value,
        gain: ir.Value,
        total_a: ir.Value,
    ) -> Update:
        values = (A, scale, total, count, gain, call("Cast", total_a, to=_FLOAT))
        return Update(assignments=tuple(zip(self.variables, values, strict=True)))
