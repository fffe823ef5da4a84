"""Cases of operators that ONNX defines as functions of others, and that have no rule of their own."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats

ANGLES = np.random.default_rng(0).uniform(0, 6, (6, 2)).astype(np.float32)
CACHES = {"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}

CASES = [
    Case("swish", "z = Swish(x)", "F.silu(x)", {"x": floats(2, 3)}, opset=24),
    Case(
        "swish_alpha",
        "z = Swish<alpha = 1.5>(x)",
        "x * torch.sigmoid(1.5 * x)",
        {"x": floats(2, 3)},
        opset=24,
    ),
    Case(
        "center_crop_pad",
        "z = CenterCropPad<axes = [1]>(x, shape)",
        "x[:, 1:3]",
        {"x": floats(2, 5)},
        {"shape": np.array([2], np.int64)},
    ),
    Case(
        "rotary",
        "z = RotaryEmbedding(x, cos, sin, ids)",
        "R.rotary(x, cos[ids], sin[ids])",
        {"x": floats(2, 3, 4, 4)},
        {**CACHES, "ids": np.array([[0, 1, 2, 3], [2, 3, 4, 5]], np.int64)},
        opset=23,
        static=("x",),
    ),
    Case(
        "rotary_interleaved_of_rank_3",
        "z = RotaryEmbedding<interleaved = 1, num_heads = 3>(x, cos, sin, ids)",
        "R.rotary(x.reshape(2, 4, 3, 4).transpose(1, 2), cos[ids], sin[ids], True).transpose(1, 2).reshape(x.shape)",
        {"x": floats(2, 4, 12)},
        {**CACHES, "ids": np.array([[0, 1, 2, 3], [2, 3, 4, 5]], np.int64)},
        opset=23,
        static=("x",),
    ),
    Case(
        "rotary_caches_by_position",
        "z = RotaryEmbedding(x, cos, sin)",
        "R.rotary(x, cos, sin)",
        {"x": floats(2, 3, 4, 4), "cos": floats(2, 4, 2), "sin": floats(2, 4, 2)},
        opset=23,
    ),
]
