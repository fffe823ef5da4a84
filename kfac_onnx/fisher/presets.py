"""The named settings of the embedding block on a training graph, each a short declaration.

    update = rows( Grad · (G + λ_G·I)^(power of G) )        `rows` scales each row, by A's power or by history

| preset     | powers          | rows scaled by            | damping       |                             |
|------------|-----------------|---------------------------|---------------|-----------------------------|
| `r1.7`     | A −1, G −1      | counts/M, from 1, decayed | pi, λ = 1e-3  | TensorFlow 1.7's block      |
| `half`     | A −1/2, G −1/2  | counts, debiased          | ρ = 0.01      | its steps grow with losses  |
| `adagrad`  | G −1/2          | sum of mean squares       | ρ = 0.01      | its steps shrink            |
| `adaptive` | G −1/2          | widening window of them   | ρ = 0.01      | the default                 |

docs/mathematics.md has the formulas and where they come from. A new preset is one declaration here, its
settings in the float64 oracle (`kfac_onnx.reference.table`), and its row in that page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.fisher.damping import Pi, Relative
from kfac_onnx.fisher.row_scales import Counts, SquareSum, Window
from kfac_onnx.fisher.sampling import Sample
from kfac_onnx.fisher.settings import Average
from kfac_onnx.step.draft import EARLY_REFRESHES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kfac_onnx.fisher.damping import Damping
    from kfac_onnx.fisher.row_scales import RowScale

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All settings of a preconditioned table: its powers, then the parts that they are powers of."""

    name: str
    powers: tuple[tuple[str, float], ...]
    """Power of each damped factor, A (where rows are scaled by it) and G."""
    rows: RowScale
    """What scales each row."""
    output: Average
    """How G is averaged."""
    damping: Damping
    lr: float
    """Where a search for the tables' learning rate starts."""
    refresh_every: int = 10
    """Steps between two refreshes of G's power, besides steps 1, 2, 4 and 8."""
    sample: Sample = field(default_factory=lambda: Sample(per_column=8))
    """Which rows G takes in, and when: of large batches a sample."""
    per_example: bool = False
    """Whether G takes gradients times the divisor c of a mean loss (per-example gradients of a sum)."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that no step can be made of."""
        powers = dict(self.powers)
        if len(powers) != len(self.powers) or "G" not in powers or not powers.keys() <= {"A", "G"}:
            raise UserError(
                f"preset '{self.name}' has the powers {', '.join(name for name, _ in self.powers)}",
                help="give one of G, and one of A where rows are scaled by counts",
            )
        if isinstance(self.rows, Counts) != ("A" in powers):
            raise UserError(
                f"preset '{self.name}' must have a power of A exactly where counts scale the rows",
                help="give the powers of A and G, or another scale of rows and the power of G",
            )
        if powers["G"] not in (-1.0, -0.5):
            raise UserError(f"the power of G must be -1 or -0.5, not {powers['G']:g}")
        value = self.damping.value
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise UserError(f"damping must be a positive number, not {value}")
        averages = [self.output, *([self.rows.average] if isinstance(self.rows, Counts) else [])]
        if any(average.forgets_its_start for average in averages):
            raise UserError(f"preset '{self.name}' has a debiased average, which starts at 0")
        if self.refresh_every < 1:
            raise UserError(f"refresh-every must be at least 1, not {self.refresh_every}")

    def power(self, factor: str) -> float | None:
        """Return the power of a factor; None where the preset has no such factor."""
        return dict(self.powers).get(factor)

    @property
    def diverges_on_tied(self) -> bool:
        """Whether steps on tied tables can grow without bound: rows are scaled by counts, not by gradients.

        Rows that are seldom looked up get the gradient of the projection in each step, and little scale;
        benchmarks/stability has losses that rose to 44 times their start.
        """
        return isinstance(self.rows, Counts)

    @property
    def input_decay(self) -> float | None:
        """Weight kept from the old A at each step; None where the preset has no A."""
        return self.rows.average.decay if isinstance(self.rows, Counts) else None

    def with_input_decay(self, decay: float) -> Preset:
        """Return the preset with another decay of A; raises UserError where it has no A."""
        if not isinstance(self.rows, Counts):
            raise UserError(
                f"decay-a has no meaning for preset '{self.name}', which has no input factor",
                help="leave it out, or take a preset that scales rows by counts",
            )
        return replace(self, rows=replace(self.rows, average=replace(self.rows.average, decay=decay)))

    def refreshes(self, step: int) -> bool:
        """Return whether G's power is recomputed at committed step 1, 2, 3, ..."""
        return step in EARLY_REFRESHES or step % self.refresh_every == 0


_DECLARED: Final = (
    Preset(
        name="r1.7",
        powers=(("A", -1.0), ("G", -1.0)),
        rows=Counts(average=Average(decay=0.95, start=1.0, debias=False), share=True),
        output=Average(decay=0.95, start=1.0, debias=False),
        damping=Pi(1e-3),
        lr=0.01,
        sample=Sample(),
        per_example=True,
    ),
    Preset(
        name="half",
        powers=(("A", -0.5), ("G", -0.5)),
        rows=Counts(average=Average(decay=0.99)),
        output=Average(decay=0.95),
        damping=Relative(0.01),
        lr=0.01,
    ),
    Preset(
        name="adagrad",
        powers=(("G", -0.5),),
        rows=SquareSum(),
        output=Average(decay=0.95),
        damping=Relative(0.01),
        lr=0.1,
    ),
    Preset(
        name="adaptive",
        powers=(("G", -0.5),),
        rows=Window(power=0.8, least=0.01),
        output=Average(decay=0.95),
        damping=Relative(0.01),
        lr=0.01,
    ),
)

PRESETS: Final[Mapping[str, Preset]] = {preset.name: preset for preset in _DECLARED}


def find_preset(name: str) -> Preset:
    """Return the preset of that name; raises UserError with the nearest name."""
    preset = PRESETS.get(name)
    if preset is None:
        raise UserError(
            f"unknown preset '{name}'{did_you_mean(name, PRESETS)}", help=f"use one of {', '.join(PRESETS)}"
        )
    return preset
