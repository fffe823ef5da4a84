"""What is added to the eigenvalues of the two factors, λ_A to those of A and λ_G to those of G.

    relative   λ_A = ρ·mean(A),  λ_G = ρ·mean(diag G)                                 (means at least 1e-30)
    pi         λ_A = √λ·pi,  λ_G = √λ/pi,  pi = √(mean(A) / mean(diag G))

so that relative damping is pi's with λ = ρ²·mean(A)·mean(diag G), and does not depend on the loss's scale.
U independent uses share one λ (λ/U each), which is ρ/√U. Source: Martens & Grosse 2015
(https://arxiv.org/abs/1503.05671), section 6.3 (pi); docs/mathematics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol

import onnx_ir as ir

from kfac_onnx.graph.emit import Out
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import FLOAT

if TYPE_CHECKING:
    from kfac_onnx.fisher.place import Place

__all__ = ["Damping", "Pi", "Relative"]

_MODES: Final = {"off": 0, "tracenorm": 1, "guarded": 2}


class Damping(Protocol):
    """A way to damp both factors."""

    @property
    def value(self) -> float | ir.Value:
        """ρ or λ: a number, or a scalar tensor."""
        ...

    def with_value(self, value: float) -> Damping:
        """Return the same way with another ρ or λ."""
        ...

    def for_uses(self, uses: int) -> Damping:
        """Return the damping of one of U uses that are taken as independent."""
        ...

    def condition(self, dim: int) -> float | None:
        """Return the largest condition of a damped factor [dim, dim]; None where nothing bounds it."""
        ...

    def split(
        self, total_a: ir.Value | None, factor: ir.Value, vocab_size: int, dim: int, place: Place
    ) -> tuple[ir.Value | None, ir.Value]:
        """Emit λ_A and λ_G, float32 scalars, from ΣA (None: no A, and no λ_A) and G float32[D, D]."""
        ...


@dataclass(frozen=True)
class Relative:
    """A share ρ = `value` of each factor's mean eigenvalue."""

    value: float

    def with_value(self, value: float) -> Relative:
        """Return the same way with another ρ."""
        return Relative(value)

    def for_uses(self, uses: int) -> Relative:
        """Return ρ/√U."""
        return Relative(self.value / math.sqrt(uses))

    def condition(self, dim: int) -> float:
        """Return 1 + D/ρ: the trace bounds the largest eigenvalue."""
        return 1.0 + dim / self.value

    def split(
        self, total_a: ir.Value | None, factor: ir.Value, vocab_size: int, dim: int, place: Place
    ) -> tuple[ir.Value | None, ir.Value]:
        """Emit λ_A and λ_G."""
        (trace,) = place.op("FactorTrace", [factor], [Out("trace", FLOAT, [])])
        damping_a: ir.Value | None = None
        if total_a is not None:
            out = [Out("damping_a", FLOAT, [])]
            (damping_a,) = place.op("DampingRelative", [total_a], out, rho=self.value, size=vocab_size)
        out = [Out("damping_g", FLOAT, [])]
        (damping_g,) = place.op("DampingRelative", [trace], out, rho=self.value, size=dim)
        return damping_a, damping_g


@dataclass(frozen=True)
class Pi:
    """λ = `value` (a number, or a scalar tensor), split by the ratio of the factors' mean eigenvalues.

    `mode`: by the ratio, by the ratio but evenly where a trace is 0, or evenly.
    """

    value: float | ir.Value
    mode: Literal["tracenorm", "guarded", "off"] = "tracenorm"
    uses: int = 1
    """How many uses share λ."""

    def with_value(self, value: float) -> Pi:
        """Return the same way with another λ."""
        return replace(self, value=value)

    def for_uses(self, uses: int) -> Pi:
        """Return λ/U."""
        return replace(self, uses=uses)

    def condition(self, dim: int) -> None:
        """Return None: a small λ bounds nothing."""

    def split(
        self, total_a: ir.Value | None, factor: ir.Value, vocab_size: int, dim: int, place: Place
    ) -> tuple[ir.Value | None, ir.Value]:
        """Emit λ_A and λ_G."""
        if not isinstance(self.value, ir.Value):
            damping_a, damping_g = self._ratio(self.value / self.uses, total_a, factor, vocab_size, place)
        else:
            emit = place.emitter(Phase.GRADIENTS)
            over, under = self._ratio(1.0, total_a, factor, vocab_size, place)
            damping = place.float32(self.value)
            shared = emit.node("Div", [damping, place.number(self.uses)], dtype=FLOAT, shape=[])
            root = emit.node("Sqrt", [shared], name="root_damping", dtype=FLOAT, shape=[])
            damping_a = emit.node("Mul", [root, over], name="damping_a", dtype=FLOAT, shape=[])
            damping_g = emit.node("Mul", [root, under], name="damping_g", dtype=FLOAT, shape=[])
        return (None if total_a is None else damping_a), damping_g

    def ratio(self, total_a: ir.Value, factor: ir.Value, vocab_size: int, place: Place) -> ir.Value:
        """Emit pi, float32 scalar."""
        return self._ratio(1.0, total_a, factor, vocab_size, place)[0]

    def _ratio(
        self, damping: float, total_a: ir.Value | None, factor: ir.Value, vocab_size: int, place: Place
    ) -> tuple[ir.Value, ir.Value]:
        total = place.number(1.0) if total_a is None else total_a
        over, under = place.op(
            "DampingPi",
            [total, factor],
            [Out("damping_a", FLOAT, []), Out("damping_g", FLOAT, [])],
            damping=damping,
            vocab_size=vocab_size,
            pi=_MODES[self.mode],
        )
        return over, under
