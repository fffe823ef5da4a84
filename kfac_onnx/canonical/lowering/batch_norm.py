"""Batch normalization in training, and its gradient.

Shapes: X float[B, C, ...]; scale, bias and all statistics float[C]. The statistics of a batch are over all
axes but the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.lowering.normalization import normalized_gradient
from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import dtype_of, rank_of

if TYPE_CHECKING:
    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES"]


def _spread(emit: Emitter, value: ir.Value, rank: int, work: ir.DataType) -> ir.Value:
    """Return statistics float[C] as float[C, 1, ...], which broadcasts over X."""
    trailing = emit.ints(-1, *[1] * (rank - 2))
    return emit.op("Reshape", emit.cast(value, work, dtype_of(value)), trailing)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else found.as_float()


def batch_norm_internal(emit: Emitter, node: ir.Node) -> Lowered:
    """BatchNormInternal(X, scale, bias, mean, var; epsilon, momentum), which normalizes by the batch.

    -> Y, running mean, running variance, mean of the batch, 1/√(variance of the batch + epsilon). A
    running statistic is momentum old + (1 − momentum) batch; the variance is that of a population.
    """
    x, scale, bias, mean, variance = node.inputs[:5]
    dtype, rank = dtype_of(x), rank_of(x)
    if x is None or scale is None or bias is None or mean is None or variance is None or dtype is None:
        return Miss("the type of its first input is unknown")
    if rank is None or rank < 2:
        return Miss("the rank of its first input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    data = emit.cast(x, work, dtype)
    over = emit.ints(0, *range(2, rank))
    centre = emit.op("ReduceMean", data, over, keepdims=1)
    off = emit.op("Sub", data, centre)
    spread = emit.op("ReduceMean", emit.op("Mul", off, off), over, keepdims=1)
    floor = emit.scalar(_attribute(node, "epsilon", 1e-5), work)
    inverse = emit.op("Reciprocal", emit.op("Sqrt", emit.op("Add", spread, floor)))
    scaled = emit.op("Mul", emit.op("Mul", off, inverse), _spread(emit, scale, rank, work))
    results: list[ir.Value | None] = [
        emit.cast(emit.op("Add", scaled, _spread(emit, bias, rank, work)), dtype, work)
    ]
    momentum = _attribute(node, "momentum", 0.9)
    kept, fresh = emit.scalar(momentum, work), emit.scalar(1 - momentum, work)
    flat = emit.ints(-1)
    for old, new in ((mean, centre), (variance, spread)):
        own = dtype_of(old) or dtype
        before = emit.op("Mul", emit.cast(old, work, own), kept)
        added = emit.op("Mul", emit.op("Reshape", new, flat), fresh)
        results.append(emit.cast(emit.op("Add", before, added), own, work))
    results += [emit.op("Reshape", item, flat) for item in (centre, inverse)]
    return results[: len(node.outputs)]


def batch_normalization_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """BatchNormalizationGrad(dY, X, scale, mean, invstd) -> dX, dscale, dbias.

    x̂ = (X − mean) invstd: dX = scale invstd (dY − mean(dY) − x̂ mean(dY x̂)), dscale = Σ dY x̂, dbias = Σ dY.
    """
    grad, x, scale, mean, invstd = node.inputs[:5]
    dtype, rank = dtype_of(grad), rank_of(x)
    if grad is None or x is None or scale is None or mean is None or invstd is None or dtype is None:
        return Miss("the type of its first input is unknown")
    if rank is None or rank < 2:
        return Miss("the rank of its second input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    dy, data = emit.cast(grad, work, dtype), emit.cast(x, work, dtype_of(x) or dtype)
    over = emit.ints(0, *range(2, rank))
    inverse = _spread(emit, invstd, rank, work)
    x_hat = emit.op("Mul", emit.op("Sub", data, _spread(emit, mean, rank, work)), inverse)
    aligned = emit.op("Mul", dy, x_hat)
    gain = emit.op("Mul", _spread(emit, scale, rank, work), inverse)
    own = dtype_of(scale) or dtype
    results = [emit.cast(normalized_gradient(emit, dy, x_hat, gain, over, centred=True), dtype, work)]
    results += [emit.cast(emit.op("ReduceSum", item, over, keepdims=0), own, work) for item in (aligned, dy)]
    return results[: len(node.outputs)]


RULES = {
    ("com.microsoft", "BatchNormInternal"): batch_norm_internal,
    ("com.microsoft", "BatchNormalizationGrad"): batch_normalization_grad,
}
