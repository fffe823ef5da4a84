"""Gradients of operators that select or place rows by ids: Gather, GatherND, ScatterElements, OneHot, ...

The gradient of a selection adds the rows of dY into zeros at the same ids, by ScatterElements: it loses no
row when ids repeat, and the ids and rows stay visible to the passes that look for embedding tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.canonical.lowering.rows import scatter_nd
from kfac_onnx.canonical.lowering.scatter import END, scatter_elements, scatter_slices
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import dtype_of, int_attribute, rank_of, static_shape

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


def gather(back: Backward) -> Gradients:
    """Gather(X, ids; axis): zeros with the slices of dY added at ids."""
    axis = int_attribute(back.node, "axis", 0)
    return _added_slices(back, back.x(1), axis)


def _added_slices(back: Backward, ids: ir.Value, axis: int) -> Gradients:
    emit, x = back.emit, back.x()
    rank, static = rank_of(x), static_shape(x)
    if axis < -1 and rank is None:
        return Miss(f"axis {axis} counts from the end of a tensor of unknown rank")
    axis = axis if rank is None else axis % rank
    return [
        scatter_slices(emit, None, emit.shape(x), ids, back.dy, axis=axis, dtype=back.dtype(x), static=static)
    ]


def compress(back: Backward) -> Gradients:
    """Compress(X, condition; axis): zeros with dY where the condition holds."""
    emit, x = back.emit, back.x()
    ids = emit.op("Reshape", emit.op("NonZero", back.x(1)), emit.ints(-1))
    if "axis" in back.node.attributes:
        return _added_slices(back, ids, int_attribute(back.node, "axis", 0))
    shape = emit.shape(x)
    size = emit.op("ReduceProd", shape, emit.ints(0))
    flat = scatter_elements(emit, None, size, ids, back.dy, axis=0, dtype=back.dtype(x))
    return [emit.op("Reshape", flat, shape)]


def gather_elements(back: Backward) -> Gradients:
    """GatherElements(X, ids; axis): zeros with dY added at ids."""
    emit, x = back.emit, back.x()
    axis = int_attribute(back.node, "axis", 0)
    return [scatter_elements(emit, None, emit.shape(x), back.x(1), back.dy, axis=axis, dtype=back.dtype(x))]


def gather_nd(back: Backward) -> Gradients:
    """GatherND(X, ids; batch_dims): zeros with the slices of dY added at ids."""
    emit, x, ids = back.emit, back.x(), back.x(1)
    batch = int_attribute(back.node, "batch_dims", 0)
    if batch == 0:
        result = scatter_nd(emit, None, emit.shape(x), static_shape(x), ids, back.dy, back.dtype(x), "add")
        return result if isinstance(result, Miss) else [result]
    return _batched_gather_nd(back, x, ids, batch)


def _batched_gather_nd(back: Backward, x: ir.Value, ids: ir.Value, batch: int) -> Gradients:
    """Make the batch axes one, and the number of the batch entry the first index column."""
    emit = back.emit
    dims, rank = dimensions(ids), rank_of(x)
    columns = None if dims is None else dims[-1]
    if dims is None or rank is None or not isinstance(columns, int):
        return Miss("the number of index columns is not static")
    shape, id_shape = emit.shape(x), emit.shape(ids)
    count = emit.op("ReduceProd", emit.part(shape, 0, batch), emit.ints(0))
    merged = emit.concat(count, emit.part(shape, batch, END))
    known = static_shape(x)
    merged_static = None if known is None else (int(np.prod(known[:batch])), *known[batch:])
    inner = emit.concat(count, emit.part(id_shape, batch, END))
    zero, one = (emit.constant(np.array(number, np.int64)) for number in (0, 1))
    numbers = emit.op("Range", zero, emit.op("Squeeze", count, emit.ints(0)), one)
    column_shape = emit.concat(emit.part(inner, 0, -1), emit.ints(1))
    ones = emit.ints(*(1 for _ in range(len(dims) - batch)))
    numbers = emit.op("Reshape", numbers, emit.concat(emit.ints(-1), ones))
    first = emit.op("Expand", numbers, column_shape)
    rest = emit.op("Reshape", emit.cast(ids, ir.DataType.INT64, dtype_of(ids)), inner)
    full = emit.op("Concat", first, rest, axis=-1)
    full.shape = ir.Shape([None] * (len(dims) - batch) + [columns + 1])
    full.type = ir.TensorType(ir.DataType.INT64)
    result = scatter_nd(emit, None, merged, merged_static, full, back.dy, back.dtype(x), "add")
    return result if isinstance(result, Miss) else [emit.op("Reshape", result, shape)]


def scatter_elements_(back: Backward) -> Gradients:
    """ScatterElements(X, ids, U; axis, reduction none|add): dX = dY (0 at ids for none), dU = dY at ids."""
    emit = back.emit
    reduction = _reduction(back.node)
    if reduction not in ("none", "add"):
        return Miss(f"reduction={reduction} is not supported")
    axis = int_attribute(back.node, "axis", 0)
    dx = du = None
    if back.needs(0):
        dx = back.dy
        if reduction == "none":
            zeros = emit.zeros(emit.shape(back.x(1)), back.dtype(back.x()))
            dx = emit.op("ScatterElements", back.dy, back.x(1), zeros, axis=axis)
    if back.needs(2):
        du = emit.op("GatherElements", back.dy, back.x(1), axis=axis)
    return [dx, None, du]


def scatter_nd_(back: Backward) -> Gradients:
    """ScatterND(X, ids, U; reduction none|add): dX = dY (0 at ids for none), dU = dY at ids."""
    emit = back.emit
    reduction = _reduction(back.node)
    if reduction not in ("none", "add"):
        return Miss(f"reduction={reduction} is not supported")
    dx = du = None
    if back.needs(0):
        dx = back.dy
        if reduction == "none":
            zeros = emit.zeros(emit.shape(back.x(2)), back.dtype(back.x()))
            dx = emit.op("ScatterND", back.dy, back.x(1), zeros)
    if back.needs(2):
        du = emit.op("GatherND", back.dy, back.x(1))
    return [dx, None, du]


def _reduction(node: ir.Node) -> str:
    found = node.attributes.get("reduction")
    return "none" if found is None else found.as_string()


def one_hot(back: Backward) -> Gradients:
    """OneHot(ids, depth, values = [off, on]; axis): Σ dY over the entries that are off, and that are on."""
    emit, dy = back.emit, back.dy
    dtype = back.dtype(back.x(2))
    ends = emit.constant(np.array([0, 1]).astype(dtype.numpy()))
    hot = emit.op("OneHot", back.x(0), back.x(1), ends, axis=int_attribute(back.node, "axis", -1))
    on = emit.op("ReduceSum", emit.op("Mul", dy, hot), keepdims=0)
    off = emit.op("Sub", emit.op("ReduceSum", dy, keepdims=0), on)
    first = emit.ints(0)
    return [None, None, emit.concat(emit.op("Unsqueeze", off, first), emit.op("Unsqueeze", on, first))]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ScatterElements": scatter_elements_,
    "ScatterND": scatter_nd_,
}
