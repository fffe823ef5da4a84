"""Layers in float64: the original's block with both factors full, and a training step with it.

    A = E[h hᵀ] over rows of inputs, G = Σ_sources E[g gᵀ] over gradients of the products
    pi = √((tr A/n)/(tr G/m)),  λ_A = √(λ/c)·pi,  λ_G = √(λ/c)/pi
    multiply_matpower(V, e) = c^e · (A + λ_A·I)^e · V · (G + λ_G·I)^e

Of a convolution h are patches, g the gradients at each place, and c is the number of places.
Source: Martens & Grosse 2015 (https://arxiv.org/abs/1503.05671), sections 3 and 6.3; Grosse & Martens 2016
(https://arxiv.org/abs/1602.01407), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.reference.operators import Array

__all__ = ["LayerBlockReference", "LayerReference", "patches"]


def power(matrix: Array, exponent: float) -> Array:
    """Return a power of a positive definite matrix, by eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


class LayerBlockReference:
    """The block of the original, version 1.7: factors start as I, averages are not debiased."""

    def __init__(self, inputs: int, outputs: int, places: int = 1) -> None:
        self.places = places
        self.input_factor, self.output_factor = np.eye(inputs), np.eye(outputs)
        self.inverses = (np.eye(inputs), np.eye(outputs))

    def covariance_update(self, h: Sequence[Array], g: Sequence[Sequence[Array]], decay: float) -> None:
        """Average in a batch: h[tower] of [N, n], g[source][tower] of [N, m]."""
        rows = np.concatenate([np.asarray(tower, np.float64) for tower in h])
        self.input_factor = decay * self.input_factor + (1 - decay) * rows.T @ rows / len(rows)
        stacked = [np.concatenate([np.asarray(tower, np.float64) for tower in source]) for source in g]
        moment = sum(
            (slopes.T @ slopes / len(slopes) for slopes in stacked), np.zeros_like(self.output_factor)
        )
        self.output_factor = decay * self.output_factor + (1 - decay) * moment

    def dampings(self, damping: float) -> tuple[float, float]:
        """Return λ_A and λ_G from the current factors."""
        pi = np.sqrt(
            (np.trace(self.input_factor) / len(self.input_factor))
            / (np.trace(self.output_factor) / len(self.output_factor))
        )
        root = np.sqrt(damping / self.places)
        return root * pi, root / pi

    def damped(self, damping: float) -> tuple[Array, Array]:
        """Return both damped factors."""
        a, g = self.dampings(damping)
        return self.input_factor + a * np.eye(len(self.input_factor)), self.output_factor + g * np.eye(
            len(self.output_factor)
        )

    def inverse_update(self, damping: float) -> None:
        """Recompute both inverses."""
        A, G = self.damped(damping)
        self.inverses = (np.linalg.inv(A), np.linalg.inv(G))

    def multiply_inverse(self, vector: Array) -> Array:
        """Return the stored inverses times a vector [n, m]."""
        A, G = self.inverses
        return A @ vector @ G / self.places

    def multiply(self, vector: Array, damping: float) -> Array:
        """Return the damped block times a vector [n, m], all live."""
        A, G = self.damped(damping)
        return A @ vector @ G * self.places

    def full_fisher_block(self) -> Array:
        """Return c·kron(A, G), undamped."""
        return self.places * np.kron(self.input_factor, self.output_factor)


class LayerReference:
    """A layer in training: momentum of A^e·V·G^e, debiased factors, powers from the last refresh.

    With e = −1/2, λ_A = ρ·mean(diag A), λ_G likewise, and the direction is divided by √N, N rows. With e = −1
    the damping λ is split by pi, G is multiplied by the squared divisor of a mean loss, and c divides.
    """

    def __init__(
        self,
        lr: float,
        *,
        exponent: float = -0.5,
        damping: float = 0.01,
        decay: float = 0.95,
        mu: float = 0.9,
        refresh: int = 10,
        places: int = 1,
    ) -> None:
        self.lr, self.exponent, self.damping, self.places = lr, exponent, damping, places
        self.decay, self.mu, self.refresh = decay, mu, refresh
        self.t = 0
        self.input_factor: Array | float = 0.0
        self.output_factor: Array | float = 0.0
        self.m: Array | float = 0.0
        self.roots: tuple[Array, Array] | None = None

    def step(self, w: Array, gradient: Array, h: Array, g: Array, divisor: float = 1.0) -> Array:
        """Return the matrix [n, m] after one step, of inputs [N, n] and gradients of products [N, m]."""
        self.t += 1
        scale = divisor**2 if self.exponent == -1.0 else 1.0
        self.input_factor = self.decay * self.input_factor + (1 - self.decay) * h.T @ h / len(h)
        self.output_factor = self.decay * self.output_factor + (1 - self.decay) * scale * g.T @ g / len(g)
        if self.roots is None or self.t in (1, 2, 4, 8) or self.t % self.refresh == 0:
            A, G = (
                np.asarray(factor / (1 - self.decay**self.t))
                for factor in (self.input_factor, self.output_factor)
            )
            means = np.trace(A) / len(A), np.trace(G) / len(G)
            if self.exponent == -1.0:
                root, pi = np.sqrt(self.damping / self.places), np.sqrt(means[0] / means[1])
                dampings = root * pi, root / pi
            else:
                dampings = self.damping * means[0], self.damping * means[1]
            self.roots = (
                power(A + dampings[0] * np.eye(len(A)), self.exponent),
                power(G + dampings[1] * np.eye(len(G)), self.exponent),
            )
        left, right = self.roots
        divisor = float(self.places) if self.exponent == -1.0 else np.sqrt(len(g))
        self.m = self.mu * self.m + (1 - self.mu) * left @ gradient @ right / divisor
        return w - self.lr * self.m / (1 - self.mu**self.t)


def patches(x: Array, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> Array:
    """Return what a kernel [kh, kw] sees at each place of x [B, C, h, w]: [B·L, C·kh·kw]."""
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), axis=(2, 3))
    chosen = windows[:, :, :: strides[0], :: strides[1]]
    rows = chosen.transpose(0, 2, 3, 1, 4, 5)
    return rows.reshape(-1, rows.shape[3] * kernel[0] * kernel[1])
