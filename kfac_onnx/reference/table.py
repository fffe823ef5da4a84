"""One table's training step under a preset, in float64: the oracle of training (docs/mathematics.md).

    a ← running average of lookup counts per row        G ← running average of gᵀg over lookups
    at refresh steps: P = (Ĝ + damping_g·I)^exponent
    scaled by counts    update[u] = (â_u + damping_a)^input_exponent · (Grad[u] · P)
    by squares          update[u] = (Grad[u] · P) / √(history of mean squares of that row)
    W ← W − lr·update

`rows` are dL/d(looked-up row), one per lookup, all uses of the table stacked.

U independent uses ("multi-indep"): λ/U for λ (so ρ/√U for ρ), and the update times U^exponent.
A tied table with statistics of both sides: for each projection z = h·Wᵀ with δ = dL/dz over P positions
and m = mean ‖δ_p‖², δ_p²/m are further counts and √m·h_p further rows, P in number (none if δ = 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from kfac_onnx.reference.operators import FLOOR, power, sample_rows, scatter_add

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.reference.operators import Array

__all__ = ["SETTINGS", "TableReference", "TableSettings"]


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """The settings of a preset, as docs/mathematics.md gives them."""

    row_scale: Literal["factor", "adagrad", "window"]
    exponent: float = -0.5
    """Power of the damped G."""
    input_exponent: float = -0.5
    """Power of the damped A (`factor`)."""
    damping_kind: Literal["relative", "pi"] = "relative"
    damping: float = 0.01
    input_decay: float = 0.99
    output_decay: float = 0.95
    debias: bool = True
    normalize_counts: bool = False
    scale_gradients: bool = False
    start_input: float = 0.0
    start_output: float = 0.0
    """G starts as this multiple of I."""
    refresh_every: int = 10
    g_rows: int | None = None
    """Rows that G takes of a batch (see `sample_rows`); None takes all, or at most by `rows_per_column`."""
    rows_per_column: int | None = 8
    """G takes at most max(1024, this · D) rows where all of them count; None takes all."""
    g_every: int = 1
    """G takes in steps 1, 2, 4, 8, the multiples of this, and every step until it has had a batch."""
    epsilon: float = 1e-10
    window_power: float = 0.8
    window_least: float = 0.01
    """Least share of the new in a window."""
    table_decay: float = 0.0
    """Decoupled decay of all rows in each step, which a row makes up when it is looked up."""


SETTINGS: Final[Mapping[str, TableSettings]] = {
    "r1.7": TableSettings(
        row_scale="factor",
        exponent=-1.0,
        input_exponent=-1.0,
        damping_kind="pi",
        damping=1e-3,
        input_decay=0.95,
        debias=False,
        normalize_counts=True,
        scale_gradients=True,
        rows_per_column=None,
        start_input=1.0,
        start_output=1.0,
    ),
    "half": TableSettings(row_scale="factor"),
    "adagrad": TableSettings(row_scale="adagrad"),
    "adaptive": TableSettings(row_scale="window"),
}


class TableReference:
    """State and step of one table, float64[V, D].

    `options` replace fields of the preset's `TableSettings`. `t` counts committed steps, `skipped` those
    that were not kept, `lookups` (M) those of the last step.
    """

    def __init__(
        self,
        preset: str,
        vocab_size: int,
        embedding_dim: int,
        lr: float,
        *,
        num_uses: int = 1,
        **options: Any,
    ) -> None:
        self.settings = replace(SETTINGS[preset], **options)
        self.num_uses = num_uses
        self.V, self.D, self.lr = vocab_size, embedding_dim, lr
        self.t = 0
        self.skipped = 0
        self.lookups = 0
        self.input_factor = np.full(vocab_size, self.settings.start_input)
        self.a_count = 0
        self.output_factor = self.settings.start_output * np.eye(embedding_dim)
        self.g_count = 0
        self.root = np.eye(embedding_dim)
        self.history = np.zeros(vocab_size)
        """Per row: summed mean squares (adagrad) or their window (adaptive)."""
        self.window_count = 0
        self.shrunk = np.ones(vocab_size)
        """What decay since its last lookup leaves of each row."""

    def step(
        self,
        table: Array,
        ids: Array,
        rows: Array,
        keep: Array | None = None,
        scale: float = 1.0,
        dense: Array | None = None,
        projections: Sequence[tuple[Array, Array]] = (),
        *,
        lr: float | None = None,
        finite: bool = True,
    ) -> Array:
        """Return the table after one training step, and advance the state.

        table float64[V, D]; ids int64[M]; rows float[M, D]; keep[M], 0 where the graph drops the row;
        scale c, the divisor of a mean loss (r1.7 only); dense float[V, D], the rest of a tied table's
        gradient; projections pairs of (δ[P, V], h[P, D]) whose statistics count too; `finite=False` says that
        something elsewhere in the step is not finite.
        """
        table = np.asarray(table, np.float64)
        ids = np.asarray(ids).reshape(-1)
        rows = np.asarray(rows, np.float64).reshape(-1, self.D)
        if keep is not None:
            kept = np.asarray(keep).reshape(-1) != 0
            ids, rows = ids[kept], rows[kept]
        ids = np.where(ids < 0, ids + self.V, ids)
        if not (finite and np.isfinite(rows).all() and (dense is None or np.isfinite(dense).all())):
            self.skipped += 1
            return table
        self.t += 1
        pairs = [(np.asarray(d, np.float64), np.asarray(h, np.float64)) for d, h in projections if np.any(d)]
        self.lookups = len(ids) + sum(len(delta) for delta, _ in pairs)
        if self.lookups > 0:
            self._average(ids, rows, scale, pairs, keep is not None)
        if self._due(self.settings.refresh_every):
            self._refresh()
        lr = self.lr if lr is None else lr
        table = self._decayed(table, ids, lr, whole=dense is not None)
        return table if self.lookups == 0 else table - lr * self._update(ids, rows, dense)

    def _decayed(self, table: Array, ids: Array, lr: float, *, whole: bool) -> Array:
        self.shrunk = self.shrunk * (1.0 - lr * self.settings.table_decay)
        touched = np.arange(self.V) if whole else np.unique(ids)
        table = table.copy()
        table[touched] *= self.shrunk[touched, None]
        self.shrunk[touched] = 1.0
        return table

    def a_hat(self) -> Array:
        """Return the average of lookup counts per row, float64[V]."""
        return self.input_factor * self._correction(self.settings.input_decay, self.a_count)

    def g_hat(self) -> Array:
        """Return the average second moment of gradient rows, float64[D, D]."""
        return self.output_factor * self._correction(self.settings.output_decay, self.g_count)

    def damping(self) -> tuple[float, float]:
        """Return what is added now to the eigenvalues of A and of G."""
        mean_a, mean_g = float(self.a_hat().mean()), float(np.trace(self.g_hat()) / self.D)
        if self.settings.damping_kind == "relative":
            rho = self.settings.damping / np.sqrt(self.num_uses)
            return rho * max(mean_a, FLOOR), rho * max(mean_g, FLOOR)
        pi, damping = np.sqrt(mean_a / mean_g), self.settings.damping / self.num_uses
        return float(np.sqrt(damping) * pi), float(np.sqrt(damping) / pi)

    def _correction(self, decay: float, count: int) -> float:
        return 1.0 / (1.0 - decay**count) if self.settings.debias and count > 0 else 1.0

    def _average(
        self, ids: Array, rows: Array, scale: float, pairs: Sequence[tuple[Array, Array]], masked: bool
    ) -> None:
        counts = scatter_add(np.zeros(self.V), ids, np.ones(len(ids)))
        stack = [rows]
        for delta, h in pairs:
            m = (delta**2).sum(axis=1).mean()
            counts = counts + (delta**2).sum(axis=0) / m
            stack.append(np.sqrt(m) * h)
        if self.settings.normalize_counts:
            counts = counts / self.lookups
        self.input_factor = (
            self.settings.input_decay * self.input_factor + (1 - self.settings.input_decay) * counts
        )
        self.a_count += 1
        if self.g_count == 0 or self._due(self.settings.g_every):
            self._average_output(np.concatenate(stack), scale, masked or len(stack) > 1)

    def _average_output(self, rows: Array, scale: float, masked: bool) -> None:
        size, per_column = self.settings.g_rows, self.settings.rows_per_column
        if size is None and per_column is not None and not masked:
            size = max(1024, per_column * self.D)
        if size is not None:
            (chosen,) = sample_rows(len(rows), size, self.g_count)
            rows = rows[chosen]
        c = scale if self.settings.scale_gradients else 1.0
        moment = c**2 * rows.T @ rows / len(rows)
        self.output_factor = (
            self.settings.output_decay * self.output_factor + (1 - self.settings.output_decay) * moment
        )
        self.g_count += 1

    def _due(self, every: int) -> bool:
        return self.t in (1, 2, 4, 8) or self.t % every == 0

    def _refresh(self) -> None:
        if np.trace(self.output_factor) == 0:
            return
        _, damping_g = self.damping()
        self.root = power(self.g_hat() + damping_g * np.eye(self.D), self.settings.exponent)

    def _update(self, ids: Array, rows: Array, dense: Array | None) -> Array:
        grad = scatter_add(np.zeros((self.V, self.D)), ids, rows)
        if dense is not None:
            grad = grad + dense
        turned = grad @ (self.root if np.trace(self.output_factor) != 0 else 0 * self.root)
        squares = (turned**2).mean(axis=1)
        match self.settings.row_scale:
            case "factor":
                damping_a, _ = self.damping()
                weight = (self.num_uses * (self.a_hat() + damping_a)) ** self.settings.input_exponent
                return weight[:, None] * turned
            case "adagrad":
                self.history = self.history + squares
                return turned / (np.sqrt(self.history) + self.settings.epsilon)[:, None]
            case "window":
                self.window_count += 1
                fresh = float(self.window_count) ** -self.settings.window_power
                b = 1.0 - max(fresh, self.settings.window_least)
                self.history = b * self.history + (1 - b) * squares
                return turned / np.where(self.history > 0, np.sqrt(self.history), np.inf)[:, None]
