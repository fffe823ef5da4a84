"""The named settings of the embedding block on a training graph, as data.

    update = (a + damping_a)^exponent · Grad · (Ĝ + damping_g·I)^exponent        row_scale "factor"
    update = rowscale(Grad · (Ĝ + damping_g·I)^exponent)                         "adagrad", "window"

| preset     | rows scaled by            | exponent | damping        | source                    |
|------------|---------------------------|----------|----------------|---------------------------|
| `r1.7`     | counts/M, from 1, decayed | −1       | λ = 1e-3, pi   | TensorFlow 1.7's block    |
| `half`     | counts, debiased          | −1/2     | ρ = 0.01       | spec section 2; default   |
| `adagrad`  | sum of mean squares       | −1/2     | ρ = 0.01       | spec section 3            |
| `adaptive` | widening window of them   | −1/2     | ρ = 0.01       | spec section 4            |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.step.draft import EARLY_REFRESHES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ADAGRAD",
    "ADAPTIVE",
    "HALF",
    "PRESETS",
    "R17",
    "Damping",
    "Preset",
    "find_preset",
]


@dataclass(frozen=True, kw_only=True)
class Damping:
    """What is added to each factor's eigenvalues.

    `relative`: `value` = ρ, that share of the factor's mean eigenvalue. `pi`: `value` = λ, split
    between the factors by the ratio of their mean eigenvalues.
    """

    kind: Literal["relative", "pi"]
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise UserError(f"damping must be a positive number, not {self.value:g}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All settings of a preconditioned table. Change one with `dataclasses.replace`."""

    name: str
    row_scale: Literal["factor", "adagrad", "window"]
    """What scales each row: the input factor A, a sum of squares, or a window of them."""
    exponent: float
    """Power of both damped factors, −1 or −1/2. The inverse root of G is used for −1/2."""
    damping: Damping
    input_decay: float | None
    """Weight kept from the old A at each step; None where the preset has no A."""
    output_decay: float
    """Weight kept from the old G at each step."""
    debias: bool
    """Whether averages start from nothing and are divided by 1 − decay^count."""
    normalize_counts: bool
    """Whether counts are divided by the number of lookups."""
    scale_gradients: bool
    """Whether G takes gradients times the divisor c of a mean loss (per-example gradients of a sum)."""
    start_input: float
    """A before the first step, the same for every row."""
    start_output: Literal["zeros", "identity"]
    """G before the first step."""
    refresh_every: int = 10
    """Steps between two refreshes of the inverse (root) of G, besides steps 1, 2, 4 and 8."""
    g_rows: int | None = None
    """Rows that G takes of a batch, evenly spread and others each time; None takes all."""
    g_every: int = 1
    """Steps between two updates of G, besides steps 1, 2, 4 and 8 and as long as it has had no batch."""
    epsilon: float = 1e-10
    """Added to the root of the summed squares (`adagrad`)."""
    window_power: float = 0.8
    """p of the window 1 − t^(−p) (`window`)."""
    coefficient: float = 1.0
    """c of the block c·A⊗G (`factor`; a scale of squares does not see it)."""

    def __post_init__(self) -> None:
        if self.exponent not in (-1.0, -0.5):
            raise UserError(f"the exponent must be -1 or -0.5, not {self.exponent:g}")
        for name, decay in (("input", self.input_decay), ("output", self.output_decay)):
            if decay is not None and not 0.0 <= decay <= 1.0:
                raise UserError(f"the {name} decay must be between 0 and 1, not {decay:g}")
        if self.row_scale == "factor" and self.input_decay is None:
            raise UserError(f"preset '{self.name}' scales rows by the input factor, which needs a decay")
        if self.refresh_every < 1:
            raise UserError(f"refresh-every must be at least 1, not {self.refresh_every}")
        if self.g_rows is not None and self.g_rows < 1:
            raise UserError(f"g-rows must be at least 1, not {self.g_rows}")
        if self.g_every < 1:
            raise UserError(f"g-every must be at least 1, not {self.g_every}")

    def for_uses(self, uses: int) -> Preset:
        """Return the settings of a table with U uses that are taken as independent ("multi-indep").

        The sum over the uses is U times their mean, so the block is c·A⊗G with c = U, and λ/U stands for λ.
        Relative damping is λ = ρ²·mean(a)·mean(diag G) split by pi, so there ρ/√U stands for ρ.
        Source: spec section 1, later versions.
        """
        share = uses if self.damping.kind == "pi" else math.sqrt(uses)
        damping = replace(self.damping, value=self.damping.value / share)
        return self if uses == 1 else replace(self, damping=damping, coefficient=float(uses))

    @property
    def uses_root(self) -> bool:
        """Whether the stored matrix is the inverse root of G (otherwise its inverse)."""
        return self.exponent == -0.5

    @property
    def partial_statistics(self) -> bool:
        """Whether G leaves out rows or steps, so that it may be zero where the gradient is not."""
        return self.g_rows is not None or self.g_every > 1

    def refreshes(self, step: int) -> bool:
        """Return whether the inverse (root) is recomputed at committed step 1, 2, 3, ..."""
        return step in EARLY_REFRESHES or step % self.refresh_every == 0

    def iterations(self, embedding_dim: int) -> int:
        """Return the Newton–Schulz iterations that reach full accuracy at width D.

        With relative damping the condition is at most 1 + D/ρ, otherwise 1e7 (float32) is assumed.
        """
        condition = 1.0 + embedding_dim / self.damping.value if self.damping.kind == "relative" else 1e7
        return math.ceil(math.log(condition) / math.log(2.25)) + 5

    def tolerance(self, embedding_dim: int) -> float:
        """Return the residual above which a host `eigh` takes over from the graph's inverse (root).

        Root: rounding, 2·eps·(1 + D/ρ), or 1e-3 where the condition is not bounded, and never more than 0.05:
        with a tiny ρ the iteration need not converge at all. Inverse: its residual
        is a float64 one after a Newton step, so 1e-6 stands for a relative error of 1e-3 before that step.
        """
        if not self.uses_root:
            return 1e-6
        if self.damping.kind == "pi":
            return 1e-3
        rounding = 2.0 * float(np.finfo(np.float32).eps) * (1.0 + embedding_dim / self.damping.value)
        return min(rounding, 0.05)


_RELATIVE: Final = Damping(kind="relative", value=0.01)

R17: Final = Preset(
    name="r1.7",
    row_scale="factor",
    exponent=-1.0,
    damping=Damping(kind="pi", value=1e-3),
    input_decay=0.95,
    output_decay=0.95,
    debias=False,
    normalize_counts=True,
    scale_gradients=True,
    start_input=1.0,
    start_output="identity",
)
"""The block of TensorFlow 1.7 to its numbers (spec section 1, DESIGN section 6)."""

HALF: Final = Preset(
    name="half",
    row_scale="factor",
    exponent=-0.5,
    damping=_RELATIVE,
    input_decay=0.99,
    output_decay=0.95,
    debias=True,
    normalize_counts=False,
    scale_gradients=False,
    start_input=0.0,
    start_output="zeros",
)
"""The default: exponents −1/2, relative damping, debiased (spec section 2)."""

ADAGRAD: Final = Preset(
    name="adagrad",
    row_scale="adagrad",
    exponent=-0.5,
    damping=_RELATIVE,
    input_decay=None,
    output_decay=0.95,
    debias=True,
    normalize_counts=False,
    scale_gradients=False,
    start_input=0.0,
    start_output="zeros",
)
"""The safe one without a schedule (spec section 3)."""

ADAPTIVE: Final = Preset(
    name="adaptive",
    row_scale="window",
    exponent=-0.5,
    damping=_RELATIVE,
    input_decay=None,
    output_decay=0.95,
    debias=True,
    normalize_counts=False,
    scale_gradients=False,
    start_input=0.0,
    start_output="zeros",
)
"""The row scale forgets (spec section 4)."""

PRESETS: Final[Mapping[str, Preset]] = {preset.name: preset for preset in (R17, HALF, ADAGRAD, ADAPTIVE)}


def find_preset(name: str) -> Preset:
    """Return the preset of that name; raises UserError with the nearest name."""
    preset = PRESETS.get(name)
    if preset is None:
        raise UserError(
            f"unknown preset '{name}'{did_you_mean(name, PRESETS)}", help=f"use one of {', '.join(PRESETS)}"
        )
    return preset
