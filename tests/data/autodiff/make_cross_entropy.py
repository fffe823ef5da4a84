"""Write cross_entropy.npz: losses and gradients of torch.nn.functional.cross_entropy, in float64.

python tests/data/autodiff/make_cross_entropy.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

SHAPES = {"matrix": (6, 5), "batch_of_one": (1, 5), "sequence": (3, 5, 4), "image": (2, 5, 2, 3)}
"""Shapes with the classes at axis 1."""


def main() -> None:
    """Compute every case with numbers that float32 holds exactly."""
    rng = np.random.default_rng(7)
    arrays: dict[str, np.ndarray] = {}
    weights = rng.uniform(0.25, 3.0, 5).astype(np.float32)
    arrays["weights"] = weights
    for name, shape in SHAPES.items():
        x = (2 * rng.standard_normal(shape)).astype(np.float32)
        labels = rng.integers(0, 5, (shape[0], *shape[2:]))
        arrays[f"{name}/x"], arrays[f"{name}/labels"] = x, labels
        ignored = labels.copy()
        if ignored.size > 1:
            ignored.reshape(-1)[::3] = -100
        arrays[f"{name}/ignored"] = ignored
        cases = itertools.product((0.0, 0.1, 1.0), (False, True), (False, True), ("mean", "sum"))
        for smoothing, weighted, ignoring, reduction in cases:
            scores = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            loss = cross_entropy(
                scores,
                torch.tensor(ignored if ignoring else labels),
                weight=torch.tensor(weights, dtype=torch.float64) if weighted else None,
                reduction=reduction,
                label_smoothing=smoothing,
            )
            loss.backward()
            key = f"{name}/{smoothing}/{weighted:d}/{ignoring:d}/{reduction}"
            assert scores.grad is not None
            arrays[f"{key}/loss"] = loss.detach().numpy()
            arrays[f"{key}/gradient"] = scores.grad.numpy()
    np.savez_compressed(Path(__file__).with_name("cross_entropy.npz"), **arrays)


if __name__ == "__main__":
    main()
