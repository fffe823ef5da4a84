"""Muon: momentum, made nearly orthogonal by five quintic Newton–Schulz iterations.

    M' = μ·M + (1−μ)·g       U = μ·M' + (1−μ)·g   (Nesterov)
    X  = U / (‖U‖_F + 1e-7)  per matrix
    X ← a·X + (b·A + c·A·A)·X,   A = X·Xᵀ,   (a, b, c) = (3.4445, −4.7750, 2.0315), five times

which brings every singular value of X near 1 (to between about 0.7 and 1.2: the coefficients are chosen for
speed, not to converge). It is float32 throughout, over the last two axes: the first numbers matrices of one
shape, which are one batched product. A matrix with more rows than columns is to be transposed before.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; float32 in place of its bfloat16.
"""

from __future__ import annotations

from onnxscript import FLOAT  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import body, op

__all__ = ["muon_direction", "orthogonalize_step"]


@body
def muon_direction(g: FLOAT, M: FLOAT, mu: float):
    """Compute M' and X = U/(‖U‖_F + 1e-7), the norm over the last two axes."""
    old = op.Constant(value_float=mu)
    fresh = op.Mul(op.Sub(op.Constant(value_float=1.0), old), g)
    new_M = op.Add(op.Mul(old, M), fresh)
    U = op.Add(op.Mul(old, new_M), fresh)
    axes = op.Constant(value_ints=[-2, -1])
    norm = op.Sqrt(op.ReduceSumSquare(U, axes, keepdims=1))
    return op.Div(U, op.Add(norm, op.Constant(value_float=1e-7))), new_M


@body
def orthogonalize_step(X: FLOAT):
    """X ← a·X + (b·A + c·A·A)·X with A = X·Xᵀ."""
    A = op.MatMul(X, op.Transpose(X, perm=[0, 2, 1]))
    B = op.Add(
        op.Mul(op.Constant(value_float=-4.775), A),
        op.Mul(op.Constant(value_float=2.0315), op.MatMul(A, A)),
    )
    return op.Add(op.Mul(op.Constant(value_float=3.4445), X), op.MatMul(B, X))
