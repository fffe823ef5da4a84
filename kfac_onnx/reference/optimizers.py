"""First-order optimizers in float64, each one object per parameter.

`step(w, g)` returns the new parameter; `lr` at the call overrides the constructor's (schedules). A step
whose gradient is not finite changes nothing. Sources as in `dialect.bodies.optimizers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kfac_onnx.reference.operators import Array

__all__ = [
    "AdagradReference",
    "AdamReference",
    "MomentumReference",
    "MuonReference",
    "OutputRowReference",
    "SgdReference",
]


class SgdReference:
    """w ← w − lr·g."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def step(self, w: Array, g: Array, *, lr: float | None = None) -> Array:
        """Return the parameter after one step; arrays of equal shape, float64."""
        w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
        if not np.isfinite(g).all():
            return w
        return w - (self.lr if lr is None else lr) * self.direction(g)

    def direction(self, g: Array) -> Array:
        """Return what lr multiplies, and update the optimizer's own state."""
        return g


class MomentumReference(SgdReference):
    """v ← mu·v + g from 0, w ← w − lr·v."""

    def __init__(self, lr: float, mu: float = 0.9) -> None:
        super().__init__(lr)
        self.mu = mu
        self.v: Array | float = 0.0

    def direction(self, g: Array) -> Array:
        """Return the new velocity."""
        self.v = self.mu * self.v + g
        return np.asarray(self.v)


class AdamReference(SgdReference):
    """Bias-corrected first and second moments; epsilon outside the root."""

    def __init__(self, lr: float, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        super().__init__(lr)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.t = 0
        self.m: Array | float = 0.0
        self.v: Array | float = 0.0

    def direction(self, g: Array) -> Array:
        """Return m̂/(√v̂ + epsilon)."""
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return np.asarray(m_hat / (np.sqrt(v_hat) + self.epsilon))


class MuonReference(SgdReference):
    """Momentum of one matrix [m outputs, n inputs], orthogonalized by quintic Newton–Schulz iterations.

    w ← w − lr·√max(1, m/n)·X; written from the source's formulas, with singular values instead of products: a
    step maps each singular value s to a·s + b·s³ + c·s⁵ and keeps the singular vectors.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, lr: float, mu: float = 0.95, iterations: int = 5) -> None:
        super().__init__(lr)
        self.mu, self.iterations = mu, iterations
        self.momentum: Array | float = 0.0

    def direction(self, g: Array) -> Array:
        """Return √max(1, m/n)·X."""
        self.momentum = self.mu * self.momentum + (1 - self.mu) * g
        nesterov = self.mu * self.momentum + (1 - self.mu) * g
        left, s, right = np.linalg.svd(nesterov, full_matrices=False)
        s = s / (np.sqrt((s**2).sum()) + 1e-7)
        for _ in range(self.iterations):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return np.sqrt(max(1.0, g.shape[0] / g.shape[1])) * (left * s) @ right


class OutputRowReference:
    """An output table [C, n], its bias as last column: full A of its inputs, a scale of each row.

    A ← decay·A + (1 − decay)·hᵀh/N, debiased; P = (A + ρ·mean(diag A)·I)^(−1/2) on steps 1, 2, 4, 8 and each
    `refresh`-th; m ← μ·m + (1 − μ)·gP; r ← (1 − t^(−p))·r + t^(−p)·mean of the squares of gP's rows;
    w ← w − lr·m/(1 − μ^t)/√r.
    """

    def __init__(
        self,
        lr: float,
        *,
        decay: float = 0.95,
        rho: float = 0.01,
        mu: float = 0.9,
        power: float = 0.8,
        refresh: int = 10,
    ) -> None:
        self.lr, self.decay, self.rho, self.mu, self.power, self.refresh = lr, decay, rho, mu, power, refresh
        self.t = 0
        self.moment: Array | float = 0.0
        self.root: Array | float = 0.0
        self.m: Array | float = 0.0
        self.r: Array | float = 0.0

    def step(self, w: Array, g: Array, h: Array) -> Array:
        """Return the table after one step, of its gradient [C, n] and its inputs [N, n]; float64."""
        self.t += 1
        self.moment = self.decay * self.moment + (1 - self.decay) * h.T @ h / len(h)
        if self.t in (1, 2, 4, 8) or self.t % self.refresh == 0:
            A = np.asarray(self.moment / (1 - self.decay**self.t))
            values, vectors = np.linalg.eigh(A + self.rho * np.trace(A) / len(A) * np.eye(len(A)))
            self.root = vectors * values**-0.5 @ vectors.T
        z = g @ self.root
        fresh = float(self.t) ** -self.power
        self.r = (1 - fresh) * self.r + fresh * (z**2).mean(axis=1)
        self.m = self.mu * self.m + (1 - self.mu) * z
        scale = (1 - self.mu**self.t) * (np.sqrt(self.r) + 1e-12)
        return w - self.lr * self.m / scale[:, None]


class AdagradReference(SgdReference):
    """acc ← acc + g² from 0, w ← w − lr·g/(√acc + epsilon)."""

    def __init__(self, lr: float, epsilon: float = 1e-10) -> None:
        super().__init__(lr)
        self.epsilon = epsilon
        self.acc: Array | float = 0.0

    def direction(self, g: Array) -> Array:
        """Return g/(√acc + epsilon)."""
        self.acc = self.acc + g**2
        return np.asarray(g / (np.sqrt(self.acc) + self.epsilon))
