"""The output factor: the averaged second moment of dL/d(row), and its stored powers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.fisher.errors import FisherIndexError, FisherKeyError, FisherTypeError, FisherValueError
from kfac_onnx.fisher.input_factor import as_towers, row_count
from kfac_onnx.fisher.settings import FactorSettings
from kfac_onnx.graph.symbols import HostPower, SparseRows, Update, apply, call, constant, ints, variable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.graph.symbols import Variable

__all__ = ["FullyConnectedKroneckerFactor"]

_FLOAT: Final = int(ir.DataType.FLOAT)

ITERATIONS: Final = 30
"""Newton–Schulz iterations where the condition is unknown: 2.25^30 covers what float32 can hold."""
TOLERANCE: Final = 2e-6
"""Residual above which the host's eigenvalues take over; a fifth of the 1e-5 that results must keep."""
LARGEST_CHAIN: Final = 8
"""Integer powers up to this size are products in the graph; beyond, the host's eigenvalues."""


class FullyConnectedKroneckerFactor:
    """G, averaged sum over sources of sym(gᵀ g)/B.

    `tensors` float [B, D] per source, per source and tower, or per source, tower and use; float64,
    float16 and bfloat16 become float32. State `<name>/G`, `<name>/Ghat` float32[D, D], `<name>/count`, and
    one float32[D, D] for each registered power.
    """

    def __init__(
        self,
        tensors: Sequence[ir.Value | Sequence[ir.Value | Sequence[ir.Value]]],
        *,
        settings: FactorSettings | None = None,
        name: str = "output_factor",
    ) -> None:
        if not tensors:
            raise FisherIndexError("the output factor needs gradients of at least one source")
        self._sources = tuple(as_towers(source) for source in tensors)
        self._settings = FactorSettings() if settings is None else settings
        self._name = name
        self.embedding_dim = self._width()
        eye = np.eye(self.embedding_dim, dtype=np.float32)
        start = np.zeros_like(eye) if self._settings.start_at_zero else eye
        shown = np.full_like(eye, np.nan) if self._settings.unknown_before_first else start
        self._G = variable(f"{name}/G", start)
        self._count = variable(f"{name}/count", np.array(0, np.int64))
        self._Ghat = variable(f"{name}/Ghat", shown)
        self._powers: dict[tuple[float, ir.Value], Variable] = {}
        self._start_power = np.zeros_like(eye) if self._settings.inverse_starts_at_zero else eye

    def _width(self) -> int:
        width: int | None = None
        for tensor in (use for source in self._sources for tower in source for use in tower):
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

    @property
    def variables(self) -> tuple[Variable, ...]:
        """All state of the factor."""
        return (self._G, self._count, self._Ghat, *self._powers.values())

    def get_cov_var(self) -> ir.Value:
        """Return G as it is used (debiased where asked for), float32[D, D]."""
        return self._Ghat.value

    def get_cov(self) -> ir.Value:
        """Return the same as `get_cov_var`."""
        return self._Ghat.value

    def damped(self, damping: ir.Value) -> ir.Value:
        """Return G + damping·I."""
        return call("Add", self._Ghat.value, call("Mul", damping, call("EyeLike", self._Ghat.value)))

    def register_damped_inverse(self, damping: ir.Value) -> None:
        """Ask for (G + damping·I)⁻¹ at each inverse update."""
        self.register_matpower(-1.0, damping)

    def register_matpower(self, exponent: float, damping: ir.Value) -> None:
        """Ask for (G + damping·I)^exponent at each inverse update; exponent 1 is always live."""
        key = (float(exponent), damping)
        if exponent == 1 or key in self._powers:
            return
        name = f"{self._name}/power_{exponent:g}_{len(self._powers)}"
        self._powers[key] = variable(name, self._start_power)

    def get_damped_inverse(self, damping: ir.Value) -> ir.Value:
        """Return the inverse of the last inverse update."""
        return self.get_matpower(-1.0, damping)

    def get_matpower(self, exponent: float, damping: ir.Value) -> ir.Value:
        """Return the stored power, or the live damped factor for exponent 1."""
        if exponent == 1:
            return self.damped(damping)
        stored = self._powers.get((float(exponent), damping))
        if stored is None:
            raise FisherKeyError(
                f"the power {exponent:g} of the output factor was not registered with this damping"
            )
        return stored.value

    def right_multiply(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return x (G + damping·I)."""
        return self._right(x, self.damped(damping))

    def right_multiply_inverse(self, x: ir.Value | SparseRows, damping: ir.Value) -> ir.Value | SparseRows:
        """Return x times the stored inverse."""
        return self._right(x, self.get_damped_inverse(damping))

    def left_multiply(self, x: ir.Value, damping: ir.Value) -> ir.Value:
        """Return (G + damping·I) x."""
        return call("MatMul", self.damped(damping), x)

    def left_multiply_inverse(self, x: ir.Value, damping: ir.Value) -> ir.Value:
        """Return the stored inverse times x."""
        return call("MatMul", self.get_damped_inverse(damping), x)

    def _right(self, x: ir.Value | SparseRows, matrix: ir.Value) -> ir.Value | SparseRows:
        if isinstance(x, SparseRows):
            return SparseRows(x.indices, call("MatMul", x.values, matrix), x.dense_shape)
        return call("MatMul", x, matrix)

    def make_covariance_update_op(self, ema_decay: float) -> Update:
        """Return the update that averages in a batch."""
        if not 0.0 <= ema_decay <= 1.0:
            raise FisherValueError(f"the decay of an average must be between 0 and 1, not {ema_decay:g}")
        rows, lookups = self._batch()
        start = self._G.value
        if self._settings.zero_debias and not self._settings.start_at_zero:
            first = call("Equal", self._count.value, constant(0, np.int64))
            start = call("Where", first, constant(0.0), start)
        state = (start, self._count.value, rows, lookups, constant(1.0))
        G, count = apply("OutputFactorUpdate", *state, decay=ema_decay)
        Ghat = apply("FactorDebias", G, count, decay=ema_decay)[0] if self._settings.zero_debias else G
        return Update(assignments=((self._G, G), (self._count, count), (self._Ghat, Ghat)))

    def _batch(self) -> tuple[ir.Value, ir.Value]:
        """Return all gradient rows and what divides their second moment."""
        separate = self._settings.towers == "separate"
        stacked: list[ir.Value] = []
        total: ir.Value | None = None
        for index, source in enumerate(self._sources):
            for tower in source:
                rows = call("Concat", *(call("Cast", use, to=_FLOAT) for use in tower), axis=0)
                size = row_count(rows)
                if separate:
                    towers = call("Mul", size, constant(float(len(source))))
                    rows = call("Div", rows, call("Sqrt", towers))
                elif index == 0:
                    total = size if total is None else call("Add", total, size)
                stacked.append(rows)
        return call("Concat", *stacked, axis=0), constant(1.0) if total is None else total

    def make_inverse_update_ops(self) -> list[Update]:
        """Return one update that recomputes every registered power from the factor as it is now."""
        powers = tuple(
            self._power(exponent, damping, stored) for (exponent, damping), stored in self._powers.items()
        )
        return [Update(powers=powers)] if powers else []

    def _power(self, exponent: float, damping: ir.Value, stored: Variable) -> HostPower:
        M, none = self.damped(damping), constant(0.0)
        candidate: ir.Value | None = None
        residual: ir.Value | None = None
        path = "host-eigh"
        whole = exponent.is_integer() and abs(exponent) <= LARGEST_CHAIN
        if exponent in (-0.5, 0.5):
            candidate, residual = apply("FactorInverseRoot", M, none, stored.value, iterations=ITERATIONS)
            path = "onnx/newton-schulz"
            if exponent > 0:
                candidate = call("MatMul", M, candidate)
        elif whole and exponent < 0:
            inverse, residual = apply("FactorInverse", M, none, stored.value)
            candidate, path = _chain(inverse, int(-exponent)), "onnx/inverse"
        elif whole:
            candidate, path = _chain(M, int(exponent)), "onnx/matmul"
        return HostPower(stored, exponent, self._Ghat.value, damping, candidate, residual, TOLERANCE, path)

    def outer_with(self, diagonal: ir.Value, vocab_size: int) -> ir.Value:
        """Return kron(diag(diagonal), G), float32[V·D, V·D]; for tests, it costs (V·D)² memory."""
        D = self.embedding_dim
        A = call("Reshape", diagonal, ints(vocab_size, 1, vocab_size, 1))
        G = call("Reshape", self._Ghat.value, ints(1, D, 1, D))
        return call("Reshape", call("Mul", A, G), ints(vocab_size * D, vocab_size * D))


def _chain(M: ir.Value, exponent: int) -> ir.Value:
    if exponent == 0:
        return call("EyeLike", M)
    product = M
    for _ in range(exponent - 1):
        product = call("MatMul", product, M)
    return product
