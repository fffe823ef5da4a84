"""Training operators that move or rescale tensors: concat and split with lengths, Scale, Div, Dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import constant, dtype_of, int_attribute, static_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES"]


def concat_training(emit: Emitter, node: ir.Node) -> Lowered:
    """ConcatTraining(x..; axis) -> Concat, int64[n] length of each input along axis."""
    axis = int_attribute(node, "axis", 0)
    results: list[ir.Value | None] = [emit.op("Concat", *node.inputs, axis=axis)]
    if len(node.outputs) < 2 or not (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return [*results, None]
    shapes = [static_shape(value) for value in node.inputs]
    if None not in shapes:
        return [*results, emit.ints(*(shape[axis] for shape in shapes if shape is not None))]
    lengths = [emit.op("Gather", emit.op("Shape", value), emit.ints(axis), axis=0) for value in node.inputs]
    return [*results, emit.concat(*lengths)]


def split_training(emit: Emitter, node: ir.Node) -> Lowered:
    """SplitTraining(X, int64[n] lengths; axis) -> Split with these lengths."""
    lengths = constant(node.inputs[1])
    split = node.inputs[1] if lengths is None else emit.ints(*(int(length) for length in lengths))
    return emit.many(
        "Split", [node.inputs[0], split], len(node.outputs), {"axis": int_attribute(node, "axis", 0)}
    )


def scale(emit: Emitter, node: ir.Node) -> Lowered:
    """Scale(X, s; scale_down) = X / s if scale_down, else X s. s may be of another type."""
    x, factor = node.inputs[:2]
    dtype = dtype_of(x)
    if x is None or factor is None or dtype is None:
        return Miss("the type of its first input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    operator = "Div" if int_attribute(node, "scale_down", 0) else "Mul"
    # The factor is one number in a tensor of any rank; as rank 0 it does not change the result's rank.
    one = emit.op("Reshape", emit.cast(factor, work, dtype_of(factor)), emit.constant(np.zeros(0, np.int64)))
    return [emit.cast(emit.op(operator, emit.cast(x, work, dtype), one), dtype, work)]


def broadcast_gradient_args(emit: Emitter, node: ir.Node) -> Lowered:
    """BroadcastGradientArgs(shape A, shape B) -> axes to sum over for A, for B (shapes aligned right)."""
    left, right = node.inputs[:2]
    if left is None or right is None:
        return Miss("one of its two shapes is missing")
    wanted = [bool(output.uses() or output.is_graph_output()) for output in node.outputs]
    return _summed_axes(emit, (left, right), wanted)


def _summed_axes(
    emit: Emitter, shapes: tuple[ir.Value, ir.Value], wanted: Sequence[bool]
) -> list[ir.Value | None]:
    """Return for each wanted one of two operands the axes of their broadcast result to sum over."""
    ranks = [emit.op("Shape", value) for value in shapes]
    rank = emit.op("Max", *ranks)
    one, one_scalar = emit.ints(1), emit.constant(np.array(1, np.int64))
    padded = [
        emit.concat(emit.op("Expand", one, emit.op("Sub", rank, own)), value)
        for own, value in zip(ranks, shapes, strict=True)
    ]
    is_one = [emit.op("Equal", value, one_scalar) for value in padded]
    results: list[ir.Value | None] = []
    for index, needed in enumerate(wanted):
        if not needed:
            results.append(None)
            continue
        broadcast = emit.op("And", is_one[index], emit.op("Not", is_one[1 - index]))
        results.append(emit.op("Reshape", emit.op("NonZero", broadcast), emit.ints(-1)))
    return results


def div_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """DivGrad(dY, A, B) -> dA = dY / B, dB = −dY A / B², summed over the axes that broadcasting added."""
    grad, top, bottom = node.inputs[:3]
    dtype = dtype_of(grad)
    if grad is None or top is None or bottom is None or dtype is None:
        return Miss("the type of its first input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    dy, a, b = (emit.cast(item, work, dtype) for item in (grad, top, bottom))
    wanted = [bool(output.name) for output in node.outputs]
    quotient = emit.op("Div", dy, b)
    shapes = (emit.op("Shape", top), emit.op("Shape", bottom))
    alike = top.shape is not None and bottom.shape is not None and list(top.shape) == list(bottom.shape)
    axes = [None, None] if alike else _summed_axes(emit, shapes, wanted)
    results: list[ir.Value | None] = []
    for index, (needed, over) in enumerate(zip(wanted, axes, strict=False)):
        if not needed:
            results.append(None)
            continue
        part = quotient if index == 0 else emit.op("Neg", emit.op("Mul", quotient, emit.op("Div", a, b)))
        if over is not None:
            part = emit.op("ReduceSum", part, over, keepdims=1, noop_with_empty_axes=1)
            part = emit.op("Reshape", part, shapes[index])
        results.append(emit.cast(part, dtype, work))
    return results


def dropout_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """DropoutGrad(dY, mask, ratio=0.5, training) = dY mask / (1 − ratio) in training, else dY."""
    grad, mask = node.inputs[:2]
    ratio = node.inputs[2] if len(node.inputs) > 2 else None
    training = node.inputs[3] if len(node.inputs) > 3 else None
    dtype = dtype_of(grad)
    if grad is None or mask is None or dtype is None:
        return Miss("the type of its first input is unknown")
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    known, mode = constant(ratio), constant(training)
    if any(item is not None and item.size != 1 for item in (known, mode)):
        return Miss("its ratio or its mode is not one number")
    if training is not None and mode is not None and not bool(mode):
        return [grad]
    one = emit.scalar(1.0, work)
    if ratio is None or known is not None:
        share = 0.5 if known is None else float(known.astype(np.float64).reshape(-1)[0])
        factor = emit.scalar(0.0 if share >= 1 else 1 / (1 - share), work)
    else:
        factor = emit.op("Reciprocal", emit.op("Sub", one, emit.cast(ratio, work, dtype_of(ratio))))
    dy = emit.cast(grad, work, dtype)
    result = emit.op("Where", mask, emit.op("Mul", dy, factor), emit.scalar(0.0, work))
    if training is not None and mode is None:
        result = emit.op("Where", training, result, dy)
    return [emit.cast(result, dtype, work)]


def reduce_sum_training(emit: Emitter, node: ir.Node) -> Lowered:
    """ReduceSumTraining(X, axes; keepdims, noop_with_empty_axes) = ReduceSum."""
    attributes = {name: int_attribute(node, name, 0) for name in ("noop_with_empty_axes",)}
    attributes["keepdims"] = int_attribute(node, "keepdims", 1)
    return emit.many("ReduceSum", list(node.inputs), 1, attributes)


RULES = {
    ("com.microsoft", "ConcatTraining"): concat_training,
    ("com.microsoft", "SplitTraining"): split_training,
    ("com.microsoft", "Scale"): scale,
    ("com.microsoft", "BroadcastGradientArgs"): broadcast_gradient_args,
    ("com.microsoft", "DivGrad"): div_grad,
    ("com.microsoft", "DropoutGrad"): dropout_grad,
    ("com.microsoft", "ReduceSumTraining"): reduce_sum_training,
}
