"""Gradients of normalizations over trailing axes.

X is the input, x̂ what it is made (mean 0 and mean square 1), dY the gradient of the output x̂ scale + bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.lowering.scatter import END
from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import dtype_of, int_attribute, rank_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES", "normalized_axes", "normalized_gradient"]


def normalized_axes(node: ir.Node, x: ir.Value, scale: ir.Value) -> tuple[int, ...] | None:
    """Return the axes that a node normalizes over, counted from the end; None if its rank is unknown."""
    axis = int_attribute(node, "axis", -1)
    rank, trailing = rank_of(x), rank_of(scale)
    if axis >= 0 and rank is not None:
        axis -= rank
    elif axis >= 0 and trailing is not None:
        axis = -trailing
    return None if axis >= 0 else tuple(range(axis, 0))


def normalized_gradient(
    emit: Emitter, g: ir.Value, x_hat: ir.Value, inverse: ir.Value, along: ir.Value, *, centred: bool
) -> ir.Value:
    """Return the gradient of X from g, that of x̂ = (X − mean) inverse, or of x̂ = X inverse.

    It is inverse (g − mean(g) − x̂ mean(g x̂)), without mean(g) where x̂ is not centred. Means are over the
    axes `along`; `inverse` is one over the root of the mean square there.
    """
    shared = emit.op("ReduceMean", emit.op("Mul", g, x_hat), along, keepdims=1)
    inner = emit.op("Sub", g, emit.op("Mul", x_hat, shared))
    if centred:
        inner = emit.op("Sub", inner, emit.op("ReduceMean", g, along, keepdims=1))
    return emit.op("Mul", inverse, inner)


def _norm_backward(
    emit: Emitter,
    node: ir.Node,
    inputs: tuple[ir.Value | None, ...],
    standardized: Callable[[ir.Value, ir.Value], ir.Value],
    *,
    centred: bool,
) -> Lowered:
    """Emit dX, dscale, dbias from dY, X, scale, invstd; `standardized(X, invstd)` is x̂."""
    grad, x, scale, invstd = inputs
    dtype = dtype_of(grad)
    if grad is None or x is None or scale is None or invstd is None or dtype is None:
        return Miss("the type of its first input is unknown")
    axes = normalized_axes(node, x, scale)
    if axes is None:
        return Miss("the rank of its input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    scale_dtype = dtype_of(scale) or dtype
    dy, gain = emit.cast(grad, work, dtype), emit.cast(scale, work, scale_dtype)
    inv = emit.cast(invstd, work, dtype_of(invstd))
    x_hat = standardized(emit.cast(x, work, dtype_of(x) or dtype), inv)
    along = emit.ints(*axes)
    g = emit.op("Mul", dy, gain)
    results = [emit.cast(normalized_gradient(emit, g, x_hat, inv, along, centred=centred), dtype, work)]
    stacked = emit.concat(emit.ints(-1), emit.part(emit.op("Shape", grad), axes[0], END))
    for summand in (emit.op("Mul", dy, x_hat), dy):
        rows = emit.op("Reshape", summand, stacked)
        total = emit.op(
            "Reshape", emit.op("ReduceSum", rows, emit.ints(0), keepdims=0), emit.op("Shape", scale)
        )
        results.append(emit.cast(total, scale_dtype, work))
    return results[: len(node.outputs)]


def layer_normalization_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """LayerNormalizationGrad(dY, X, scale, mean, invstd; axis=−1) -> dX, dscale, dbias.

    x̂ = (X − mean) invstd, G = dY scale: dX = invstd (G − mean(G) − x̂ mean(G x̂)), dscale = Σ dY x̂,
    dbias = Σ dY.
    """
    if len(node.inputs) < 5 or node.inputs[3] is None:
        return Miss("the saved mean is missing")
    mean = node.inputs[3]

    def standardized(x: ir.Value, inv: ir.Value) -> ir.Value:
        centre = emit.cast(mean, dtype_of(inv) or ir.DataType.FLOAT, dtype_of(mean))
        return emit.op("Mul", emit.op("Sub", x, centre), inv)

    inputs = (node.inputs[0], node.inputs[1], node.inputs[2], node.inputs[4])
    return _norm_backward(emit, node, inputs, standardized, centred=True)


def simplified_layer_normalization_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """SimplifiedLayerNormalizationGrad(dY, X, scale, invstd; axis=−1) -> dX, dscale, with x̂ = X invstd."""
    if len(node.inputs) < 4:
        return Miss("the saved inverse deviation is missing")
    inputs = (node.inputs[0], node.inputs[1], node.inputs[2], node.inputs[3])
    return _norm_backward(emit, node, inputs, lambda x, inv: emit.op("Mul", x, inv), centred=False)


RULES = {
    ("com.microsoft", "LayerNormalizationGrad"): layer_normalization_grad,
    ("com.microsoft", "SimplifiedLayerNormalizationGrad"): simplified_layer_normalization_grad,
}
