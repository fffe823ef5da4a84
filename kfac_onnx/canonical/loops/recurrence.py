"""A Loop or Scan node taken apart: what goes from iteration to iteration, what is read, what is collected.

`Recurrence.read` takes a node apart, its lists may then be edited, and `write` puts a node of the new lists
in the old one's place. Values of the body keep their identity, results of the node are new values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.values import ONNX_DOMAINS, bodies_of, int_attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kfac_onnx.graph.context import Context

__all__ = ["Collected", "Read", "Recurrence", "State", "captured", "prune", "reads"]


@dataclass(eq=False)
class State:
    """A value that is carried: `first` before the loop, `inner` in the body, `next` after it, `final`."""

    first: ir.Value
    inner: ir.Value
    next: ir.Value
    final: ir.Value


@dataclass(eq=False)
class Read:
    """A tensor of which each iteration of a Scan reads one slice along `axis`, backwards if `reverse`."""

    outer: ir.Value
    inner: ir.Value
    axis: int = 0
    reverse: bool = False


@dataclass(eq=False)
class Collected:
    """A value of the body whose instances the node stacks along `axis`, backwards if `reverse`."""

    inner: ir.Value
    outer: ir.Value
    axis: int = 0
    reverse: bool = False


@dataclass(eq=False)
class Recurrence:
    """A Loop (`trip`, `condition`, `number`, `going`, `goes_on`) or a Scan (`read`)."""

    node: ir.Node
    body: ir.Graph
    states: list[State]
    collected: list[Collected]
    read: list[Read] = field(default_factory=list[Read])
    trip: ir.Value | None = None
    condition: ir.Value | None = None
    number: ir.Value | None = None
    going: ir.Value | None = None
    goes_on: ir.Value | None = None

    @property
    def is_scan(self) -> bool:
        """Say whether it is a Scan."""
        return self.node.op_type == "Scan"

    @property
    def graph(self) -> ir.Graph:
        """The graph that the node is in."""
        graph = self.node.graph
        if not isinstance(graph, ir.Graph):
            raise AssertionError("a recurrence is read from a node of a graph")
        return graph

    @classmethod
    def of(cls, node: ir.Node) -> Recurrence | None:
        """Take a node apart; None for every other node, and for a Scan or Loop that is malformed."""
        if node.domain not in ONNX_DOMAINS or node.op_type not in ("Loop", "Scan"):
            return None
        attr = node.attributes.get("body")
        if attr is None:
            return None
        return _loop(node, attr.as_graph()) if node.op_type == "Loop" else _scan(node, attr.as_graph())

    def substitute(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of a value of the body read another one, the next state and stacks too."""
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        for state in self.states:
            state.next = new if state.next is old else state.next
        for item in self.collected:
            item.inner = new if item.inner is old else item.inner
        self.goes_on = new if self.goes_on is old else self.goes_on

    def result(self, inner: ir.Value, *, reverse: bool = False) -> ir.Value:
        """Collect a value of the body; return the stack of its instances (usable after `write`)."""
        for item in self.collected:
            if item.inner is inner and item.axis == 0 and item.reverse == reverse:
                return item.outer
        item = Collected(inner, ir.Value(), reverse=reverse)
        self.collected.append(item)
        return item.outer

    def write(self, names: Context) -> Recurrence:
        """Put a node of these lists in the old one's place and return it taken apart anew.

        Results keep their names and readers; the body's outputs are made distinct values.
        """
        old, graph = self.node, self.graph
        ends = [state.next for state in self.states] + [item.inner for item in self.collected]
        if self.goes_on is not None:
            ends.insert(0, self.goes_on)
        starts = [state.inner for state in self.states] + [item.inner for item in self.read]
        if not self.is_scan and self.number is not None and self.going is not None:
            starts = [self.number, self.going, *starts]
        _set_interface(self.body, starts, ends, names)
        attributes: list[ir.Attr] = [ir.AttrGraph("body", self.body)]
        if self.is_scan:
            attributes += _scan_attributes(self.read, self.collected)
            inputs = [state.first for state in self.states] + [item.outer for item in self.read]
        else:
            inputs = [self.trip, self.condition, *(state.first for state in self.states)]
        results = [state.final for state in self.states] + [item.outer for item in self.collected]
        outputs = [ir.Value(name=item.name or names.fresh("kfac/loop/collected")) for item in results]
        for new, item in zip(outputs, results, strict=True):
            new.type, new.shape = item.type, item.shape
        node = ir.Node(
            "",
            old.op_type,
            inputs,
            attributes=attributes,
            outputs=outputs,
            name=old.name,
            metadata_props=dict(old.metadata_props),
        )
        graph.insert_before(old, node)
        for item, new in zip(results, outputs, strict=True):
            item.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(old, safe=True)
        written = Recurrence.of(node)
        if written is None:
            raise AssertionError("a recurrence that was written can be read")
        return written


def _set_interface(body: ir.Graph, starts: list[ir.Value], ends: list[ir.Value], names: Context) -> None:
    body.outputs.clear()
    body.inputs.clear()
    body.inputs.extend(starts)
    seen: set[ir.Value] = set()
    for value in ends:
        end = value
        producer = value.producer()
        if value in seen or producer is None or producer.graph is not body:  # an output is made in the body
            copy = ir.Node("", "Identity", [value], num_outputs=1)
            end = copy.outputs[0]
            end.name = names.fresh(f"kfac/loop/{value.name}")
            end.type, end.shape = value.type, value.shape
            body.append(copy)
        seen.add(end)
        body.outputs.append(end)


def _scan_attributes(read: list[Read], collected: list[Collected]) -> list[ir.Attr]:
    return [
        ir.AttrInt64("num_scan_inputs", len(read)),
        ir.AttrInt64s("scan_input_axes", [item.axis for item in read]),
        ir.AttrInt64s("scan_input_directions", [int(item.reverse) for item in read]),
        ir.AttrInt64s("scan_output_axes", [item.axis for item in collected]),
        ir.AttrInt64s("scan_output_directions", [int(item.reverse) for item in collected]),
    ]


def _loop(node: ir.Node, body: ir.Graph) -> Recurrence | None:
    count = len(node.inputs) - 2
    starts, ends = list(body.inputs), list(body.outputs)
    firsts = [value for value in node.inputs[2:] if value is not None]
    if count < 0 or len(firsts) != count or len(starts) != count + 2 or len(ends) < count + 1:
        return None
    if len(node.outputs) != len(ends) - 1:
        return None
    states = [State(firsts[i], starts[i + 2], ends[i + 1], node.outputs[i]) for i in range(count)]
    collected = [Collected(ends[i + 1], node.outputs[i]) for i in range(count, len(ends) - 1)]
    return Recurrence(
        node,
        body,
        states,
        collected,
        trip=node.inputs[0],
        condition=node.inputs[1],
        number=starts[0],
        going=starts[1],
        goes_on=ends[0],
    )


def _scan(node: ir.Node, body: ir.Graph) -> Recurrence | None:
    scanned = int_attribute(node, "num_scan_inputs", 0)
    count = len(node.inputs) - scanned
    starts, ends = list(body.inputs), list(body.outputs)
    outers = [value for value in node.inputs if value is not None]
    if scanned < 1 or count < 0 or len(outers) != len(node.inputs) or len(starts) != len(outers):
        return None
    if len(ends) < count or len(node.outputs) != len(ends):
        return None
    stacked = len(ends) - count
    states = [State(outers[i], starts[i], ends[i], node.outputs[i]) for i in range(count)]
    axes = _numbers(node, "scan_input_axes", scanned)
    backwards = _numbers(node, "scan_input_directions", scanned)
    out_axes = _numbers(node, "scan_output_axes", stacked)
    out_backwards = _numbers(node, "scan_output_directions", stacked)
    read = [Read(outers[count + i], starts[count + i], axes[i], bool(backwards[i])) for i in range(scanned)]
    collected = [
        Collected(ends[count + i], node.outputs[count + i], out_axes[i], bool(out_backwards[i]))
        for i in range(stacked)
    ]
    return Recurrence(node, body, states, collected, read)


def _numbers(node: ir.Node, name: str, count: int) -> list[int]:
    found = node.attributes.get(name)
    return [0] * count if found is None else list(found.as_ints())


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield every value that a node reads, also those that its subgraphs take from around them."""
    for value in node.inputs:
        if value is not None:
            yield value
    for graph in bodies_of(node):
        yield from captured(graph)


def captured(graph: ir.Graph) -> list[ir.Value]:
    """Return the values of outer graphs that a graph and the graphs in it read."""
    own = set(graph.inputs) | set(graph.initializers.values())
    found: dict[ir.Value, None] = {}
    for node in graph:
        own.update(node.outputs)
    for node in graph:
        for value in reads(node):
            if value not in own:
                found[value] = None
    for value in graph.outputs:
        if value not in own:
            found[value] = None
    return list(found)


def prune(graph: ir.Graph, nodes: Iterable[ir.Node] | None = None) -> int:
    """Remove nodes of a graph (of `nodes` if given) whose results nobody reads; return how many."""
    chosen = list(graph) if nodes is None else [node for node in nodes if node.graph is graph]
    removed = 0
    for node in reversed(chosen):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            for inner in bodies_of(node):
                _clear(inner)
            graph.remove(node, safe=True)
            removed += 1
    return removed


def _clear(graph: ir.Graph) -> None:
    """Empty a graph that is dropped, so that it no longer counts as a reader of outer values."""
    graph.outputs.clear()
    for node in reversed(list(graph)):
        for inner in bodies_of(node):
            _clear(inner)
        graph.remove(node, safe=True)
