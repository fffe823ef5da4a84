"""Gradients of operators that move, repeat or cut entries: Reshape, Transpose, Concat, Slice, Pad, ...

Each gradient moves the entries of dY back; entries that were repeated are summed, those cut off get 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.canonical.lowering.rows import place_slice
from kfac_onnx.canonical.lowering.scatter import END, scatter_elements
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import constant, int_attribute, rank_of, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]

LOWEST: Final = np.iinfo(np.int64).min


def reshape(back: Backward) -> Gradients:
    """Reshape, Flatten, Squeeze: dY in the shape of X."""
    return [back.emit.op("Reshape", back.dy, back.emit.shape(back.x()))]


def unsqueeze(back: Backward) -> Gradients:
    """Unsqueeze(X, axes): Squeeze(dY, axes)."""
    return [back.emit.op("Squeeze", back.dy, back.x(1))]


def transpose(back: Backward) -> Gradients:
    """Transpose(X; perm): dY transposed by the inverse of perm."""
    perm = back.node.attributes.get("perm")
    if perm is None:
        return [back.emit.op("Transpose", back.dy)]
    return [back.emit.op("Transpose", back.dy, perm=[int(axis) for axis in np.argsort(perm.as_ints())])]


def expand(back: Backward) -> Gradients:
    """Expand(X, shape): dY summed over the axes along which X was repeated."""
    return [back.reduce_to(back.dy, back.x())]


def tile(back: Backward) -> Gradients:
    """Tile(X, repeats): dY as [r0, d0, r1, d1, ..], summed over the repeats."""
    emit, x, repeats = back.emit, back.x(), back.x(1)
    rank = rank_of(x)
    if rank is None:
        return Miss("the rank of its input is unknown")
    if rank == 0:
        return [back.dy]
    one = emit.ints(1)
    pairs = emit.op("Concat", *(emit.op("Unsqueeze", v, one) for v in (repeats, emit.shape(x))), axis=1)
    parts = emit.op("Reshape", back.dy, emit.op("Reshape", pairs, emit.ints(-1)))
    return [emit.op("ReduceSum", parts, emit.ints(*range(0, 2 * rank, 2)), keepdims=0)]


def concat(back: Backward) -> Gradients:
    """Concat(X..; axis): dY split into the inputs' lengths."""
    emit, inputs = back.emit, back.node.inputs
    axis = int_attribute(back.node, "axis", 0)
    if len(inputs) == 1:
        return [back.dy]
    shapes = [static_shape(value) for value in inputs]
    lengths: list[ir.Value] = []
    for value, shape in zip(inputs, shapes, strict=True):
        if shape is not None:
            lengths.append(emit.ints(shape[axis]))
        else:
            ends = {"start": axis} if axis == -1 else {"start": axis, "end": axis + 1}
            lengths.extend(emit.many("Shape", [value], 1, ends))
    known = [shape[axis] for shape in shapes if shape is not None]
    sizes = emit.ints(*known) if len(known) == len(inputs) else emit.concat(*lengths)
    parts = emit.many("Split", [back.dy, sizes], len(inputs), {"axis": axis})
    return [part if back.needs(i) else None for i, part in enumerate(parts)]


def split(back: Backward) -> Gradients:
    """Split(X, lengths; axis): the parts' gradients joined, zeros for a part that the loss does not use."""
    emit = back.emit
    parts: list[ir.Value] = []
    for index, output in enumerate(back.node.outputs):
        gradient = back.grad(index)
        if gradient is None:
            gradient = emit.zeros(emit.shape(output), back.dtype(back.x()))
        parts.append(gradient)
    return [emit.op("Concat", *parts, axis=int_attribute(back.node, "axis", 0))]


def slice_(back: Backward) -> Gradients:
    """Slice(X, starts, ends, axes, steps): dY put where it was read, zeros elsewhere."""
    emit, x = back.emit, back.x()
    bounds = [back.input(index) for index in range(1, 5)]
    if _reverses_axes(x, bounds):
        return [emit.many("Slice", [back.dy, *bounds], 1)[0]]
    return [place_slice(emit, back.dy, emit.shape(x), static_shape(x), bounds, back.dtype(x))]


def _reverses_axes(x: ir.Value, bounds: list[ir.Value | None]) -> bool:
    """Say whether a Slice only turns whole axes around; then it is its own gradient."""
    starts, ends, axes, steps = (constant(value) for value in bounds)
    if starts is None or ends is None or steps is None or not np.all(steps == -1):
        return False
    if axes is not None and len({int(axis) for axis in axes}) != axes.size:
        return False
    shape = static_shape(x)
    for index, (start, end) in enumerate(zip(starts.reshape(-1), ends.reshape(-1), strict=True)):
        size = END if shape is None or axes is None else shape[int(axes.reshape(-1)[index])]
        if not (int(start) == -1 or int(start) >= size - 1) or int(end) >= -size:
            return False
    return True


def pad(back: Backward) -> Gradients:
    """Pad(X, pads, value, axes; mode): dY without the borders, which are summed onto what they repeat."""
    emit, x, dy = back.emit, back.x(), back.dy
    found = back.node.attributes.get("mode")
    mode = "constant" if found is None else found.as_string()
    axes = back.input(3)
    if mode != "constant":
        return [_repeated_borders(back, x, dy), None, None]
    pads = constant(back.x(1))
    if pads is not None and np.all(pads >= 0):
        before, after = pads.reshape(2, -1)
        starts = emit.ints(*(int(number) for number in before))
        ends = emit.ints(*(-int(number) if number else END for number in after))
        dx = emit.op("Slice", dy, starts, ends, *([] if axes is None else [axes]))
    else:
        zero = back.number(0.0)
        rest = [] if axes is None else [axes]
        dx = emit.op("Pad", dy, emit.op("Neg", back.x(1)), zero, *rest)
    filled = None
    if back.needs(2):
        total, inner = (emit.op("ReduceSum", value, keepdims=0) for value in (dy, dx))
        filled = emit.op("Reshape", emit.op("Sub", total, inner), emit.shape(back.x(2)))
    return [dx, None, filled]


def _repeated_borders(back: Backward, x: ir.Value, dy: ir.Value) -> ir.Value:
    """Return dX of a Pad that repeats entries: their numbers, padded alike, say where dY is added."""
    emit = back.emit
    shape = emit.shape(x)
    numbering = _numbering(back, shape)
    others = [None if place == 1 else value for place, value in enumerate(back.node.inputs[1:])]
    places = emit.op("Pad", numbering, *others, mode=back.node.attributes["mode"])  # none has a fill
    flat = emit.ints(-1)
    added = scatter_elements(
        emit,
        None,
        emit.op("ReduceProd", shape, emit.ints(0)),
        emit.op("Reshape", places, flat),
        emit.op("Reshape", dy, flat),
        axis=0,
        dtype=back.dtype(x),
    )
    return emit.op("Reshape", added, shape)


def _numbering(back: Backward, shape: ir.Value) -> ir.Value:
    """Return the numbers 0, 1, 2, .. in a tensor of this shape, int64."""
    emit = back.emit
    zero, one = (emit.constant(np.array(number, np.int64)) for number in (0, 1))
    size = emit.op("ReduceProd", shape, emit.ints(0), keepdims=0)
    return emit.op("Reshape", emit.op("Range", zero, size, one), shape)


def depth_to_space(back: Backward) -> Gradients:
    """DepthToSpace(X; blocksize, mode): the blocks of dY back into channels."""
    emit, x = back.emit, back.x()
    block = back.node.attributes["blocksize"].as_int()
    mode = back.node.attributes.get("mode")
    if mode is None or mode.as_string() == "DCR":
        return [emit.op("SpaceToDepth", back.dy, blocksize=block)]
    shape = emit.shape(x)
    side = emit.ints(block)
    full = emit.concat(
        emit.part(shape, 0, 1),
        emit.op("Div", emit.part(shape, 1, 2), emit.ints(block * block)),
        emit.part(shape, 2, 3),
        side,
        emit.part(shape, 3, 4),
        side,
    )
    blocks = emit.op("Transpose", emit.op("Reshape", back.dy, full), perm=[0, 1, 3, 5, 2, 4])
    return [emit.op("Reshape", blocks, shape)]


def space_to_depth(back: Backward) -> Gradients:
    """SpaceToDepth(X; blocksize): DepthToSpace(dY)."""
    block = back.node.attributes["blocksize"].as_int()
    return [back.emit.op("DepthToSpace", back.dy, blocksize=block, mode="DCR")]


def same_again(back: Backward) -> Gradients:
    """Trilu, ReverseSequence: the same operator on dY."""
    emit = back.emit
    return emit.many(back.node.op_type, [back.dy, *back.node.inputs[1:]], 1, back.node.attributes)


def range_(back: Backward) -> Gradients:
    """Range(start, limit, step), y_i = start + i step: dstart = Σ dY, dlimit = 0, dstep = Σ i dY."""
    emit, dy = back.emit, back.dy
    start = emit.op("ReduceSum", dy, keepdims=0) if back.needs(0) else None
    step = None
    if back.needs(2):
        place = emit.cast(_numbering(back, emit.shape(dy)), back.dtype(dy))
        step = emit.op("ReduceSum", emit.op("Mul", dy, place), keepdims=0)
    return [start, None, step]


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Concat": concat,
    "ConstantOfShape": no_gradient,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": no_gradient,
    "Flatten": reshape,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "ReverseSequence": same_again,
    "Shape": no_gradient,
    "Size": no_gradient,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": reshape,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": same_again,
    "Unsqueeze": unsqueeze,
}
