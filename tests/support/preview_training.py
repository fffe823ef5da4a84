"""The optimizers of ai.onnx.preview.training in float64, as their specification's pseudo code says."""

from __future__ import annotations

import numpy as np


def formula(op: str, a: dict, R: float, T: int, X, G, *held) -> tuple[np.ndarray, ...]:
    """Return the new values, float64, as the specification's pseudo code says."""
    g = a.get("norm_coefficient", 0.0) * X + G
    if op == "Momentum":
        v = a["alpha"] * held[0] + (a["beta"] if T > 0 else 1.0) * g
        return X - R * (v if a["mode"] == "standard" else g + a["alpha"] * v), v
    if op == "Adagrad":
        h = held[0] + g * g
        return X - R / (1 + T * a.get("decay_factor", 0.0)) * g / (np.sqrt(h) + a.get("epsilon", 1e-6)), h
    alpha, beta = a.get("alpha", 0.9), a.get("beta", 0.999)
    v, h = alpha * held[0] + (1 - alpha) * g, beta * held[1] + (1 - beta) * g * g
    rate = R * np.sqrt(1 - beta**T) / (1 - alpha**T) if T > 0 else R
    new = X - rate * v / (np.sqrt(h) + a.get("epsilon", 1e-6))
    return (1 - a.get("norm_coefficient_post", 0.0)) * new, v, h
