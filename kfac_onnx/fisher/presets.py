"""Named settings of the embedding block (spec sections 1 to 4).

| preset     | row scale                                   | root of G | damping             | gradient rows        |
|------------|---------------------------------------------|-----------|---------------------|----------------------|
| `half`     | (a + ρ·mean a)^(−1/2), counts, decay 0.99   | −1/2      | relative, ρ = 0.01  | as the loss has them |
| `r1.7`     | (a + λ_A)^(−1), counts / M, decay 0.95      | −1        | λ = 1e-3, split by π| times c in G         |
| `adagrad`  | summed mean squares of the rotated rows     | −1/2      | relative, ρ = 0.01  | merged               |
| `adaptive` | mean squares over the window 1 − t^(−0.8)   | −1/2      | relative, ρ = 0.01  | merged               |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["ADAGRAD", "ADAPTIVE", "HALF", "PRESETS", "R17", "Preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Every setting of the block.

    `rows` says what scales a row: `counts` (the input factor A), `adagrad` or `window`. `exponent` is that
    of both factors. `damping` is λ (kind `pi` or `split`, absolute) or ρ (kind `relative`). `decay_a` and
    `decay_g` weigh the old averages. `start_a` and `start_g` are the starting diagonals. `normalize` divides
    counts by the number of lookups M. `scaled` multiplies the rows by the divisor of a mean loss before
    they enter G. The root of G is refreshed at committed steps 1, 2, 4, 8 and multiples of `refresh_every`.
    """

    name: str
    rows: Literal["counts", "adagrad", "window"] = "counts"
    exponent: float = -0.5
    damping_kind: Literal["relative", "pi", "split"] = "relative"
    damping: float = 0.01
    decay_a: float = 0.99
    decay_g: float = 0.95
    debias: bool = True
    start_a: float = 0.0
    start_g: float = 0.0
    normalize: bool = False
    scaled: bool = False
    epsilon: float = 1e-10
    power: float = 0.8
    refresh_every: int = 10
    learning_rate: float = 0.01


HALF: Final = Preset(name="half")
R17: Final = Preset(
    name="r1.7",
    exponent=-1.0,
    damping_kind="pi",
    damping=1e-3,
    decay_a=0.95,
    decay_g=0.95,
    debias=False,
    start_a=1.0,
    start_g=1.0,
    normalize=True,
    scaled=True,
    learning_rate=0.01,
)
ADAGRAD: Final = Preset(name="adagrad", rows="adagrad", learning_rate=0.1)
ADAPTIVE: Final = Preset(name="adaptive", rows="window", learning_rate=0.01)

PRESETS: Final[dict[str, Preset]] = {preset.name: preset for preset in (HALF, R17, ADAGRAD, ADAPTIVE)}
