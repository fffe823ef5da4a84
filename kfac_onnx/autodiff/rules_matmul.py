"""Gradients of matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute, rank_of

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule
    from kfac_onnx.graph.emit import Emitter

__all__ = ["RULES", "matmul_gradients", "swap_last_two"]


def swap_last_two(emit: Emitter, value: ir.Value, rank: int) -> ir.Value:
    """Return a value of this rank (2 or more) with its last two axes exchanged."""
    return emit.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


def matmul(back: Backward) -> Gradients:
    """MatMul(A, B), NumPy's rules: dA = dY Bᵀ, dB = Aᵀ dY, summed over the axes that broadcasting added."""
    return matmul_gradients(back, back.x(0), back.x(1), back.dy)


def matmul_gradients(back: Backward, a: ir.Value, b: ir.Value, dy: ir.Value) -> Gradients:
    """Return dA and dB of Y = A B; the node's inputs 0 and 1 say which are wanted."""
    emit = back.emit
    left, right = rank_of(a), rank_of(b)
    if right == 2 and left is None:  # whatever the rank of A, it is rows that B is applied to
        left = 3
    if left is None or right is None:
        return Miss("the rank of its inputs is unknown")
    if left == 1:
        dy = emit.op("Unsqueeze", dy, emit.ints(-1 if right == 1 else -2))
    if right == 1:
        dy = emit.op("Unsqueeze", dy, emit.ints(-1))
    row = emit.op("Unsqueeze", a, emit.ints(0)) if left == 1 else a
    column = emit.op("Unsqueeze", b, emit.ints(1)) if right == 1 else b
    return [
        _left(back, dy, a, column, (left, max(right, 2))) if back.needs(0) else None,
        _right(back, dy, row, b, (max(left, 2), right)) if back.needs(1) else None,
    ]


def _left(back: Backward, dy: ir.Value, a: ir.Value, column: ir.Value, ranks: tuple[int, int]) -> ir.Value:
    """Return dA = dY Bᵀ, for B of rank 2 or more."""
    emit, (left, right) = back.emit, ranks
    product = emit.op("MatMul", dy, swap_last_two(emit, column, right))
    if left == 1:
        total = (
            product if right == 2 else emit.op("ReduceSum", product, emit.ints(*range(right - 2)), keepdims=0)
        )
        return emit.op("Reshape", total, emit.shape(a))
    if right == 2:
        return product
    return _without_batch(back, product, a, dy)


def _right(back: Backward, dy: ir.Value, row: ir.Value, b: ir.Value, ranks: tuple[int, int]) -> ir.Value:
    """Return dB = Aᵀ dY, for A of rank 2 or more.

    A matrix B that a batch of matrices is multiplied by is one product of tall matrices.
    """
    emit, (left, right) = back.emit, ranks
    if right <= 2:
        rows, grads = row, dy
        if left > 2:
            rows, grads = _tall(back, row, row), _tall(back, dy, None if right == 1 else b)
        product = emit.op("MatMul", emit.op("Transpose", rows, perm=[1, 0]), grads)
        return emit.op("Reshape", product, emit.shape(b)) if right == 1 else product
    product = emit.op("MatMul", swap_last_two(emit, row, left), dy)
    return _without_batch(back, product, b, dy)


def _tall(back: Backward, value: ir.Value, width_of: ir.Value | None) -> ir.Value:
    """Return a value with all axes but the last made one; the last is as long as that of `width_of`, or 1."""
    emit = back.emit
    dims = [1] if width_of is None else dimensions(width_of)
    width = None if dims is None else dims[-1]
    if isinstance(width, int):
        return emit.op("Reshape", value, emit.ints(-1, width))
    last = emit.op("Shape", value, start=-1)
    return emit.op("Reshape", value, emit.concat(emit.ints(-1), last))


def _without_batch(back: Backward, product: ir.Value, like: ir.Value, dy: ir.Value) -> ir.Value:
    """Sum a batched product over the leading axes along which `like` was repeated."""
    own, batch = dimensions(like), dimensions(dy)
    if own is None or batch is None:
        return back.reduce_at_run_time(product, like)
    product.shape = ir.Shape([*batch[:-2], *own[-2:]])
    product.type = ir.TensorType(back.dtype(like))
    return back.reduce_to(product, like)


def gemm(back: Backward) -> Gradients:
    """Gemm(A, B, C) = alpha A' B' + beta C, X' = X or Xᵀ.

    dA' = alpha dY B'ᵀ, dB' = alpha A'ᵀ dY, dC = beta dY.
    """
    emit, dy = back.emit, back.dy
    turned_a, turned_b = (int_attribute(back.node, name, 0) for name in ("transA", "transB"))
    alpha, beta = (_float(back.node, name) for name in ("alpha", "beta"))

    def product(left: ir.Value, right: ir.Value, turn_left: int, turn_right: int) -> ir.Value:
        scale: dict[str, Any] = {} if alpha == 1.0 else {"alpha": alpha}
        return emit.op("Gemm", left, right, transA=turn_left, transB=turn_right, **scale)

    a, b = back.x(0), back.x(1)
    da = db = dc = None
    if back.needs(0):
        da = product(b, dy, turned_b, 1) if turned_a else product(dy, b, 0, 1 - turned_b)
    if back.needs(1):
        db = product(dy, a, 1, turned_a) if turned_b else product(a, dy, 1 - turned_a, 0)
    if back.needs(2):
        dc = back.reduce_to(dy, back.x(2))
        dc = dc if beta == 1.0 else emit.op("Mul", dc, back.number(beta, dc))
    return [da, db, dc]


def fused_matmul(back: Backward) -> Gradients:
    """FusedMatMul(A, B; transA, transB, alpha) = alpha A' B': as MatMul of alpha dY, turned back."""
    emit, node = back.emit, back.node
    if int_attribute(node, "transBatchA", 0) or int_attribute(node, "transBatchB", 0):
        return Miss("transBatchA and transBatchB are not supported")
    turned = [bool(int_attribute(node, name, 0)) for name in ("transA", "transB")]
    factors: list[ir.Value] = []
    ranks: list[int] = []
    for index in range(2):
        value = back.x(index)
        rank = rank_of(value)
        if rank is None:
            return Miss("the rank of its inputs is unknown")
        ranks.append(rank)
        turned[index] = turned[index] and rank > 1
        if turned[index]:
            dims = dimensions(value) or []
            value = swap_last_two(emit, value, rank)
            value.shape = ir.Shape([*dims[:-2], dims[-1], dims[-2]])
            value.type = ir.TensorType(back.dtype(back.x(index)))
        factors.append(value)
    dy, alpha = back.dy, _float(node, "alpha")
    if alpha != 1.0:
        dy = emit.op("Mul", dy, back.number(alpha))
        dy.shape, dy.type = back.dy.shape, back.dy.type
    results = matmul_gradients(back, factors[0], factors[1], dy)
    if isinstance(results, Miss):
        return results
    return [
        swap_last_two(emit, result, rank) if result is not None and turn else result
        for result, turn, rank in zip(results, turned, ranks, strict=True)
    ]


def _float(node: ir.Node, name: str) -> float:
    found = node.attributes.get(name)
    return 1.0 if found is None else found.as_float()


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Gemm": gemm,
    "MatMul": matmul,
    ("com.microsoft", "FusedMatMul"): fused_matmul,
}
