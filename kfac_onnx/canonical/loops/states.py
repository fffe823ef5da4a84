"""Simplifying what a loop carries: conditions that count, states that do not change, what nobody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import Fixed
from kfac_onnx.canonical.loops.recurrence import prune, reads
from kfac_onnx.canonical.loops.rules import RULES
from kfac_onnx.canonical.loops.shapes_inside import infer_inside
from kfac_onnx.canonical.loops.vectorizer import Vectorizer
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.operators import COMPARISONS
from kfac_onnx.graph.values import dtype_of, static_shape, unchanged

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.recurrence import Recurrence
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = [
    "counts_iterations",
    "drop_unchanged",
    "drop_unread",
    "read_shapes_outside",
    "replace_result",
    "runs_to_the_end",
]

UNLIMITED = np.iinfo(np.int32).max
"""Trip counts from here on mean "no limit": exporters of while loops write the largest integer."""


def runs_to_the_end(loop: Recurrence, constants: Constants) -> bool:
    """Say whether the number of iterations is known before the first; a Loop must never stop early."""
    if loop.is_scan:
        return True
    if loop.trip is None or loop.goes_on is None:
        return False
    limit = constants.constant(loop.trip)
    if limit is not None and limit.size == 1 and int(limit.reshape(())) >= UNLIMITED:
        return False
    starts = loop.condition is None or _is_true(constants, loop.condition)
    end = unchanged(loop.goes_on)
    return starts and (end is loop.going or _is_true(constants, end))


def _is_true(constants: Constants, value: ir.Value) -> bool:
    array = constants.constant(value)
    return array is not None and array.size == 1 and bool(array.reshape(()))


def counts_iterations(loop: Recurrence, names: Context, constants: Constants) -> Recurrence | None:
    """Give a trip count to a Loop that goes on while an integer state is below a fixed limit.

    With i' = i + step and "go on while i' < limit", the body runs ⌈(limit − i) / step⌉ times, but at least
    once, if the first condition holds, and never else. Returns None where the Loop is not of this kind.
    """
    if loop.is_scan or loop.goes_on is None or runs_to_the_end(loop, constants):
        return None
    test = unchanged(loop.goes_on).producer()
    if test is None or test.op_type not in ORDERINGS or test.graph is not loop.body:
        return None
    state = next((item for item in loop.states if unchanged(item.next) in test.inputs), None)
    step_node = None if state is None else unchanged(state.next).producer()
    if state is None or step_node is None or step_node.op_type != "Add":
        return None
    is_left = test.inputs[0] is unchanged(state.next)
    below = ("Less", "LessOrEqual") if is_left else ("Greater", "GreaterOrEqual")
    if test.op_type not in below or unchanged_inputs(step_node).count(state.inner) != 1:
        return None
    by = next(item for item in unchanged_inputs(step_node) if item is not state.inner)
    step = constants.constant(by)
    dtype = dtype_of(state.first) or dtype_of(by)
    if step is None or step.size != 1 or int(step.reshape(())) < 1:
        return None
    if dtype is None or not dtype.is_integer():
        return None
    vec = Vectorizer(loop, names, constants, RULES)
    limit = vec.lane(test.inputs[1 if is_left else 0])
    if not isinstance(limit, Fixed):
        return None
    emit = vec.emit
    size = int(step.reshape(()))
    extra = size - 1 + (1 if test.op_type.endswith("Equal") else 0)
    rank0 = names.constant(np.zeros(0, np.int64))
    begin, end = (
        emit.op("Reshape", emit.cast(item, ir.DataType.INT64, dtype_of(item)), rank0)
        for item in (state.first, limit.value)
    )
    distance = emit.op("Sub", end, begin)
    if extra:
        distance = emit.op("Add", distance, names.constant(np.array(extra, np.int64)))
    if size > 1:
        distance = emit.op("Div", distance, names.constant(np.array(size, np.int64)))
    count = _bounded(loop, emit, names, constants, distance)
    loop.graph.insert_before(loop.node, [node for node in emit.nodes if node.graph is None])
    loop.trip, loop.condition = count, None
    true = names.constant(np.array(True))
    loop.goes_on = true
    written = loop.write(names)
    prune(written.body)
    prune(written.graph, emit.nodes)
    return written


def _bounded(
    loop: Recurrence, emit: Emitter, names: Context, constants: Constants, distance: ir.Value
) -> ir.Value:
    """Return the number of iterations for a condition that holds at first, and for one that does not."""
    zero, one = (names.constant(np.array(item, np.int64)) for item in (0, 1))
    count = emit.op("Max", distance, one)
    if loop.condition is not None and not _is_true(constants, loop.condition):
        start = emit.op("Reshape", loop.condition, names.constant(np.zeros(0, np.int64)))
        count = emit.op("Where", start, count, zero)
    limit = constants.constant(loop.trip)
    if loop.trip is None or (limit is not None and int(limit.reshape(())) >= UNLIMITED):
        return count
    return emit.op("Min", count, emit.op("Reshape", loop.trip, names.constant(np.zeros(0, np.int64))))


ORDERINGS = COMPARISONS - {"Equal"}  # a counter may step over the one number at which it would stop


def unchanged_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node behind Identity nodes."""
    return [unchanged(value) for value in node.inputs if value is not None]


def drop_unchanged(loop: Recurrence, names: Context) -> Recurrence | None:
    """Read states that every iteration passes on as they are from outside; None if there are none."""
    found = [state for state in loop.states if unchanged(state.next) is state.inner]
    if not found:
        return None
    for state in found:
        for index, end in enumerate(loop.body.outputs):
            if end is state.inner:  # another result of the body is this very state
                _pass_through(loop, index, names)
        state.inner.replace_all_uses_with(state.first)
        replace_result(loop, state.final, state.first, names)
    loop.states = [state for state in loop.states if state not in found]
    written = loop.write(names)
    prune(written.body)
    return written


def _pass_through(loop: Recurrence, index: int, names: Context) -> None:
    """Make a copy of a body input that is also a body output, in every list that names it."""
    value = loop.body.outputs[index]
    copy = ir.Node("", "Identity", [value], num_outputs=1)
    result = copy.outputs[0]
    result.name = names.fresh(f"kfac/loop/{value.name}")
    result.type, result.shape = value.type, value.shape
    loop.body.append(copy)
    loop.body.outputs[index] = result
    for state in loop.states:
        if state.next is value:
            state.next = result
    for item in loop.collected:
        if item.inner is value:
            item.inner = result
    if loop.goes_on is value:
        loop.goes_on = result


def replace_result(loop: Recurrence, old: ir.Value, new: ir.Value, names: Context) -> None:
    """Let the readers of a result of the loop's node read another value; outputs keep their names."""
    if old.is_graph_output():
        copy = ir.Node("", "Identity", [new], num_outputs=1)
        loop.graph.insert_after(_last_of(loop, new), copy)
        result = copy.outputs[0]
        result.type, result.shape, name = old.type, old.shape, old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        old.name = names.fresh(f"kfac/loop/{name}")
        result.name = name
        return
    old.replace_all_uses_with(new)


def _last_of(loop: Recurrence, value: ir.Value) -> ir.Node:
    node = value.producer()
    return loop.node if node is None or node.graph is not loop.graph else node


def drop_unread(loop: Recurrence, names: Context) -> Recurrence | None:
    """Drop states and stacks that nothing depends on; None if there are none."""
    collected = [item for item in loop.collected if item.outer.uses() or item.outer.is_graph_output()]
    live = {state for state in loop.states if state.final.uses() or state.final.is_graph_output()}
    wanted = [item.inner for item in collected] + [state.next for state in live]
    if loop.goes_on is not None:
        wanted.append(loop.goes_on)
    seen: set[ir.Value] = set()
    by_inner = {state.inner: state for state in loop.states}
    while wanted:
        value = wanted.pop()
        if value in seen:
            continue
        seen.add(value)
        state = by_inner.get(value)
        if state is not None and state not in live:
            live.add(state)
            wanted.append(state.next)
        node = value.producer()
        if node is not None:
            wanted.extend(reads(node))
    if len(live) == len(loop.states) and len(collected) == len(loop.collected):
        return None
    loop.states = [state for state in loop.states if state in live]
    loop.collected = collected
    if not loop.states and not loop.collected:
        loop.graph.remove(loop.node, safe=True)
        clear_body(loop)
        return None
    keep = [state.next for state in loop.states] + [item.inner for item in collected]
    if loop.goes_on is not None:
        keep.append(loop.goes_on)
    loop.body.outputs.clear()
    loop.body.outputs.extend(
        value for value in dict.fromkeys(keep) if (node := value.producer()) and node.graph is loop.body
    )
    prune(loop.body)
    read = [item for item in loop.read if item.inner.uses() or item.inner.is_graph_output()]
    loop.read = read or loop.read[:1]
    return loop.write(names)


def clear_body(loop: Recurrence) -> None:
    """Empty the body of a loop that is gone, so that it reads nothing any more."""
    loop.body.outputs.clear()
    prune(loop.body)


def read_shapes_outside(loop: Recurrence, names: Context, constants: Constants) -> int:
    """Take the shape of a state that keeps it from its first value; return how many shapes were read."""
    count = 0
    infer_inside(loop, constants)
    for state in loop.states:
        if state.first.shape is None or state.inner.shape is None:
            continue
        if list(state.first.shape) != list(state.inner.shape):
            continue
        emit = Emitter.in_place_of(names, loop.node, "loop")
        for node in [node for node, _ in state.inner.uses() if node.op_type == "Shape"]:
            limits = {
                key: node.attributes[key].as_int() for key in ("start", "end") if key in node.attributes
            }
            known = static_shape(state.first)
            if known is not None:
                shape = emit.ints(*known[slice(limits.get("start", 0), limits.get("end", len(known)))])
            else:
                (shape,) = emit.many("Shape", [state.first], 1, limits)
            loop.substitute(node.outputs[0], shape)
            count += 1
        loop.graph.insert_before(loop.node, emit.nodes)
    if count:
        prune(loop.body)
    return count
