"""Gradients of convolution and pooling, as convolutions and scatters.

Shapes: X float[B, C, *L], W float[O, C/group, *K], Y float[B, O, *L']; any number of spatial axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.lowering.scatter import END, scatter_elements
from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import dtype_of, int_attribute, static_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES", "Window", "average_gradient", "input_gradient", "max_pool_grad", "weight_gradient"]


@dataclass(frozen=True)
class Window:
    """How a window of `kernel` entries slides over the spatial axes; `pads` are begins, then ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def axes(self) -> range:
        """The spatial axes of X."""
        return range(2, 2 + len(self.kernel))

    @property
    def begins(self) -> tuple[int, ...]:
        """Padding before each spatial axis."""
        return self.pads[: len(self.kernel)]

    def left_over(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many entries at the end of each padded axis no window reaches."""
        ends = self.pads[len(self.kernel) :]
        spans = [
            dilation * (size - 1) + 1 for dilation, size in zip(self.dilations, self.kernel, strict=True)
        ]
        free = [
            length + begin + end - span
            for length, begin, end, span in zip(lengths, self.begins, ends, spans, strict=True)
        ]
        return tuple(extra % stride for extra, stride in zip(free, self.strides, strict=True))


def _window(node: ir.Node, kernel: tuple[int, ...] | None) -> Window | Miss:
    given = node.attributes.get("kernel_shape")
    size = kernel if given is None else tuple(given.as_ints())
    if size is None:
        return Miss("the shape of its kernel is unknown")
    chosen = node.attributes.get("auto_pad")
    padding = "NOTSET" if chosen is None else chosen.as_string()
    if padding not in ("NOTSET", "VALID"):
        return Miss(f"auto_pad {padding} is not supported")

    def ints(name: str, default: int, count: int) -> tuple[int, ...]:
        found = node.attributes.get(name)
        return (default,) * count if found is None else tuple(found.as_ints())

    pads = (0,) * 2 * len(size) if padding == "VALID" else ints("pads", 0, 2 * len(size))
    return Window(size, ints("strides", 1, len(size)), ints("dilations", 1, len(size)), pads)


def conv_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """ConvGrad(dY, X, W; attributes of Conv) -> dX, dW, dbias.

    dX is the transposed convolution of dY with W. dW[o, c, k] = Σ_{b,t} dY[b, o, t] X[b, c, t stride +
    k dilation − pad] is a convolution of X with dY as its kernel, where batch and channels, stride
    and dilation have changed places. dbias = Σ dY over all axes but the second.
    """
    grad, x, weight = node.inputs[:3]
    dtype, shape = dtype_of(grad), static_shape(weight)
    if grad is None or x is None or weight is None or dtype is None:
        return Miss("the type of its first input is unknown")
    window = _window(node, None if shape is None else shape[2:])
    if isinstance(window, Miss):
        return window
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    dy, data, kernel = (emit.cast(item, work, dtype) for item in (grad, x, weight))
    group = int_attribute(node, "group", 1)
    wanted = [bool(output.name) for output in node.outputs]
    results: list[ir.Value | None] = [None] * len(wanted)
    if wanted[0]:
        lengths = emit.part(emit.shape(x), 2, END)
        results[0] = input_gradient(emit, dy, lengths, kernel, window, group)
    if wanted[1:2] == [True]:
        results[1] = weight_gradient(emit, dy, data, window, group)
    if wanted[2:] == [True]:
        results[2] = emit.op("ReduceSum", dy, emit.ints(0, *window.axes), keepdims=0)
    return [None if item is None else emit.cast(item, dtype, work) for item in results]


def input_gradient(
    emit: Emitter, dy: ir.Value, lengths: ir.Value, weight: ir.Value, window: Window, group: int
) -> ir.Value:
    """Return dX of a convolution; `lengths` int64[n] are those of X's spatial axes."""
    attributes: dict[str, Any] = {"strides": window.strides, "dilations": window.dilations}
    if all(stride == 1 for stride in window.strides):  # no entry of X is left over
        return emit.op("ConvTranspose", dy, weight, group=group, pads=window.pads, **attributes)
    full = emit.op("ConvTranspose", dy, weight, group=group, **attributes)
    after = [stride - 1 for stride in window.strides]  # entries at the end that no window reaches
    padded = emit.op("Pad", full, emit.ints(*[0] * (4 + len(after)), *after))
    begins = emit.ints(*window.begins)
    return emit.op("Slice", padded, begins, emit.op("Add", lengths, begins), emit.ints(*window.axes))


def weight_gradient(emit: Emitter, dy: ir.Value, x: ir.Value, window: Window, group: int) -> ir.Value:
    """Return dW of a convolution."""
    swap = (1, 0, *window.axes)
    by_group = [(x, dy)]
    if group > 1:
        split = {"axis": 1, "num_outputs": group}
        parts = (emit.many("Split", [item], group, split) for item in (x, dy))
        by_group = list(zip(*parts, strict=True))
    pieces: list[ir.Value] = []
    for data, upstream in by_group:
        piece = emit.op(
            "Conv",
            emit.op("Transpose", data, perm=swap),
            emit.op("Transpose", upstream, perm=swap),
            strides=window.dilations,
            dilations=window.strides,
            pads=window.pads,
        )
        if any(stride > 1 for stride in window.strides):
            start = emit.ints(*[0] * len(window.kernel))
            piece = emit.op("Slice", piece, start, emit.ints(*window.kernel), emit.ints(*window.axes))
        pieces.append(emit.op("Transpose", piece, perm=swap))
    return pieces[0] if group == 1 else emit.op("Concat", *pieces, axis=0)


def max_pool_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """MaxPoolGrad(dY, indices): zeros like X with dY added at the flat positions that MaxPool chose."""
    grad, indices = node.inputs[:2]
    dtype = dtype_of(grad)
    if grad is None or indices is None or dtype is None:
        return Miss("the type of its first input is unknown")
    if int_attribute(node, "storage_order", 0) != 0:
        return Miss("storage_order=1 is not supported")
    pool = indices.producer()
    x = pool.inputs[0] if pool is not None and pool.op_type == "MaxPool" else None
    known = static_shape(node.outputs[0])
    if x is None and known is None:
        return Miss("the shape of what was pooled is unknown")
    shape = emit.ints(*(known or ())) if x is None else emit.shape(x)
    flat = emit.ints(-1)
    size = emit.op("ReduceProd", shape, keepdims=1)
    places, rows = (emit.op("Reshape", item, flat) for item in (indices, grad))
    added = scatter_elements(emit, None, size, places, rows, axis=0, dtype=dtype)
    return [emit.op("Reshape", added, shape)]


def average_pool_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """AveragePoolGrad(dY; attributes of AveragePool): every entry of a window gets dY / (its entries).

    One channel at a time this is a transposed convolution with a kernel of ones.
    """
    grad, result = node.inputs[0], node.outputs[0]
    dtype = dtype_of(grad)
    window = _window(node, None)
    if grad is None or dtype is None:
        return Miss("the type of its first input is unknown")
    if isinstance(window, Miss):
        return window
    known = [dim for dim in (result.shape or ())[2:] if isinstance(dim, int)]
    if len(known) != len(window.kernel):
        return Miss("the lengths of what was pooled are unknown")
    lengths = emit.ints(*known)
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    added = average_gradient(emit, node, emit.cast(grad, work, dtype), lengths, known, window, work)
    return added if isinstance(added, Miss) else [emit.cast(added, dtype, work)]


def average_gradient(
    emit: Emitter,
    node: ir.Node,
    grad: ir.Value,
    lengths: ir.Value,
    known: Sequence[int] | None,
    window: Window,
    work: ir.DataType,
) -> ir.Value | Miss:
    """Return dX of an average pooling (attributes of `node`) in the type `work` that dY has.

    `lengths` int64[n] are those of X's spatial axes, `known` the same where they are known beforehand.
    """
    padding = bool(int_attribute(node, "count_include_pad", 0))
    if int_attribute(node, "ceil_mode", 0) and (known is None or any(window.left_over(tuple(known)))):
        return Miss("ceil_mode=1 is not supported where the last window is cut")
    ones = np.ones((1, 1, *window.kernel), work.numpy())
    kernel = emit.constant(ones)
    if padding or not any(window.pads):
        counts = emit.scalar(float(ones.size), work)
    elif known is not None:
        counts = emit.constant(_window_counts(window, list(known)).astype(work.numpy()))
    else:
        plane = emit.op("Expand", emit.scalar(1.0, work), emit.concat(emit.ints(1, 1), lengths))
        sizes = {"strides": window.strides, "dilations": window.dilations, "pads": window.pads}
        (counts,) = emit.many("Conv", [plane, kernel], 1, sizes)
    shape = emit.op("Shape", grad)
    single = emit.concat(emit.ints(-1, 1), emit.part(shape, 2, END))
    share = emit.op("Reshape", emit.op("Div", grad, counts), single)
    added = input_gradient(emit, share, lengths, kernel, window, 1)
    return emit.op("Reshape", added, emit.concat(emit.part(shape, 0, 2), lengths))


def _window_counts(window: Window, lengths: list[int]) -> np.ndarray:
    """Return how many entries of X are in each window, int64[*L']."""
    per_axis: list[list[int]] = []
    for axis, length in enumerate(lengths):
        size, stride, dilation = window.kernel[axis], window.strides[axis], window.dilations[axis]
        before, after = window.pads[axis], window.pads[axis + len(lengths)]
        windows = (length + before + after - dilation * (size - 1) - 1) // stride + 1
        per_axis.append(
            [
                sum(0 <= place * stride - before + k * dilation < length for k in range(size))
                for place in range(windows)
            ]
        )
    counts = [int(np.prod(sizes)) for sizes in product(*per_axis)]
    return np.array(counts, np.int64).reshape([len(sizes) for sizes in per_axis])


RULES = {
    ("com.microsoft", "ConvGrad"): conv_grad,
    ("", "MaxPoolGrad"): max_pool_grad,
    ("", "AveragePoolGrad"): average_pool_grad,
}
