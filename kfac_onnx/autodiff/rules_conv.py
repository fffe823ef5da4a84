"""Gradients of convolution and pooling.

Shapes: X [B, C, *L], W [O, C/groups, *K] (of a transposed convolution [C, O/groups, *K]), Y [B, O, *L'], for
one or more spatial axes L.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.autodiff.working import Working, by_lowering
from kfac_onnx.canonical.lowering.convolution import (
    Window,
    average_gradient,
    input_gradient,
    max_pool_grad,
    weight_gradient,
)
from kfac_onnx.canonical.lowering.scatter import END
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


def convolution(back: Backward) -> Gradients:
    """Conv(X, W, bias; group, strides, dilations, pads or auto_pad).

    dX is the transposed convolution of dY with W, dW a convolution of X with dY, dbias = Σ dY over all
    axes but the second.
    """
    window = window_of(back, static_shape(back.x(1)))
    if isinstance(window, Miss):
        return window
    work, group = Working.of(back, back.x(0)), int_attribute(back.node, "group", 1)
    dy, x, weight = work.up(back.dy), work.up(back.x(0)), work.up(back.x(1))
    results: list[ir.Value | None] = [None, None, None]
    if back.needs(0):
        lengths = back.emit.part(back.emit.shape(x), 2, END)
        results[0] = work.down(input_gradient(back.emit, dy, lengths, weight, window, group))
    if back.needs(1):
        results[1] = work.down(weight_gradient(back.emit, dy, x, window, group))
    results[2] = _bias(back, work, window)
    return results


def transposed_convolution(back: Backward) -> Gradients:
    """ConvTranspose(X, W, bias; as Conv, and output_padding or output_shape).

    The convolution whose dX it is: dX = Conv(dY, W), dW a convolution of dY with X.
    """
    kernel = static_shape(back.x(1))
    window = window_of(back, kernel, transposed=True)
    if isinstance(window, Miss):
        return window
    work, group = Working.of(back, back.x(0)), int_attribute(back.node, "group", 1)
    dy, x, weight = work.up(back.dy), work.up(back.x(0)), work.up(back.x(1))
    results: list[ir.Value | None] = [None, None, None]
    if back.needs(0):
        dx = back.emit.op(
            "Conv",
            dy,
            weight,
            group=group,
            strides=window.strides,
            dilations=window.dilations,
            pads=window.pads,
        )
        results[0] = work.down(dx)
    if back.needs(1):
        results[1] = work.down(weight_gradient(back.emit, x, dy, window, group))
    results[2] = _bias(back, work, window)
    return results


def _bias(back: Backward, work: Working, window: Window) -> ir.Value | None:
    if not back.needs(2):
        return None
    return work.down(back.emit.op("ReduceSum", work.up(back.dy), back.emit.ints(0, *window.axes), keepdims=0))


def window_of(
    back: Backward, weight: tuple[int, ...] | None = None, *, transposed: bool = False
) -> Window | Miss:
    """Return how the node's window slides, with the pads that auto_pad or output_shape stand for.

    Those take lengths, which must be known: with them the lengths of X and Y fix the sum of both pads.
    """
    node = back.node
    given = node.attributes.get("kernel_shape")
    kernel = None if weight is None else weight[2:]
    kernel = kernel if given is None else tuple(given.as_ints())
    if kernel is None:
        return Miss("the shape of its kernel is unknown")

    def ints(name: str, default: int, count: int) -> tuple[int, ...]:
        found = node.attributes.get(name)
        return (default,) * count if found is None else tuple(found.as_ints())

    chosen = node.attributes.get("auto_pad")
    padding = "NOTSET" if chosen is None else chosen.as_string()
    count = len(kernel)
    strides, dilations = ints("strides", 1, count), ints("dilations", 1, count)
    fixed = transposed and "output_shape" in node.attributes
    if padding in ("NOTSET", "VALID") and not fixed:
        pads = (0,) * 2 * count if padding == "VALID" else ints("pads", 0, 2 * count)
        return Window(kernel, strides, dilations, pads)
    ends = [_lengths(value, count) for value in (back.x(0), back.y(0))]
    long, short = ends[::-1] if transposed else ends
    if long is None or short is None:
        return Miss(f"auto_pad {padding} is supported only where the spatial lengths are known")
    extra = ints("output_padding", 0, count)
    before: list[int] = []
    after: list[int] = []
    for axis, size in enumerate(kernel):
        span = dilations[axis] * (size - 1) + 1
        total = (short[axis] - 1) * strides[axis] + span + extra[axis] - long[axis]
        total = max(total, 0)
        if (long[axis] + total - span) // strides[axis] + 1 != short[axis]:
            return Miss("its output_shape is not supported")
        first = total // 2 if padding == "SAME_UPPER" else total - total // 2
        before.append(first)
        after.append(total - first)
    return Window(kernel, strides, dilations, (*before, *after))


def _lengths(value: ir.Value, count: int) -> tuple[int, ...] | None:
    """Return the last `count` dimensions of a value if they are numbers."""
    dims = list(value.shape or ())[2:]
    known = [dim for dim in dims if isinstance(dim, int)]
    return tuple(known) if len(known) == len(dims) == count else None


POOL = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "ceil_mode")


def max_pool(back: Backward) -> Gradients:
    """MaxPool(X) -> Y, indices: dY added where each window's largest entry is, the first of equal ones."""
    if back.grad(1) is not None:
        return Miss("the loss depends on its indices")
    outputs, node = back.node.outputs, back.node
    indices = outputs[1] if len(outputs) > 1 and outputs[1].name else None
    if indices is None or int_attribute(node, "storage_order", 0) != 0:
        same = {name: found.value for name in POOL if (found := node.attributes.get(name)) is not None}
        indices = back.emit.many("MaxPool", [back.x()], 2, same)[1]
    return by_lowering(
        back, max_pool_grad, "MaxPoolGrad", [back.dy, indices], [True], {"storage_order": 0}, [back.x()]
    )


def average_pool(back: Backward) -> Gradients:
    """AveragePool(X; count_include_pad): every entry of a window gets dY / (its entries)."""
    window = window_of(back)
    if isinstance(window, Miss):
        return window
    work, x = Working.of(back, back.x()), back.x()
    lengths = back.emit.part(back.emit.shape(x), 2, END)
    known = _lengths(x, len(window.kernel))
    dx = average_gradient(back.emit, back.node, work.up(back.dy), lengths, known, window, work.work)
    return dx if isinstance(dx, Miss) else [work.down(dx)]


def global_average_pool(back: Backward) -> Gradients:
    """GlobalAveragePool(X): dY / (entries of a channel)."""
    emit, x, work = back.emit, back.x(), Working.of(back, back.x())
    count = emit.op("Div", emit.op("Size", x), emit.op("Size", back.y()))
    share = emit.op("Div", work.up(back.dy), emit.cast(count, work.work))
    return [work.down(emit.op("Expand", share, emit.shape(x)))]


def global_max_pool(back: Backward) -> Gradients:
    """GlobalMaxPool(X): dY at the entries that are the largest of their channel, in equal shares."""
    emit, work = back.emit, Working.of(back, back.x())
    columns = emit.ints(0, 0, -1)
    x, y, dy = (emit.op("Reshape", work.up(item), columns) for item in (back.x(), back.y(), back.dy))
    chosen = emit.cast(emit.op("Equal", x, y), work.work)
    share = emit.op("Div", dy, emit.op("ReduceSum", chosen, emit.ints(2), keepdims=1))
    return [work.down(emit.op("Reshape", emit.op("Mul", chosen, share), emit.shape(back.x())))]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "AveragePool": average_pool,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "MaxPool": max_pool,
}
