"""The damped output factor's inverse and inverse root.

`FactorInverse`: an LU inverse (`com.microsoft::Inverse`, in the plain CPU and CUDA wheels) and one
Newton step X ← X(2I − M X) in float64. `FactorInverseRoot`: coupled Newton–Schulz,
Y ← Y T, Z ← T Z, T = (3I − Z Y)/2 from Y = M/tr M, Z = I; Z sqrt(1/tr M) tends to M^(−1/2).
Divided by the trace, all eigenvalues are in (0, 1]; the Frobenius norm would do too but its squares
underflow. While an eigenvalue is small, a step multiplies it by 2.25, hence the iterations
ceil(ln(1 + D/ρ)/ln 2.25) + 5. Source: Higham, Functions of Matrices
(https://doi.org/10.1137/1.9780898717778), section 6.7; docs/mathematics.md.

A factor whose trace is 0 (no gradient ever) keeps the previous result, with residual 0.
"""

from __future__ import annotations

from onnxscript import FLOAT  # noqa: TC002  onnxscript reads annotations

from kfac_onnx.dialect.bodies.opsets import BOOL, F32, F64, MICROSOFT, body, op

__all__ = ["factor_inverse", "factor_inverse_root"]


@body
def factor_inverse(G: FLOAT, damping_g: FLOAT, previous: FLOAT):
    """Inverse of M = G + damping_g·I, symmetrised; residual = max|M X − I| in float64."""
    zero = op.Constant(value_float=0.0)
    half = op.Cast(op.Constant(value_float=0.5), to=F64)
    eye = op.EyeLike(G)
    eye64 = op.Cast(eye, to=F64)
    M = op.Add(op.Cast(G, to=F64), op.Mul(op.Cast(damping_g, to=F64), eye64))
    start = op.Cast(MICROSOFT.Inverse(op.Cast(M, to=F32)), to=F64)
    X = op.Add(start, op.MatMul(start, op.Sub(eye64, op.MatMul(M, start))))
    symmetric = op.Mul(op.Add(X, op.Transpose(X, perm=[1, 0])), half)
    error = op.ReduceMax(op.Abs(op.Sub(op.MatMul(M, symmetric), eye64)), keepdims=0)
    trace = op.ReduceSum(op.Where(op.Cast(eye, to=BOOL), G, zero), keepdims=0)
    empty = op.Equal(trace, zero)
    inverse = op.Where(empty, previous, op.Cast(symmetric, to=F32))
    residual = op.Where(empty, zero, op.Cast(error, to=F32))
    return inverse, residual


@body
def factor_inverse_root(G: FLOAT, damping_g: FLOAT, previous: FLOAT, iterations: int):
    """R = (G + damping_g·I)^(−1/2), symmetrised; residual = max|R (G + damping_g·I) R − I|."""
    zero = op.Constant(value_float=0.0)
    half = op.Constant(value_float=0.5)
    three_halves = op.Constant(value_float=1.5)
    eye = op.EyeLike(G)
    diagonal = op.Cast(eye, to=BOOL)
    M = op.Add(G, op.Mul(damping_g, eye))
    size = op.ReduceSum(op.Where(diagonal, M, zero), keepdims=0)
    y = op.Div(M, size)
    z = op.Identity(eye)
    for _ in range(iterations):
        T = op.Sub(op.Mul(three_halves, eye), op.Mul(half, op.MatMul(z, y)))
        y = op.MatMul(y, T)
        z = op.MatMul(T, z)
    R = op.Div(op.Mul(half, op.Add(z, op.Transpose(z, perm=[1, 0]))), op.Sqrt(size))
    error = op.ReduceMax(op.Abs(op.Sub(op.MatMul(op.MatMul(R, M), R), eye)), keepdims=0)
    empty = op.Equal(op.ReduceSum(op.Where(diagonal, G, zero), keepdims=0), zero)
    root = op.Where(empty, previous, R)
    residual = op.Where(empty, zero, error)
    return root, residual
