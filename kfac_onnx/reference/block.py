"""The embedding block of the original, in float64 (docs/mathematics.md, "The original").

    A_new[v] = #{ids equal to v} / B        G_new = Σ_sources sym(gᵀ g) / B
    X ← ρ X + (1−ρ) X_new                   with debias Z ← ρ Z + (1−ρ) X_new from 0, X = Z/(1−ρⁿ)
    pi = √((ΣA/V)/(tr G/D)),  λ_A = √λ·pi,  λ_G = √λ/pi
    multiply_matpower(x, e): y_n = (A[i_n] + λ_A)^e · (x_n (G + λ_G I)^e) · c^e

All is live except the stored powers of G, which are those of the last inverse update (e = 1 is live).
With U uses per example: B counts rows of all uses, λ/U stands for λ, c = U.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kfac_onnx.reference.operators import damping_pi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.reference.operators import Array

__all__ = ["BlockReference", "BlockSettings"]


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """The switches of the original; the defaults are those of version 1.7."""

    start_at_zero: bool = False
    """Factors start at 0 instead of A = 1 and G = I."""
    debias: bool = False
    unknown_before_first: bool = False
    """Factors are NaN until the first covariance update (a sum of weights divides them)."""
    pi: Literal["tracenorm", "guarded", "off"] = "tracenorm"
    """`guarded`: pi = 1 where a trace is 0."""
    towers: Literal["concat", "separate"] = "concat"
    """Stack the towers' rows, or average the towers' means."""
    inverse_starts_at_zero: bool = False
    """Stored powers of G start at 0 instead of I."""


class BlockReference:
    """State of one block in float64: A (`input_factor`), G (`output_factor`) and stored powers of G."""

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        settings: BlockSettings,
        *,
        num_uses: int = 1,
        exponents: Sequence[float] = (),
    ) -> None:
        self.V, self.D, self.num_uses, self.settings = vocab_size, embedding_dim, num_uses, settings
        self.input_factor = np.zeros(vocab_size) if settings.start_at_zero else np.ones(vocab_size)
        self.output_factor = (
            np.zeros((embedding_dim, embedding_dim)) if settings.start_at_zero else np.eye(embedding_dim)
        )
        if settings.unknown_before_first:
            self.input_factor, self.output_factor = self.input_factor * np.nan, self.output_factor * np.nan
        self._hidden_a, self._hidden_g = np.zeros(vocab_size), np.zeros((embedding_dim, embedding_dim))
        self._count = 0
        start = (
            np.zeros_like(self.output_factor) if settings.inverse_starts_at_zero else np.eye(embedding_dim)
        )
        self.stored: dict[float, Array] = dict.fromkeys({-1.0, *exponents} - {1.0}, start)

    def covariance_update(
        self, ids: Sequence[Sequence[Array]], grads: Sequence[Sequence[Sequence[Array]]], decay: float
    ) -> None:
        """Average in a batch: ids[tower][use] of [B_t] or [B_t, K], grads[source][tower][use] of [B_t, D]."""
        A_new, G_new = self._count_ids(ids), self._second_moment(grads)
        if self.settings.debias:
            self._count += 1
            self._hidden_a = decay * self._hidden_a + (1 - decay) * A_new
            self._hidden_g = decay * self._hidden_g + (1 - decay) * G_new
            with np.errstate(divide="ignore", invalid="ignore"):
                weight = np.float64(1.0 - decay**self._count)
                self.input_factor, self.output_factor = self._hidden_a / weight, self._hidden_g / weight
        else:
            self.input_factor = decay * self.input_factor + (1 - decay) * A_new
            self.output_factor = decay * self.output_factor + (1 - decay) * G_new

    def inverse_update(self, damping: float) -> None:
        """Recompute every stored power of G + λ_G·I."""
        _, damping_g = self.dampings(damping)
        M = self.output_factor + damping_g * np.eye(self.D)
        for exponent in self.stored:
            if not np.isfinite(M).all():
                self.stored[exponent] = np.full_like(M, np.nan)
            elif exponent == -1.0:
                self.stored[exponent] = np.linalg.inv(M)
            else:
                w, Q = np.linalg.eigh(self.output_factor)
                self.stored[exponent] = (Q * (np.maximum(w, 0.0) + damping_g) ** exponent) @ Q.T

    def dampings(self, damping: float) -> tuple[float, float]:
        """Return λ_A and λ_G from the current factors."""
        mode = {"off": 0, "tracenorm": 1, "guarded": 2}[self.settings.pi]
        total_a = np.asarray(self.input_factor.sum())
        pair = damping_pi(
            total_a, self.output_factor, damping=damping / self.num_uses, vocab_size=self.V, pi=mode
        )
        return float(pair[0]), float(pair[1])

    def pi(self) -> float:
        """Return the ratio that splits the damping."""
        mode = {"off": 0, "tracenorm": 1, "guarded": 2}[self.settings.pi]
        return float(
            damping_pi(
                np.asarray(self.input_factor.sum()),
                self.output_factor,
                damping=1.0,
                vocab_size=self.V,
                pi=mode,
            )[0]
        )

    def multiply_matpower(
        self, values: Array, indices: Array | None, damping: float, exponent: float
    ) -> Array:
        """Return the block's power times a vector: rows at `indices`, or a dense [V, D] where it is None."""
        damping_a, damping_g = self.dampings(damping)
        a = self.input_factor if indices is None else self.input_factor[indices]
        live = exponent == 1.0
        matrix = self.output_factor + damping_g * np.eye(self.D) if live else self.stored[exponent]
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = ((a + damping_a) ** exponent)[:, None] * (np.asarray(values, np.float64) @ matrix)
        return scaled * float(self.num_uses) ** exponent

    def full_fisher_block(self) -> Array:
        """Return c·kron(diag(A), G), undamped, float64[V·D, V·D]."""
        return self.num_uses * np.kron(np.diag(self.input_factor), self.output_factor)

    def _count_ids(self, ids: Sequence[Sequence[Array]]) -> Array:
        counts = [sum((self._histogram(use) for use in tower), np.zeros(self.V)) for tower in ids]
        rows = [sum(len(use) for use in tower) for tower in ids]
        if self.settings.towers == "separate":
            return np.mean([count / size for count, size in zip(counts, rows, strict=True)], axis=0)
        return np.sum(counts, axis=0) / sum(rows)

    def _histogram(self, ids: Array) -> Array:
        flat = np.asarray(ids).reshape(-1).astype(np.int64)
        inside = flat[(flat >= 0) & (flat < self.V)]
        return np.bincount(inside, minlength=self.V).astype(np.float64)

    def _second_moment(self, grads: Sequence[Sequence[Sequence[Array]]]) -> Array:
        total = np.zeros((self.D, self.D))
        for towers in grads:
            stacked = [np.concatenate([np.asarray(use, np.float64) for use in tower]) for tower in towers]
            if self.settings.towers == "separate":
                total += np.mean([g.T @ g / len(g) for g in stacked], axis=0)
            else:
                rows = np.concatenate(stacked)
                total += rows.T @ rows / len(rows)
        return (total + total.T) / 2
