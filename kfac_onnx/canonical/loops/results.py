"""Results of a loop that can be computed for all iterations at once leave it.

So do sequences that a loop appends to and that are joined after it: they are stacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.canonical.loops.lanes import Fixed, Lane, Stacked
from kfac_onnx.canonical.loops.recurrence import Collected, prune
from kfac_onnx.canonical.loops.rules import RULES
from kfac_onnx.canonical.loops.states import replace_result
from kfac_onnx.canonical.loops.vectorizer import Vectorizer
from kfac_onnx.graph.emit import Emitter, Miss, replace_node
from kfac_onnx.graph.values import int_attribute, rank_of, unchanged

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.canonical.loops.recurrence import Recurrence, State
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["compute_outside", "stack_sequences"]


def compute_outside(loop: Recurrence, names: Context, constants: Constants) -> int:
    """Compute the stacks that no state is needed for outside of the loop; return how many."""
    vec = Vectorizer(loop, names, constants, RULES)
    found: list[tuple[ir.Value, ir.Value]] = []
    for item in loop.collected:
        if not (item.outer.uses() or item.outer.is_graph_output()):
            continue
        stack = vec.as_stack(vec.lane(item.inner))
        if isinstance(stack, Stacked):
            found.append((item.outer, _placed(vec, stack, item)))
    if not found:
        return 0
    loop.graph.insert_before(loop.node, vec.emit.nodes)
    for old, new in found:
        new.type, shape = new.type or old.type, old.shape
        if new.shape is None and shape is not None:
            new.shape = shape
        replace_result(loop, old, new, names)
    prune(loop.graph, vec.emit.nodes)
    return len(found)


def _placed(vec: Vectorizer, stack: Stacked, item: Collected) -> ir.Value:
    """Return a stack along the axis and in the direction in which the loop collects it."""
    value = vec.reordered(stack.value, "reverse") if item.reverse else stack.value
    axis = item.axis % (stack.rank + 1)
    return value if axis == 0 else vec.emit.op("Transpose", value, perm=_moved(stack.rank, axis))


def _moved(rank: int, axis: int) -> list[int]:
    """Return the permutation that moves axis 0 of a stack of instances of this rank to `axis`."""
    others = list(range(1, rank + 1))
    return [*others[:axis], 0, *others[axis:]]


def stack_sequences(loop: Recurrence, names: Context, constants: Constants) -> Recurrence | None:
    """Collect what the iterations append to sequences that are only joined after a Loop; None if nothing.

    The instances that are joined along an axis of their own must have one shape: they are known to where
    they can be computed for all iterations at once, or have a static shape.
    """
    found: list[tuple[State, ir.Value, list[ir.Node]]] = []
    vec = Vectorizer(loop, names, constants, RULES)
    for state in loop.states:
        part = _appended(state, loop)
        joins = [node for node, _ in state.final.uses()]
        if part is None or not joins or state.final.is_graph_output():
            continue
        if any(node.op_type != "ConcatFromSequence" or node.graph is not loop.graph for node in joins):
            continue
        lane = vec.lane(part)
        if all(_joinable(node, part, lane) for node in joins):
            found.append((state, part, joins))
    prune_emitted(vec.emit)
    if not found:
        return None
    for _, part, joins in found:
        stack = loop.result(part)
        rank = _rank(vec.lane(part), part)
        for node in joins:
            emit = Emitter.in_place_of(names, node, "loop")
            replace_node(node, emit, [_joined(emit, node, stack, rank)])
    dropped = [state for state, _, _ in found]
    loop.states = [state for state in loop.states if state not in dropped]
    written = loop.write(names)
    prune(written.body)
    return written


def prune_emitted(emit: Emitter) -> None:
    """Take back nodes that were emitted for a question and are in no graph."""
    for node in reversed(emit.nodes):
        if node.graph is None:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


def _appended(state: State, loop: Recurrence) -> ir.Value | None:
    """Return what every iteration appends to an at first empty sequence."""
    first, node = unchanged(state.first).producer(), unchanged(state.next).producer()
    if first is None or first.op_type != "SequenceEmpty":
        return None
    if node is None or node.op_type != "SequenceInsert" or node.graph is not loop.body:
        return None
    if node.inputs[0] is not state.inner or len(node.inputs) != 2 or len(state.inner.uses()) != 1:
        return None
    return node.inputs[1]


def _rank(lane: Lane, part: ir.Value) -> int | None:
    return lane.rank if isinstance(lane, Stacked | Fixed) else rank_of(part)


def _joinable(node: ir.Node, part: ir.Value, lane: Lane) -> bool:
    rank = _rank(lane, part)
    if rank is None:
        return False
    if int_attribute(node, "new_axis", 0) == 1 or isinstance(lane, Stacked | Fixed):
        return True
    if isinstance(lane, Miss) and part.shape is not None:
        return isinstance(part.shape[int_attribute(node, "axis", 0)], int)
    return False


def _joined(emit: Emitter, node: ir.Node, stack: ir.Value, rank: int | None) -> ir.Value:
    if rank is None:
        raise AssertionError("a sequence of parts of unknown rank is not stacked")
    axis = int_attribute(node, "axis", 0)
    if int_attribute(node, "new_axis", 0) == 1:
        axis %= rank + 1
        return emit.op("Transpose", stack, perm=_moved(rank, axis)) if axis else emit.op("Identity", stack)
    axis %= rank
    turned = emit.op("Transpose", stack, perm=_moved(rank, axis)) if axis else stack
    shape = emit.op("Shape", turned)
    sizes = [emit.part(shape, 0, axis)] if axis else []
    sizes.append(emit.ints(-1))
    if axis + 1 < rank:
        sizes.append(emit.part(shape, axis + 2, rank + 1))
    return emit.op("Reshape", turned, emit.concat(*sizes))
