"""Inverse (roots) of a damped factor by eigendecomposition in float64, on the host.

Takes over where the graph's iteration did not reach its tolerance (DESIGN section 5), and for exponents
that have no iteration: `root = Q (max(w, 0) + damping)^exponent Qᵀ` with `factor = Q w Qᵀ`.
"""

from __future__ import annotations

import numpy as np

__all__ = ["eigen_power"]


def eigen_power(factor: np.ndarray, damping: float, exponent: float) -> np.ndarray | None:
    """Return `(factor + damping I)^exponent`, symmetric, float32[D, D].

    None where it is not finite: the factor holds NaN or infinities, or is singular without damping.
    """
    matrix = np.asarray(factor, np.float64)
    if not np.isfinite(matrix).all() or not np.isfinite(damping):
        return None
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        powers = (np.maximum(values, 0.0) + damping) ** exponent
        root = ((vectors * powers) @ vectors.T).astype(np.float32)
    root = (root + root.T) / np.float32(2)
    return root if np.isfinite(root).all() else None
