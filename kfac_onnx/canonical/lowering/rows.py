"""Gradients of row selection: dense zeros with the rows of dY added in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.canonical.lowering.scatter import END, linear_index, scatter_elements, scatter_slices
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import ORDERED_VIEWS
from kfac_onnx.graph.values import constant, dtype_of, int_attribute, static_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES", "place_slice", "scatter_nd"]


def shape_and_static(
    emit: Emitter, shape: ir.Value, result: ir.Value
) -> tuple[ir.Value, tuple[int, ...] | None]:
    """Return a run-time shape input and its numbers, where the result's shape or a constant tells them."""
    array = constant(shape)
    if array is not None:
        return shape, tuple(int(dim) for dim in array)
    source = shape.producer()
    if source is not None and source.op_type == "Shape" and not source.attributes.get("end"):
        known = static_shape(source.inputs[0])
        if known is not None and int_attribute(source, "start", 0) == 0:
            return emit.ints(*known), known
    known = static_shape(result)
    return (shape, None) if known is None else (emit.ints(*known), known)


def gather_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """GatherGrad(shape, ids, dY; axis): zeros(shape) with out[.., ids, ..] += dY along axis."""
    shape, ids, grad = node.inputs[:3]
    dtype = dtype_of(grad)
    if shape is None or ids is None or grad is None or dtype is None:
        return Miss("the type of its third input is unknown")
    axis = int_attribute(node, "axis", 0)
    runtime, static = shape_and_static(emit, shape, node.outputs[0])
    if static is None and axis < -1:
        return Miss(f"axis {axis} counts from the end of a tensor of unknown rank")
    if static is not None and not -len(static) <= axis < len(static):
        return Miss(f"its result has rank {len(static)}, so that there is no axis {axis}")
    return [scatter_slices(emit, None, runtime, ids, grad, axis=axis, dtype=dtype, static=static)]


def scatter_nd(
    emit: Emitter,
    base: ir.Value | None,
    shape: ir.Value,
    static: tuple[int, ...] | None,
    indices: ir.Value,
    updates: ir.Value,
    dtype: ir.DataType,
    reduction: str,
) -> ir.Value | Miss:
    """Return ScatterND(base, indices, updates) with a reduction, as a ScatterElements.

    One index column scatters rows of `base`; k columns scatter rows of `base` with its first k
    dimensions made one.
    """
    index_dims = indices.shape if indices.const_value is None else indices.const_value.shape
    columns = index_dims[-1] if index_dims is not None and len(index_dims) > 0 else None
    if not isinstance(columns, int):
        return Miss("the number of index columns is not static")
    position = linear_index(emit, indices, shape, columns)
    if columns == 1:
        return scatter_slices(
            emit, base, shape, position, updates, axis=0, dtype=dtype, static=static, reduction=reduction
        )
    if static is None:
        merged_static = None
        merged = emit.concat(
            emit.op("ReduceProd", emit.part(shape, 0, columns), emit.ints(0)), emit.part(shape, columns, END)
        )
    else:
        merged_static = (int(np.prod(static[:columns])), *static[columns:])
        merged = emit.ints(*merged_static)
    flat = None if base is None else emit.op("Reshape", base, merged)
    added = scatter_slices(
        emit, flat, merged, position, updates, axis=0, dtype=dtype, static=merged_static, reduction=reduction
    )
    return emit.op("Reshape", added, shape)


def gather_nd_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """GatherNDGrad(shape, indices, dY; batch_dims=0): zeros(shape) with the indexed slices += dY."""
    shape, indices, grad = node.inputs[:3]
    dtype = dtype_of(grad)
    if shape is None or indices is None or grad is None or dtype is None:
        return Miss("the type of its third input is unknown")
    if int_attribute(node, "batch_dims", 0) != 0:
        return Miss("only batch_dims=0 is supported")
    runtime, static = shape_and_static(emit, shape, node.outputs[0])
    result = scatter_nd(emit, None, runtime, static, indices, grad, dtype, "add")
    return result if isinstance(result, Miss) else [result]


def gather_elements_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """GatherElementsGrad(dY, shape, indices; axis): zeros(shape), ScatterElements add."""
    grad, shape, indices = node.inputs[:3]
    dtype = dtype_of(grad)
    if shape is None or indices is None or grad is None or dtype is None:
        return Miss("the type of its first input is unknown")
    axis = int_attribute(node, "axis", 0)
    runtime, _ = shape_and_static(emit, shape, node.outputs[0])
    return [scatter_elements(emit, None, runtime, indices, grad, axis=axis, dtype=dtype)]


def slice_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """SliceGrad(dY, shape, starts, ends, axes, steps): zeros(shape) with out[slice] = dY.

    With constant starts and steps of 1 this is a Pad; otherwise the positions that the slice would
    read are sliced out of a numbering of all entries, and dY is written there.
    """
    grad, shape, starts = node.inputs[:3]
    dtype = dtype_of(grad)
    if grad is None or shape is None or starts is None or dtype is None:
        return Miss("the type of its first input is unknown")
    runtime, static = shape_and_static(emit, shape, node.outputs[0])
    return [place_slice(emit, grad, runtime, static, node.inputs[2:], dtype)]


def place_slice(
    emit: Emitter,
    grad: ir.Value,
    runtime: ir.Value,
    static: tuple[int, ...] | None,
    bounds: Sequence[ir.Value | None],
    dtype: ir.DataType,
) -> ir.Value:
    """Return zeros of a shape with out[slice] = grad; `bounds` are the inputs of Slice after the first."""
    starts, _, axes, steps = (*bounds, None, None)[:4]
    first = constant(starts)
    chosen = np.arange(0 if first is None else first.size) if axes is None else constant(axes)
    stride = np.ones(1) if steps is None else constant(steps)
    if first is not None and chosen is not None and stride is not None and np.all(stride == 1):
        starts_at, along = first.reshape(-1).tolist(), chosen.reshape(-1).tolist()
        return _pad(emit, grad, runtime, static, starts_at, along, dtype)
    size = emit.op("ReduceProd", runtime, emit.ints(0), keepdims=0)
    zero, one = (emit.constant(np.array(number, np.int64)) for number in (0, 1))
    numbering = emit.op("Reshape", emit.op("Range", zero, size, one), runtime)
    inputs = [numbering, *bounds]
    picked = emit.many("Slice", inputs, 1)[0]
    flat = emit.ints(-1)
    written = scatter_elements(
        emit,
        None,
        emit.op("Reshape", size, flat),
        emit.op("Reshape", picked, flat),
        emit.op("Reshape", grad, flat),
        axis=0,
        dtype=dtype,
    )
    return emit.op("Reshape", written, runtime)


def _pad(
    emit: Emitter,
    grad: ir.Value,
    shape: ir.Value,
    static: tuple[int, ...] | None,
    starts: Sequence[int],
    axes: Sequence[int],
    dtype: ir.DataType,
) -> ir.Value:
    piece = static_shape(grad)
    if static is not None:
        before = [0] * len(static)
        for start, axis in zip(starts, axes, strict=True):
            dim = static[axis]
            before[axis] = min(max(start + dim, 0) if start < 0 else start, dim)
        if piece is not None:
            after = [dim - first - length for dim, first, length in zip(static, before, piece, strict=True)]
            return emit.op("Pad", grad, emit.ints(*before, *after), emit.scalar(0.0, dtype))
        begin = emit.ints(*before)
    else:
        begin = emit.op("Mul", shape, emit.ints(0))
        for start, axis in zip(starts, axes, strict=True):
            dim = emit.op("Gather", shape, emit.ints(axis), axis=0)
            first = (
                emit.op("Max", emit.op("Add", dim, emit.ints(start)), emit.ints(0))
                if start < 0
                else emit.ints(start)
            )
            place = emit.op("ScatterElements", begin, emit.ints(axis), emit.op("Min", first, dim), axis=0)
            begin = place
    after_value = emit.op("Sub", emit.op("Sub", shape, begin), emit.op("Shape", grad))
    return emit.op("Pad", grad, emit.concat(begin, after_value), emit.scalar(0.0, dtype))


def aten(emit: Emitter, node: ir.Node) -> Lowered:
    """ATen embedding(W, ids, padding_idx, ..) and embedding_backward(g, ids, num_weights, padding_idx, ..).

    torch drops the gradient of the row `padding_idx`; a negative `padding_idx` means none.
    """
    operator = node.attributes.get("operator")
    kind = "" if operator is None else operator.as_string()
    if kind == "embedding":
        return [emit.op("Gather", node.inputs[0], node.inputs[1], axis=0)]
    if kind != "embedding_backward":
        return Miss(f"the torch operator {kind!r} is not known")
    grad, ids, count, padding = node.inputs[:4]
    dtype = dtype_of(grad)
    pad, by_frequency = constant(padding), constant(node.inputs[4])
    if grad is None or ids is None or count is None or dtype is None or pad is None:
        return Miss("padding_idx must be a constant")
    if pad.size != 1 or pad.dtype.kind not in "iu":
        return Miss("padding_idx must be one whole number")
    if by_frequency is None or by_frequency.size != 1 or bool(by_frequency):
        return Miss("scale_grad_by_freq is not supported")
    rows = grad
    if int(pad) >= 0:
        dropped = emit.op("Unsqueeze", emit.op("Equal", ids, padding), emit.ints(-1))
        rows = emit.op("Where", dropped, emit.scalar(0.0, dtype), grad)
    known = static_shape(node.outputs[0]) or _shape_counted(count)
    dim = emit.part(emit.op("Shape", grad), -1, END)
    shape = (
        emit.ints(*known) if known is not None else emit.concat(emit.op("Reshape", count, emit.ints(1)), dim)
    )
    return [scatter_slices(emit, None, shape, ids, rows, axis=0, dtype=dtype, static=known)]


def _shape_counted(count: ir.Value) -> tuple[int, ...] | None:
    """Return the static shape of the table, or of the view of one, whose rows Shape counted."""
    node = count.producer()
    while node is not None and node.op_type in ORDERED_VIEWS | {"Gather", "Slice"}:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Shape":
        return None
    shape = static_shape(node.inputs[0])
    return shape if shape is not None and len(shape) == 2 else None


RULES = {
    ("com.microsoft", "GatherGrad"): gather_grad,
    ("com.microsoft", "GatherNDGrad"): gather_nd_grad,
    ("com.microsoft", "GatherElementsGrad"): gather_elements_grad,
    ("com.microsoft", "SliceGrad"): slice_grad,
    ("org.pytorch.aten", "ATen"): aten,
}
