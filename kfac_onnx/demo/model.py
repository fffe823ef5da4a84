"""The demo's language model: where its training graph lies, and its initial values.

The graph was exported from PyTorch by `tools/make_demo.py` without values, so they are drawn here:
the table from N(0, 0.1²), each dense layer uniformly within ±1/sqrt(inputs), as PyTorch does.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EMBEDDING", "SHAPES", "initial_parameters", "model_bytes"]

EMBEDDING: Final = "embedding.weight"
"""Name of the table, float32[V, D]."""
SHAPES: Final[dict[str, tuple[int, ...]]] = {
    EMBEDDING: (12_762, 64),
    "hidden.weight": (128, 256),
    "hidden.bias": (128,),
    "output.weight": (2_001, 128),
    "output.bias": (2_001,),
}
"""Shapes of the parameters, under their names in the graph."""


def model_bytes() -> bytes:
    """Return the ONNX file: inputs ids int64[N, 4], labels int64[N] and the parameters."""
    return resources.files("kfac_onnx.demo").joinpath("data/lm.onnx").read_bytes()


def initial_parameters(seed: int) -> dict[str, NDArray[np.float32]]:
    """Return the values at which a run of this seed starts, float32, the same for every optimizer."""
    random = np.random.default_rng([seed, 0])
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in SHAPES.items():
        if name == EMBEDDING:
            drawn = random.normal(0.0, 0.1, shape)
        else:
            bound = SHAPES[name.replace("bias", "weight")][1] ** -0.5
            drawn = random.uniform(-bound, bound, shape)
        values[name] = drawn.astype(np.float32)
    return values
