"""Parts of the gradients of nested graphs: copies of a body, saved states, slices read by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.canonical.loops.recurrence import Recurrence, prune
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.values import all_graphs, dtype_of, int_attribute, unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.autodiff.backward import Backward

__all__ = ["BodyCopy", "Slices", "float_value", "read_by_number", "saved_states", "zeros_like"]


def float_value(value: ir.Value, like: ir.Value | None) -> bool:
    """Say whether a value is a tensor of floating-point numbers; where it does not say, `like` does."""
    dtype = dtype_of(value)
    if dtype is None and like is not None:
        dtype = dtype_of(like)
    return dtype is not None and dtype.is_floating_point()


def zeros_like(emit: Emitter, value: ir.Value) -> ir.Value:
    """Emit zeros of a value's shape and type."""
    return emit.zeros(emit.shape(value), dtype_of(value) or ir.DataType.FLOAT)


class BodyCopy:
    """A copy of a nested graph in which its nodes run again, to which their gradients are appended."""

    def __init__(self, body: ir.Graph, back: Backward) -> None:
        self.names = names = back.names
        self.emit = Emitter.in_place_of(names, back.node, "gradient/body")
        self._propagate = back.propagate
        self.graph = body.clone(allow_outer_scope_values=True)
        self._copies: dict[ir.Value, ir.Value] = {}
        self._pair(body, self.graph)
        for graph in all_graphs(self.graph):
            for value in graph.inputs:
                value.name = names.fresh(f"kfac/gradient/{value.name}")
            for name, value in list(graph.initializers.items()):
                del graph.initializers[name]
                value.name = names.fresh(f"kfac/gradient/{name}")
                graph.register_initializer(value)
            for item in graph:
                for value in item.outputs:
                    if value.name:
                        value.name = names.fresh(f"kfac/gradient/{value.name}")

    def _pair(self, old: ir.Graph, new: ir.Graph) -> None:
        self._copies.update(zip(old.inputs, new.inputs, strict=True))
        for one, other in zip(old, new, strict=True):
            self._copies.update(zip(one.outputs, other.outputs, strict=True))

    def of(self, value: ir.Value) -> ir.Value:
        """Return the copy of a value of the body; an outer value is itself."""
        return self._copies.get(value, value)

    def input(self, like: ir.Value) -> ir.Value:
        """Return a new value, to be an input of the copy, that is typed and shaped like another one."""
        value = ir.Value(name=self.names.fresh(f"kfac/gradient/{like.name}"))
        value.type, value.shape = like.type, like.shape
        if value.type is None and (dtype := dtype_of(like)) is not None:
            value.type = ir.TensorType(dtype)
        return value

    def replace(self, value: ir.Value, other: ir.Value) -> None:
        """Let the copy read another value in the place of one of its nodes' results, and drop that node."""
        node = self.of(value).producer()
        self.of(value).replace_all_uses_with(other)
        self._copies[value] = other
        if node is not None and not self.graph_output(node):
            prune(self.graph, [node])

    def graph_output(self, node: ir.Node) -> bool:
        """Say whether some result of a node is a result of the copy."""
        return any(value.is_graph_output() for value in node.outputs)

    def end(self, value: ir.Value) -> ir.Value:
        """Return a value of its own that is the copy of a result of the body."""
        source = self.of(value)
        node = ir.Node("", "Identity", [source], num_outputs=1)
        result = node.outputs[0]
        result.name = self.names.fresh(f"kfac/gradient/{value.name}/end")
        result.type, result.shape = source.type, source.shape
        self.graph.append(node)
        return result

    def propagate(
        self, seeds: Mapping[ir.Value, ir.Value], wrt: Sequence[ir.Value], missing: list[str]
    ) -> dict[ir.Value, ir.Value]:
        """Append the gradients' nodes to the copy; return the gradients that there are."""
        self.graph.outputs.clear()
        found, nodes = self._propagate(self.names, list(self.graph), seeds, wrt, missing)
        if not missing:
            self.graph.extend(nodes)
        inside = set(self._copies.values())
        for value, gradient in found.items():  # the name is for the whole gradient, outside of the body
            if value not in inside and gradient.name == f"{value.name}_grad":
                gradient.name = self.names.fresh(f"kfac/gradient/{value.name}/part")
                self.names.release(f"{value.name}_grad")
        return found

    def close(self, starts: Sequence[ir.Value], ends: Sequence[ir.Value]) -> ir.Graph:
        """Make the copy a graph with these inputs and outputs, without what they do not need."""
        self.graph.extend(self.emit.nodes)
        outputs: list[ir.Value] = []
        for value in ends:
            node = ir.Node("", "Identity", [value], num_outputs=1)
            result = node.outputs[0]
            result.name = self.names.fresh(f"{value.name}/out")
            result.type, result.shape = value.type, value.shape
            self.graph.append(node)
            outputs.append(result)
        self.graph.inputs.clear()
        self.graph.outputs.clear()
        self.graph.inputs.extend(starts)
        self.graph.outputs.extend(outputs)
        prune(self.graph)
        return self.graph


@dataclass(frozen=True)
class Slices:
    """An outer tensor that a Loop's body only reads entry by entry, `reads` by the iteration's number."""

    outer: ir.Value
    reads: tuple[ir.Node, ...]
    whole: bool
    """Whether it has exactly one entry per iteration, as far as is known."""


def read_by_number(loop: Recurrence, value: ir.Value) -> Slices | None:
    """Return how a body reads an outer value by the iteration's number; None if it also does otherwise."""
    if loop.number is None or value.shape is None:
        return None
    found: list[ir.Node] = []
    inside = {loop.body, *loop.body.subgraphs()}
    for node, index in value.uses():
        if node.graph not in inside:
            continue
        by_number = node.op_type == "Gather" and index == 0 and node.inputs[1] is loop.number
        if not by_number or node.graph is not loop.body or int_attribute(node, "axis", 0) != 0:
            return None
        found.append(node)
    if not found or value in loop.body.outputs:
        return None
    trip = ir.convenience.get_const_tensor(loop.trip) if loop.trip is not None else None
    length = value.shape[0] if len(value.shape) else None
    whole = trip is not None and isinstance(length, int) and int(trip.numpy().reshape(())) == length
    ends = None if loop.goes_on is None else unchanged(loop.goes_on)
    return Slices(value, tuple(found), whole and ends is loop.going)


def saved_states(back: Backward, loop: Recurrence) -> tuple[list[ir.Value], ir.Value]:
    """Return each state before each iteration, stacked along axis 0, and the number of iterations.

    The number is int64 of rank 0.
    """
    emit = back.emit
    stacks = [_known_stack(back, loop, index) for index in range(len(loop.states))]
    if any(stack is None for stack in stacks) or (not stacks and not loop.read and not loop.collected):
        return _run_again(back, loop, stacks)
    result = [stack for stack in stacks if stack is not None]
    return result, _count(emit, loop, result)


def _count(emit: Emitter, loop: Recurrence, stacks: Sequence[ir.Value]) -> ir.Value:
    if loop.read:
        return emit.entry(emit.op("Shape", loop.read[0].outer), loop.read[0].axis)
    if loop.collected:
        return emit.entry(emit.op("Shape", loop.collected[0].outer), loop.collected[0].axis)
    return emit.entry(emit.op("Shape", stacks[0]), 0)


def _known_stack(back: Backward, loop: Recurrence, index: int) -> ir.Value | None:
    """Return a state's stack from a result of the node that is the stack of its next values."""
    state, emit = loop.states[index], back.emit
    for item in loop.collected:
        if item.axis == 0 and not item.reverse and unchanged(item.inner) is unchanged(state.next):
            one = emit.op("Unsqueeze", state.first, emit.ints(0))
            return emit.op("Concat", one, emit.part(item.outer, 0, -1), axis=0)
    return None


def _run_again(
    back: Backward, loop: Recurrence, known: Sequence[ir.Value | None]
) -> tuple[list[ir.Value], ir.Value]:
    """Emit the node once more, with its states as further results."""
    copy = BodyCopy(loop.body, back)
    emit = back.emit
    wanted = [index for index, stack in enumerate(known) if stack is None]
    starts = list(copy.graph.inputs)
    ends = [copy.of(state.next) for state in loop.states]
    stacked = [copy.of(loop.states[index].inner) for index in wanted]
    attributes: dict[str, ir.Graph | int | Sequence[int]] = {}
    inputs = list(back.node.inputs)
    if loop.goes_on is not None:
        ends.insert(0, copy.of(loop.goes_on))
    attributes["body"] = copy.close(starts, [*ends, *stacked])
    if loop.is_scan:
        attributes["num_scan_inputs"] = len(loop.read)
        attributes["scan_input_axes"] = [item.axis for item in loop.read]
        attributes["scan_input_directions"] = [int(item.reverse) for item in loop.read]
    outputs = emit.many(back.node.op_type, inputs, len(loop.states) + len(wanted), attributes)
    result = list(known)
    for index, stack in zip(wanted, outputs[len(loop.states) :], strict=True):
        state = loop.states[index]
        dtype, shape = dtype_of(state.first), state.first.shape
        if dtype is not None and shape is not None:
            stack.type, stack.shape = ir.TensorType(dtype), ir.Shape([None, *shape])
        result[index] = stack
    stacks = [stack for stack in result if stack is not None]
    return stacks, _count(emit, loop, stacks)
