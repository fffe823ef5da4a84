"""A full factor: the averaged second moment of rows, and its stored powers.

    G ← decay·G + (1 − decay)·scale·sym(gᵀg)/M        over the M rows of a batch

For an embedding the rows are g = dL/d(looked-up row). Source: Martens & Grosse 2015
(https://arxiv.org/abs/1503.05671), sections 3 and 5; docs/mathematics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.fisher.errors import FisherIndexError, FisherKeyError, FisherTypeError, FisherValueError
from kfac_onnx.fisher.input_factor import check_decay
from kfac_onnx.fisher.lookups import as_towers, row_count
from kfac_onnx.fisher.roots import any_root
from kfac_onnx.fisher.sampling import GradientRows, Sample
from kfac_onnx.fisher.settings import FactorSettings
from kfac_onnx.fisher.symbols import SparseRows, StoredPower, Update
from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase, RootCheck
from kfac_onnx.step.draft import BOOL, FLOAT, INT64

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.fisher.place import Place
    from kfac_onnx.fisher.roots import Inverse, InverseRoot
    from kfac_onnx.fisher.settings import Average

    DampingOf = ir.Value | Callable[[], ir.Value]
    """λ_G: a scalar tensor, or a function that returns it once the factors are there."""

__all__ = ["FullyConnectedKroneckerFactor"]

ITERATIONS: Final = 30
"""Newton–Schulz iterations of a block alone, of unknown condition: 2.25^30 covers what float32 can hold."""
TOLERANCE: Final = 2e-6
"""Residual above which the host's eigenvalues take over; a fifth of the 1e-5 that results must keep."""


class FullyConnectedKroneckerFactor:
    """G, averaged sum over sources of sym(gᵀ g)/B.

    `tensors` are float [B, D] per source, per source and tower, or per source, tower and use (float64,
    float16 and bfloat16 become float32), or the `GradientRows` of a training step. State `<prefix>/G`
    float32[D, D], `<prefix>/G.count`, and `<prefix>/root` float32[D, D] for each registered power; `letter`
    names the factor of a layer's inputs, A, `power` its powers. With `has_bias` a one is put at the end of
    each row [D - 1].
    """

    def __init__(
        self,
        tensors: GradientRows | Sequence[ir.Value | Sequence[ir.Value | Sequence[ir.Value]]],
        average: Average | None = None,
        has_bias: bool = False,
        *,
        place: Place,
        settings: FactorSettings | None = None,
        sample: Sample | None = None,
        letter: str = "G",
        power: str = "root",
    ) -> None:
        self._settings = FactorSettings() if settings is None else settings
        self._average = self._settings.average if average is None else average
        self._sample = Sample() if sample is None else sample
        self._place = place
        self._power_name = power
        self._has_bias = has_bias
        self._rows: GradientRows | tuple[tuple[tuple[ir.Value, ...], ...], ...]
        if isinstance(tensors, GradientRows):
            self._rows = tensors
            self.embedding_dim = _common_width([tensors.rows])
        elif not tensors:
            raise FisherIndexError("the output factor needs gradients of at least one source")
        else:
            self._rows = tuple(as_towers(source) for source in tensors)
            self.embedding_dim = _common_width(
                [use for source in self._rows for tower in source for use in tower]
            ) + int(has_bias)
        start = {0.0: "zeros", 1.0: "identity"}.get(self._average.start)
        if start is None:
            raise FisherValueError(f"G starts as 0 or as I, not as {self._average.start:g}·I")
        self._G = place.state(letter, FLOAT, self._square, start)
        self._count = place.counter(f"{letter}.count")
        self._powers: dict[tuple[float, DampingOf], ir.Value] = {}
        self._reading: ir.Value | None = None
        self._averaged: ir.Value | None = None

    @property
    def _square(self) -> list[int]:
        return [self.embedding_dim, self.embedding_dim]

    @property
    def states(self) -> tuple[ir.Value, ...]:
        """All state of the factor."""
        return (self._G, self._count, *self._powers.values())

    def get_cov_var(self) -> ir.Value:
        """Return G as it is used (debiased where asked for), float32[D, D]."""
        if self._reading is None:
            self._reading = self._read(self._G, self._count)
            if self._average.unknown_before_first:
                emit = self._place.emitter(Phase.GRADIENTS)
                some = emit.node("Cast", [self._count], attributes={"to": BOOL}, dtype=BOOL, shape=[])
                unknown = self._place.number(np.nan)
                self._reading = emit.node(
                    "Where", [some, self._reading, unknown], dtype=FLOAT, shape=self._square
                )
        return self._reading

    def get_cov(self) -> ir.Value:
        """Return the same as `get_cov_var`."""
        return self.get_cov_var()

    def damped(self, damping: DampingOf) -> ir.Value:
        """Return G + damping·I."""
        factor = self.get_cov_var()
        eye = self._node("EyeLike", [factor], self._square)
        return self._node(
            "Add", [factor, self._node("Mul", [_value(damping), eye], self._square)], self._square
        )

    def register_damped_inverse(self, damping: DampingOf) -> None:
        """Ask for (G + damping·I)⁻¹ at each inverse update."""
        self.register_matpower(-1.0, damping)

    def register_matpower(self, exponent: float, damping: DampingOf) -> None:
        """Ask for (G + damping·I)^exponent at each inverse update; exponent 1 is always live."""
        key = (float(exponent), damping)
        if exponent == 1 or key in self._powers:
            return
        what = self._power_name if not self._powers else f"{self._power_name}_{len(self._powers) + 1}"
        start = "zeros" if self._settings.inverse_starts_at_zero else "identity"
        self._powers[key] = self._place.state(what, FLOAT, self._square, start, "root")

    def get_damped_inverse(self, damping: DampingOf) -> ir.Value:
        """Return the inverse of the last inverse update."""
        return self.get_matpower(-1.0, damping)

    def get_matpower(self, exponent: float, damping: DampingOf) -> ir.Value:
        """Return the stored power, or the live damped factor for exponent 1."""
        if exponent == 1:
            return self.damped(damping)
        stored = self._powers.get((float(exponent), damping))
        if stored is None:
            raise FisherKeyError(
                f"the power {exponent:g} of the output factor was not registered with this damping"
            )
        return stored

    def right_multiply(self, x: ir.Value | SparseRows, damping: DampingOf) -> ir.Value | SparseRows:
        """Return x (G + damping·I)."""
        return self._right(x, self.damped(damping))

    def right_multiply_inverse(self, x: ir.Value | SparseRows, damping: DampingOf) -> ir.Value | SparseRows:
        """Return x times the stored inverse."""
        return self._right(x, self.get_damped_inverse(damping))

    def left_multiply(self, x: ir.Value, damping: DampingOf) -> ir.Value:
        """Return (G + damping·I) x."""
        return self._node("MatMul", [self.damped(damping), x])

    def left_multiply_inverse(self, x: ir.Value, damping: DampingOf) -> ir.Value:
        """Return the stored inverse times x."""
        return self._node("MatMul", [self.get_damped_inverse(damping), x])

    def _right(self, x: ir.Value | SparseRows, matrix: ir.Value) -> ir.Value | SparseRows:
        if isinstance(x, SparseRows):
            return SparseRows(x.indices, self._node("MatMul", [x.values, matrix]), x.dense_shape)
        return self._node("MatMul", [x, matrix])

    # --- averaging ----------------------------------------------------------------------------------

    def make_covariance_update_op(self, ema_decay: float | None = None) -> Update:
        """Return the update that averages in a batch; `ema_decay`, where given, must be the factor's own."""
        check_decay(ema_decay, self._average.decay)
        return self._averaged_in()

    def take_in(self) -> None:
        """Average in the batch of a training step; from here on the factor is read as it is after that."""
        (_, G), (_, count) = self._averaged_in().assignments
        self._averaged = G
        self._place.flag(G)  # Σ|G|: kept with a trace beyond float32, each refresh from then on would fail
        self._reading = self._read(G, count)

    def _averaged_in(self) -> Update:
        place, start = self._place, self._G
        batch = self._rows if isinstance(self._rows, GradientRows) else self._stacked(self._rows)
        if self._average.forgets_its_start:
            emit = place.emitter(Phase.GRADIENTS)
            some = emit.node("Cast", [self._count], attributes={"to": BOOL}, dtype=BOOL, shape=[])
            start = emit.node("Where", [some, start, place.number(0.0)], dtype=FLOAT, shape=self._square)
        rows, number = self._sample.take(batch, self._count, place)
        scale = place.number(1.0) if batch.scale is None else batch.scale
        G, count = place.op(
            "OutputFactorUpdate",
            [start, self._count, rows, number, scale],
            [Out("G", FLOAT, self._square), Out("G.count", INT64, [])],
            decay=self._average.decay,
        )
        place.draft.keep(self._G, G, Phase.GRADIENTS)
        place.draft.keep(self._count, count, Phase.GRADIENTS)
        return Update(((self._G, G), (self._count, count)))

    def _read(self, G: ir.Value, count: ir.Value) -> ir.Value:
        if not self._average.debias:
            return G
        outs = [Out("G.debiased", FLOAT, self._square)]
        (debiased,) = self._place.op("FactorDebias", [G, count], outs, decay=self._average.decay)
        return debiased

    def _stacked(self, sources: Sequence[Sequence[Sequence[ir.Value]]]) -> GradientRows:
        """Return all gradient rows and what divides their second moment."""
        separate, place = self._settings.towers == "separate", self._place
        emit = place.emitter(Phase.GRADIENTS)
        shape, along = [None, self.embedding_dim], {"axis": 0}
        stacked: list[ir.Value] = []
        for source in sources:
            for tower in source:
                rows = [place.float32(use) for use in tower]
                width = self.embedding_dim - int(self._has_bias)
                tower_rows = emit.node("Concat", rows, attributes=along, dtype=FLOAT, shape=[None, width])
                if self._has_bias:
                    pads = emit.constant(np.asarray([0, 0, 0, 1], np.int64), "one_column")
                    tower_rows = emit.node(
                        "Pad", [tower_rows, pads, place.number(1.0)], dtype=FLOAT, shape=shape
                    )
                if separate:
                    size = row_count([tower_rows], place)
                    size = self._node("Mul", [size, place.number(float(len(source)))], [])
                    tower_rows = self._node("Div", [tower_rows, self._node("Sqrt", [size], [])], shape)
                stacked.append(tower_rows)
        number = place.number(1.0)
        if not separate:
            number = row_count([use for tower in sources[0] for use in tower], place)
        rows = emit.node("Concat", stacked, attributes=along, name="rows", dtype=FLOAT, shape=shape)
        return GradientRows(rows, number)

    # --- powers -------------------------------------------------------------------------------------

    def make_inverse_update_ops(self) -> list[Update]:
        """Return one update that recomputes every registered power from the factor as it is now."""
        powers = tuple(
            self._power(exponent, _value(damping), stored)
            for (exponent, damping), stored in self._powers.items()
        )
        return [Update(powers=powers)] if powers else []

    def _power(self, exponent: float, damping: ir.Value, stored: ir.Value) -> StoredPower:
        # The damped factor goes in, so that a G of zeros gives 1/damping, as the original's does.
        M, none = self.damped(damping), self._place.number(0.0)
        method = any_root(exponent, iterations=ITERATIONS, tolerance=TOLERANCE)
        result = method.emit(self._place.emitter(Phase.REFRESH), M, none, stored)
        candidate, residual = (None, None) if result is None else result
        factor = self.get_cov_var()
        return StoredPower(
            stored, exponent, factor, damping, candidate, residual, method.tolerance, method.path
        )

    def refreshed(self, damping: ir.Value, method: Inverse | InverseRoot, every: int) -> ir.Value:
        """Return the power in a training step: recomputed at the schedule's steps, and kept between them."""
        place, square = self._place, self._square
        factor, draft = self.get_cov_var(), place.draft
        self.register_matpower(method.exponent, damping)
        old = self._powers[(method.exponent, damping)]
        emit = place.emitter(Phase.REFRESH)
        now = draft.due(every)
        then, other = emit.branch("refresh"), emit.branch("keep")
        then.graph.outputs.extend(method.emit(then, factor, damping, old))
        zero = emit.constant(np.float32(0.0), "no_residual")
        other.graph.outputs.append(other.node("Identity", [old], name="root", dtype=FLOAT, shape=square))
        other.graph.outputs.append(other.node("Identity", [zero], name="residual", dtype=FLOAT, shape=[]))
        root, residual = emit.node(
            "If",
            [now],
            attributes={"then_branch": then.graph, "else_branch": other.graph},
            outputs=[Out("root", FLOAT, square), Out("residual", FLOAT, [])],
        )
        draft.remember(root, residual)
        draft.keep(old, root, Phase.REFRESH)
        place.flag(root)
        draft.roots.append(
            RootCheck(
                parameter=str(place.parameter),
                root=str(root.name),
                factor=str(factor.name),
                damping=str(damping.name),
                residual=str(residual.name),
                exponent=method.exponent,
                tolerance=method.tolerance,
            )
        )
        return root

    def is_active(self, number: ir.Value) -> ir.Value:
        """Return whether there were rows and G is not zero: otherwise nothing must move."""
        emit = self._place.emitter(Phase.PRECONDITION)
        D = self.embedding_dim
        flat, start, end, step = (
            emit.constant(np.asarray([value], np.int64), "entry") for value in (-1, 0, D * D, D + 1)
        )
        # Not debiased: that would be work for a refresh in every step, and either trace is 0 with the other.
        factor = self.get_cov_var() if self._averaged is None else self._averaged
        entries = emit.node("Reshape", [factor, flat], name="entries", dtype=FLOAT, shape=[D * D])
        diagonal = emit.node(
            "Slice", [entries, start, end, start, step], name="diagonal", dtype=FLOAT, shape=[D]
        )
        trace = emit.node(
            "ReduceSum", [diagonal], attributes={"keepdims": 0}, name="trace", dtype=FLOAT, shape=[]
        )
        least = emit.node("Min", [trace, number], name="active", dtype=FLOAT, shape=[])
        return emit.node("Greater", [least, self._place.number(0.0)], name="active", dtype=BOOL, shape=[])

    def outer_with(self, left: ir.Value, vocab_size: int) -> ir.Value:
        """Return kron(left, G), float32[V·D, V·D], of float32[V, V]; for tests, it costs (V·D)² memory."""
        D, V = self.embedding_dim, vocab_size
        emit = self._place.emitter(Phase.GRADIENTS)

        def ints(*numbers: int) -> ir.Value:
            return emit.constant(np.asarray(numbers, np.int64), "shape")

        A = self._node("Reshape", [left, ints(V, 1, V, 1)])
        G = self._node("Reshape", [self.get_cov_var(), ints(1, D, 1, D)])
        return self._node("Reshape", [self._node("Mul", [A, G]), ints(V * D, V * D)])

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value], shape: Sequence[int | None] | None = None
    ) -> ir.Value:
        return self._place.emitter(Phase.GRADIENTS).node(op_type, inputs, dtype=FLOAT, shape=shape)


def _value(damping: DampingOf) -> ir.Value:
    return damping if isinstance(damping, ir.Value) else damping()


def _common_width(tensors: Sequence[ir.Value]) -> int:
    """Return D of float tensors [B, D]; raises where they are others or disagree."""
    width: int | None = None
    for tensor in tensors:
        if tensor.dtype is not None and not tensor.dtype.is_floating_point():
            raise FisherTypeError(
                f"gradients '{tensor.name}' must be floating point, not {tensor.dtype.name}"
            )
        if tensor.shape is None or tensor.shape.rank() != 2:
            raise FisherValueError(f"gradients '{tensor.name}' must have shape [batch, dim]")
        size = tensor.shape[1]
        if not isinstance(size, int) or (width is not None and size != width):
            raise FisherValueError(
                f"gradients '{tensor.name}' must have the embedding's width, a fixed number"
            )
        width = size
    if width is None:
        raise FisherIndexError("the output factor needs gradients of at least one tower")
    return width
