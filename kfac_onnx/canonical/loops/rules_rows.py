"""Rules for operators that choose or add up entries: slices, lookups, one-hot, reductions (see `rules`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import FORWARD, Fixed, Lane, Ragged, Stacked
from kfac_onnx.canonical.loops.segments import ragged_slices, reduce_ragged
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import REDUCTIONS
from kfac_onnx.graph.values import dtype_of, int_attribute

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.vectorizer import LaneRule, Vectorizer

__all__ = ["RULES", "axes_of", "fixed_numbers"]


def fixed_numbers(vec: Vectorizer, value: ir.Value | None) -> list[int] | None:
    """Return the integers of a constant that all iterations share."""
    lane = vec.lane(value)
    array = vec.array(lane.value) if isinstance(lane, Fixed) else None
    return None if array is None else [int(item) for item in array.reshape(-1)]


def axes_of(vec: Vectorizer, node: ir.Node, rank: int) -> list[int] | None:
    """Return the non-negative axes of Unsqueeze, Squeeze or a reduction, in a tensor of this rank."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = fixed_numbers(vec, node.inputs[1])
    else:
        attr = node.attributes.get("axes")
        axes = None if attr is None else list(attr.as_ints())
    return None if axes is None else [axis % rank if rank else axis for axis in axes]


def _slice(vec: Vectorizer, node: ir.Node) -> Lane:
    lanes = [vec.lane(value) for value in node.inputs if value is not None]
    for lane in lanes:
        if isinstance(lane, Miss):
            return lane
    if len(lanes) < len(node.inputs):
        return Miss("a Slice leaves an input out")
    data = lanes[0]
    if isinstance(data, Stacked) and all(isinstance(lane, Fixed) for lane in lanes[1:]):
        return _same_slice(vec, node, data)
    if not isinstance(data, Fixed):
        return Miss("a Slice whose data and bounds both change")
    steps = fixed_numbers(vec, node.inputs[4]) if len(node.inputs) > 4 else [1]
    axes = fixed_numbers(vec, node.inputs[3]) if len(node.inputs) > 3 else [0]
    if steps != [1] or axes is None or len(axes) != 1 or (axes[0] % data.rank if data.rank else 1) != 0:
        return Miss("a Slice whose bounds change is along axis 0 only")
    bounds: list[ir.Value] = []
    for lane in lanes[1:3]:
        stack = vec.as_stack(lane)
        if isinstance(stack, Miss):
            return stack
        flat = vec.flat_bounds.get(stack.value)
        if flat is None:
            whole = vec.emit.op("Reshape", stack.value, vec.emit.ints(-1))
            flat = vec.emit.cast(whole, ir.DataType.INT64, dtype_of(stack.value))
            vec.flat_bounds[stack.value] = flat
        bounds.append(flat)
    one = vec.one_each(node, data, bounds[0])
    if one is not None:
        return one
    return ragged_slices(vec, data.value, bounds[0], bounds[1], vec.mask_of(node))


def _same_slice(vec: Vectorizer, node: ir.Node, data: Stacked) -> Lane:
    numbers = [fixed_numbers(vec, value) for value in node.inputs[1:]]
    axes = numbers[2] if len(numbers) > 2 else list(range(len(numbers[0] or ())))
    if axes is None:
        return Miss("the axes of a Slice are not known")
    fixed = [lane.value for lane in map(vec.lane, node.inputs[1:]) if isinstance(lane, Fixed)]
    moved = vec.emit.ints(*(axis % data.rank + 1 for axis in axes))
    inputs = [data.value, *fixed[:2], moved, *fixed[3:]]
    return vec.stacked(vec.emit.op("Slice", *inputs), data.rank, data.order)


def _gather(vec: Vectorizer, node: ir.Node) -> Lane:
    data, index = vec.lane(node.inputs[0]), vec.lane(node.inputs[1])
    for lane in (data, index):
        if isinstance(lane, Miss):
            return lane
    axis = int_attribute(node, "axis", 0)
    if isinstance(data, Stacked) and isinstance(index, Fixed):
        if index.rank is None:
            return Miss("the rank of the indices of a Gather is not known")
        value = vec.emit.op("Gather", data.value, index.value, axis=axis % data.rank + 1)
        return vec.stacked(value, data.rank + index.rank - 1, data.order)
    if not isinstance(data, Fixed) or data.rank is None:
        return Miss("a Gather whose data and indices both change")
    axis %= data.rank
    if vec.mask_of(node) is not None:
        return Miss("a Gather in a branch that not every iteration takes")
    if isinstance(index, Ragged):
        if axis != 0 or index.rank != 1:
            return Miss("a Gather of instances of different lengths along another axis than 0")
        rows = vec.emit.op("Gather", data.value, index.value, axis=0)
        vec.describe(rows, data.value, None)
        return Ragged(rows, data.rank, index.segments)
    if not isinstance(index, Stacked):
        return Miss("its indices do not change")
    if axis == 0 and index.rank == 0 and not _is_float(data.value):
        return _read_by_number(vec, data, index)
    value = vec.emit.op("Gather", data.value, index.value, axis=axis)
    if axis:
        count = 1 + index.rank
        around = [*range(axis), *range(axis + count, data.rank - 1 + count)]
        perm = [axis, *(item for item in range(data.rank + index.rank) if item != axis)]
        if len(around) + count != len(perm):
            raise AssertionError("a Gather's rank is that of its data and indices, less one")
        value = vec.emit.op("Transpose", value, perm=perm)
    return vec.stacked(value, data.rank + index.rank - 1, index.order)


def _read_by_number(vec: Vectorizer, data: Fixed, index: Stacked) -> Lane:
    """Read entry index_t of a tensor in iteration t; where these are all entries, they are only ordered."""
    rank = (data.rank or 1) - 1
    places = vec.array(index.value)
    length = None if data.value.shape is None else data.value.shape[0]
    if index.index and vec.reads_all(data.value):
        source, order = vec.unpermuted(data.value)
        return vec.stacked(source, rank, order)
    if places is not None and isinstance(length, int) and index.order == FORWARD:
        made = vec.emit.op("Gather", data.value, vec.names.constant(places.reshape(-1)), axis=0)
        vec.describe(made, data.value, places.size)
        source, order = vec.unpermuted(made)
        return vec.stacked(source, rank, order)
    value = vec.emit.op("Gather", data.value, index.value, axis=0)
    return vec.stacked(value, rank, index.order)


def _is_float(value: ir.Value) -> bool:
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point()


def _gather_nd(vec: Vectorizer, node: ir.Node) -> Lane:
    data, index = vec.lane(node.inputs[0]), vec.lane(node.inputs[1])
    for lane in (data, index):
        if isinstance(lane, Miss):
            return lane
    if not isinstance(data, Fixed) or not isinstance(index, Stacked) or data.rank is None:
        return Miss("a GatherND whose data change")
    if int_attribute(node, "batch_dims", 0) or vec.mask_of(node) is not None:
        return Miss("a GatherND by batch, or in a branch that not every iteration takes")
    columns = None if node.inputs[1] is None or not node.inputs[1].shape else node.inputs[1].shape[-1]
    if not isinstance(columns, int):
        return Miss("the number of columns of the indices of a GatherND is not known")
    value = vec.emit.op("GatherND", data.value, index.value)
    return vec.stacked(value, index.rank - 1 + data.rank - columns, index.order)


def _one_hot(vec: Vectorizer, node: ir.Node) -> Lane:
    ids, depth, values = (vec.lane(value) for value in node.inputs)
    for lane in (ids, depth, values):
        if isinstance(lane, Miss):
            return lane
    if not isinstance(ids, Stacked) or not isinstance(depth, Fixed) or not isinstance(values, Fixed):
        return Miss("a OneHot whose depth changes")
    axis = int_attribute(node, "axis", -1) % (ids.rank + 1)
    value = vec.emit.op("OneHot", ids.value, depth.value, values.value, axis=axis + 1)
    return vec.stacked(value, ids.rank + 1, ids.order)


def _reduce(vec: Vectorizer, node: ir.Node) -> Lane:
    data = vec.lane(node.inputs[0])
    if isinstance(data, Miss):
        return data
    if isinstance(data, Fixed):
        return Miss("its axes change")
    keepdims = int_attribute(node, "keepdims", 1) == 1
    axes = axes_of(vec, node, data.rank)
    if isinstance(data, Ragged):
        if axes is None and data.rank == 1:
            axes = [0]
        if axes != [0] or node.op_type not in ("ReduceSum", "ReduceMean"):
            return Miss(f"{node.op_type} of rows of different numbers")
        return reduce_ragged(vec, node.op_type, data, keepdims=keepdims)
    if axes is None or not axes:
        if int_attribute(node, "noop_with_empty_axes", 0):
            return data
        axes = list(range(data.rank))
    moved = vec.emit.ints(*(axis + 1 for axis in axes))
    value = vec.emit.op(node.op_type, data.value, moved, keepdims=int(keepdims))
    return vec.stacked(value, data.rank if keepdims else data.rank - len(set(axes)), data.order)


RULES: Final[dict[str, LaneRule]] = {
    **dict.fromkeys(REDUCTIONS, _reduce),
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
}
