"""What each operator does to the instances of all iterations at once: one rule per operator.

A rule is asked only where some input differs between iterations. It emits nodes outside of the loop and
returns the result's lane, or a `Miss`. Instances lie along a new axis 0, so the axes of an operator move
up by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import FORWARD, Fixed, Lane, Ragged, Stacked
from kfac_onnx.canonical.loops.rules_rows import RULES as ROW_RULES
from kfac_onnx.canonical.loops.rules_rows import axes_of, fixed_numbers
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import ELEMENTWISE, Trait, having
from kfac_onnx.graph.values import dtype_of, int_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.canonical.loops.lanes import Order
    from kfac_onnx.canonical.loops.vectorizer import LaneRule, Vectorizer

__all__ = ["RULES"]

UNSAFE = having(Trait.STEEP_AT_ZERO) | having(Trait.STEEP)
"""Their derivative may be infinite in iterations in which a branch does not run."""


def _elementwise(vec: Vectorizer, node: ir.Node) -> Lane:
    lanes: list[Fixed | Stacked | Ragged] = []
    for value in node.inputs:
        lane = vec.lane(value) if value is not None else None
        if isinstance(lane, Miss):
            return lane
        if lane is not None:
            lanes.append(lane)
    if node.op_type == "CastLike":
        lanes = lanes[:1]
    if len(lanes) < len(node.inputs) and node.op_type != "CastLike":
        return Miss(f"{node.op_type} leaves an input out")
    mask = vec.mask_of(node)
    if mask is not None and node.op_type in UNSAFE:
        return Miss(f"{node.op_type} in a branch that not every iteration takes")
    if any(isinstance(lane, Ragged) for lane in lanes):
        return _elementwise_ragged(vec, node, lanes)
    if any(lane.rank is None for lane in lanes):
        return Miss(f"the rank of an input of {node.op_type} is not known")
    orders: set[Order] = {lane.order for lane in lanes if isinstance(lane, Stacked)}
    apart: set[Order] = orders - {FORWARD}
    order: Order = FORWARD if mask is not None or len(apart) != 1 else apart.pop()
    if orders != {order}:
        lanes = [
            vec.stacked(vec.in_order(lane, order), lane.rank, order) if isinstance(lane, Stacked) else lane
            for lane in lanes
        ]
    rank = max(lane.rank or 0 for lane in lanes)
    inputs = [
        vec.lifted(lane.value, lane.rank, rank) if isinstance(lane, Stacked) else lane.value for lane in lanes
    ]
    if mask is not None and node.op_type in ("Div", "Mod"):
        inputs[1] = _guarded(vec, node, lanes[1], inputs[1], mask, rank)
    return vec.stacked(_emit_like(vec, node, inputs), rank, order)


def _guarded(
    vec: Vectorizer,
    node: ir.Node,
    lane: Fixed | Stacked | Ragged,
    divisor: ir.Value,
    mask: ir.Value,
    rank: int,
) -> ir.Value:
    """Return the divisor, 1 in iterations in which the division does not take place."""
    dtype = dtype_of(node.inputs[1]) or dtype_of(lane.value) or ir.DataType.FLOAT
    chosen = vec.lifted(mask, 0, rank)
    return vec.emit.op("Where", chosen, divisor, vec.emit.scalar(1.0, dtype))


def _elementwise_ragged(vec: Vectorizer, node: ir.Node, lanes: Sequence[Fixed | Stacked | Ragged]) -> Lane:
    ragged = [lane for lane in lanes if isinstance(lane, Ragged)]
    rank = max(lane.rank or 0 for lane in lanes)
    for lane in lanes:
        shared = isinstance(lane, Fixed) and (lane.rank is None or lane.rank >= rank > 0)
        if shared and not _one_along_rows(lane.value):
            return Miss(f"{node.op_type} of instances of different lengths with '{lane.value.name}'")
        if isinstance(lane, Stacked):
            return Miss(f"{node.op_type} of instances of different lengths with one number of each")
    if any(lane.segments is not ragged[0].segments or lane.rank != rank for lane in ragged):
        return Miss(f"{node.op_type} of instances of different lengths")
    value = _emit_like(vec, node, [lane.value for lane in lanes])
    full = [lane.value for lane in ragged if _is_full(lane.value)]
    if full:
        vec.describe(value, full[0], None)
        if value.type is not None and (dtype := dtype_of(value)) is not None:
            value.type = ir.TensorType(dtype)
    return Ragged(value, rank, ragged[0].segments)


def _is_full(value: ir.Value) -> bool:
    """Say whether no axis but the first can be broadcast."""
    shape = value.shape
    return shape is not None and all(isinstance(dim, int) and dim > 1 for dim in list(shape)[1:])


def _one_along_rows(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 0 and value.shape[0] == 1


def _emit_like(vec: Vectorizer, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
    """Emit the node's operator with its attributes on other inputs."""
    if node.op_type == "CastLike":
        dtype = dtype_of(node.inputs[1])
        if dtype is not None:
            return vec.emit.op("Cast", inputs[0], to=int(dtype))
        like = vec.lane(node.inputs[1])
        if isinstance(like, Miss):
            raise AssertionError("the lanes of all inputs were looked at")
        return vec.emit.op("CastLike", inputs[0], like.value)
    (result,) = vec.emit.many(node.op_type, inputs, 1, node.attributes)
    return result


def _shape(vec: Vectorizer, node: ir.Node) -> Lane:
    lane = vec.lane(node.inputs[0])
    if isinstance(lane, Miss):
        return lane
    if not isinstance(lane, Stacked):
        return Miss("the shape of instances of different lengths")
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", lane.rank)
    first, last = (max(0, min(lane.rank, item + lane.rank if item < 0 else item)) for item in (start, end))
    return vec.fixed(vec.emit.op("Shape", lane.value, start=first + 1, end=max(last, first) + 1), 1)


def _size(vec: Vectorizer, node: ir.Node) -> Lane:
    lane = vec.lane(node.inputs[0])
    if isinstance(lane, Miss):
        return lane
    if not isinstance(lane, Stacked):
        return Miss("the size of instances of different lengths")
    shape = vec.emit.op("Shape", lane.value, start=1)
    return vec.fixed(vec.emit.op("ReduceProd", shape, keepdims=0), 0)


def _reshape(vec: Vectorizer, node: ir.Node) -> Lane:
    data, shape = vec.lane(node.inputs[0]), vec.lane(node.inputs[1])
    for lane in (data, shape):
        if isinstance(lane, Miss):
            return lane
    if not isinstance(shape, Fixed) or not isinstance(data, Stacked):
        return Miss("it is reshaped to a shape that the iterations change")
    known = vec.array(shape.value)
    size = None if shape.value.shape is None else shape.value.shape[0]
    rank = known.size if known is not None else size
    if not isinstance(rank, int):
        return _unlike_rank(vec, node, data, shape)
    return _reshaped(vec, node, data, shape.value, rank)


def _unlike_rank(vec: Vectorizer, node: ir.Node, data: Stacked, shape: Fixed) -> Lane:
    value = node.outputs[0].shape
    if value is None:
        return Miss("the rank of a Reshape is not known")
    return _reshaped(vec, node, data, shape.value, len(value))


def _reshaped(vec: Vectorizer, node: ir.Node, data: Stacked, shape: ir.Value, rank: int) -> Lane:
    known = vec.array(shape)
    literal = int_attribute(node, "allowzero", 0) == 1
    if known is not None:
        numbers = [int(item) for item in known]
        if literal and 0 in numbers:
            return Miss("a Reshape to an empty shape")
        target = vec.emit.ints(0, *numbers)
    elif literal:
        target = vec.emit.concat(vec.emit.op("Shape", data.value, start=0, end=1), shape)
    else:
        target = vec.emit.concat(vec.emit.ints(0), shape)
    return vec.stacked(vec.emit.op("Reshape", data.value, target), rank, data.order)


def _unsqueeze(vec: Vectorizer, node: ir.Node) -> Lane:
    data = vec.lane(node.inputs[0])
    if not isinstance(data, Stacked | Ragged):
        return data if isinstance(data, Miss) else Miss("its axes change")
    count = fixed_numbers(vec, node.inputs[1])
    if count is None:
        return Miss("the axes of an Unsqueeze are not known")
    rank = data.rank + len(count)
    axes = [axis % rank for axis in count]
    if isinstance(data, Ragged):
        if 0 in axes:
            return Miss("an Unsqueeze before the rows of different numbers")
        return Ragged(vec.emit.op("Unsqueeze", data.value, vec.emit.ints(*axes)), rank, data.segments)
    moved = vec.emit.ints(*(axis + 1 for axis in axes))
    return vec.stacked(vec.emit.op("Unsqueeze", data.value, moved), rank, data.order)


def _squeeze(vec: Vectorizer, node: ir.Node) -> Lane:
    data = vec.lane(node.inputs[0])
    if not isinstance(data, Stacked):
        return data if isinstance(data, Miss) else Miss("a Squeeze of instances of different lengths")
    axes = axes_of(vec, node, data.rank)
    if axes is None:
        shape = data.value.shape
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            return Miss("the axes of a Squeeze are not known")
        axes = [axis - 1 for axis in range(1, data.rank + 1) if shape[axis] == 1]
    moved = vec.emit.ints(*(axis + 1 for axis in axes))
    return vec.stacked(vec.emit.op("Squeeze", data.value, moved), data.rank - len(axes), data.order)


def _transpose(vec: Vectorizer, node: ir.Node) -> Lane:
    data = vec.lane(node.inputs[0])
    if not isinstance(data, Stacked):
        return data if isinstance(data, Miss) else Miss("a Transpose of instances of different lengths")
    attr = node.attributes.get("perm")
    perm = list(attr.as_ints()) if attr is not None else list(range(data.rank))[::-1]
    moved = [0, *(axis + 1 for axis in perm)]
    return vec.stacked(vec.emit.op("Transpose", data.value, perm=moved), data.rank, data.order)


def _expand(vec: Vectorizer, node: ir.Node) -> Lane:
    data, shape = vec.lane(node.inputs[0]), vec.lane(node.inputs[1])
    for lane in (data, shape):
        if isinstance(lane, Miss):
            return lane
    if not isinstance(shape, Fixed) or not isinstance(data, Stacked):
        return Miss("it is expanded to a shape that the iterations change")
    known = vec.array(shape.value)
    size = None if shape.value.shape is None else shape.value.shape[0]
    length = known.size if known is not None else size
    if not isinstance(length, int):
        declared = node.outputs[0].shape
        if declared is None:
            return Miss("the rank of an Expand is not known")
        length = len(declared)
    rank = max(length, data.rank)
    target = vec.emit.concat(vec.emit.ints(*(1,) * (1 + rank - length)), shape.value)
    value = vec.emit.op("Expand", vec.lifted(data.value, data.rank, rank), target)
    return vec.stacked(value, rank, data.order)


def _concat(vec: Vectorizer, node: ir.Node) -> Lane:
    stacks: list[Stacked] = []
    for value in node.inputs:
        stack = vec.as_stack(vec.lane(value))
        if isinstance(stack, Miss):
            return stack
        stacks.append(stack)
    rank = stacks[0].rank
    axis = int_attribute(node, "axis", 0) % rank
    value = vec.emit.op("Concat", *(item.value for item in stacks), axis=axis + 1)
    return vec.stacked(value, rank)


def _if(vec: Vectorizer, node: ir.Node) -> Lane:
    """Compute both branches for all iterations and choose; both are free of effects."""
    condition = vec.as_stack(vec.lane(node.inputs[0]))
    if isinstance(condition, Miss):
        return condition
    if len(node.outputs) != 1:
        return Miss("an If with several results")
    whole = vec.emit.op("Reshape", condition.value, vec.emit.ints(-1))
    outer = vec.mask_of(node)
    taken = {"then_branch": whole, "else_branch": vec.emit.op("Not", whole)}
    results: list[Fixed | Stacked] = []
    for name, mask in taken.items():
        branch = node.attributes[name].as_graph()
        vec.enter(branch, mask if outer is None else vec.emit.op("And", outer, mask))
        lane = vec.lane(branch.outputs[0])
        if isinstance(lane, Miss):
            return lane
        if isinstance(lane, Ragged) or lane.rank is None:
            return Miss("the branches of an If have instances of different lengths")
        results.append(vec.aligned(lane) if isinstance(lane, Stacked) else lane)
    ranks = {lane.rank for lane in results}
    if len(ranks) != 1:
        return Miss("the branches of an If have different ranks")
    rank = results[0].rank or 0
    value = vec.emit.op("Where", vec.lifted(whole, 0, rank), results[0].value, results[1].value)
    return vec.stacked(value, rank)


RULES: Final[dict[str, LaneRule]] = {
    # the slope of a PRelu broadcasts to its data and not the other way: it may not gain an axis alone
    **dict.fromkeys(ELEMENTWISE - {"PRelu"}, _elementwise),
    **ROW_RULES,
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "If": _if,
}
