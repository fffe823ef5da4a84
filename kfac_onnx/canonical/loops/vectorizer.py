"""Computing a value of a loop's body for all iterations at once, outside of the loop.

`Vectorizer.lane` follows the value back to scan inputs, the iteration number and outer values, by one rule
per operator, and emits outside what the body does to a single instance. What depends on a state that
the iterations change has no such form: the answer is then a `Miss` that says so. Nothing is edited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import FORWARD, REVERSE, Fixed, Lane, composed
from kfac_onnx.canonical.loops.orders import is_one
from kfac_onnx.canonical.loops.recurrence import reads
from kfac_onnx.canonical.loops.stacks import Stacks
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import ELEMENTWISE, LOOKUPS, RANDOM, VIEWS, Keeps, keeping
from kfac_onnx.graph.values import ONNX_DOMAINS, bodies_of, dtype_of, int_attribute, rank_of, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kfac_onnx.canonical.loops.lanes import Segments
    from kfac_onnx.canonical.loops.recurrence import Recurrence
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["LaneRule", "Vectorizer", "is_table"]

SAME_RANK = keeping(Keeps.ENTRIES, Keeps.SOME, Keeps.JOINS) | {"CumSum"}
CARRIED = "a state that the iterations change is needed for it"

LaneRule: TypeAlias = "Callable[[Vectorizer, ir.Node], Lane]"
"""Returns the lane of an operator's result over all iterations, emitting what computes it."""


class Vectorizer(Stacks):
    """Lanes of the values of one recurrence; what they need is collected in `emit.nodes`.

    `rules` (`rules.RULES`) say what an operator does to all instances at once, by its name.
    With `leaf`, values that no rule covers become results of the loop, and only the operators that `leaf`
    names are done outside to such a result.
    """

    def __init__(
        self,
        loop: Recurrence,
        names: Context,
        constants: Constants,
        rules: Mapping[str, LaneRule],
        leaf: frozenset[str] | None = None,
    ) -> None:
        super().__init__(loop, names, constants)
        self.rules = rules
        self.leaf = leaf
        self.segments: dict[tuple[ir.Value, ir.Value, ir.Value | None], Segments] = {}
        self.sums: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self.flat_bounds: dict[ir.Value, ir.Value] = {}
        self._lanes: dict[ir.Value, Lane] = {}
        self._masks: dict[ir.Graph, ir.Value] = {}
        self._hints: dict[ir.Value, int] = {}
        self._pure: Vectorizer | None = None
        if leaf is not None:
            self._pure = Vectorizer(loop, names, constants, rules)
            self._pure.emit, self._pure.ranks = self.emit, self.ranks

    def lane(self, value: ir.Value | None) -> Lane:
        """Return what a value of the body, or an outer value, is over all iterations."""
        if value is None:
            return Miss("an input is missing")
        if value not in self._lanes:
            self._lanes[value] = Miss(CARRIED)  # the answer while a circle of states is being walked
            self._lanes[value] = self._find(value)
        return self._lanes[value]

    def _find(self, value: ir.Value) -> Lane:
        if not self.is_inside(value):
            return self.fixed(value)
        known = self.array(value)
        if known is not None:
            return self.fixed(self.names.constant(known), known.ndim)
        node = value.producer()
        if self._pure is None or self.leaf is None:
            return self._given(value) if node is None else self._by_rule(node, value)
        found = self._pure.lane(value)
        if isinstance(found, Miss) and node is not None and node.op_type in self.leaf:
            found = self._by_rule(node, value)
        return self._result(value) if isinstance(found, Miss) else found

    def _result(self, value: ir.Value) -> Lane:
        """Return the lane of a value of the body as a new result of the loop."""
        rank = rank_of(value)
        rank = self._hints.get(value) if rank is None else rank
        node = value.producer()
        if rank is None:
            return Miss(f"the rank of '{value.name}' is not known")
        if node is not None and node.graph is not self.loop.body:
            return Miss(f"'{value.name}' is in a branch")
        return self.stacked(self.loop.result(value), rank)

    def hint(self, value: ir.Value, rank: int) -> None:
        """Say the rank of a value of the body, for where its own shape does not."""
        self._hints[value] = rank

    def _given(self, value: ir.Value) -> Lane:
        loop = self.loop
        if value is loop.number:
            return self.stacked(self.numbers(), 0, index=True)
        for item in loop.read:
            if item.inner is value:
                return self._slices(item.outer, item.axis, reverse=item.reverse)
        for state in loop.states:
            if state.inner is value:
                if unchanged(state.next) is value:
                    return self.lane(state.first)
                return self._counter(state.first, state.inner, state.next)
        if value.const_value is not None:
            return self.fixed(self.names.constant(value.const_value.numpy()))
        return Miss("it is an input of a nested graph")

    def _slices(self, outer: ir.Value, axis: int, *, reverse: bool) -> Lane:
        rank = self.rank(outer)
        if rank is None:
            return Miss(f"the rank of '{outer.name}' is not known")
        axis %= rank
        if axis != 0:
            perm = [axis, *(item for item in range(rank) if item != axis)]
            return self.stacked(
                self.emit.op("Transpose", outer, perm=perm), rank - 1, REVERSE if reverse else FORWARD
            )
        source, order = self.unpermuted(outer)
        total = composed(order, REVERSE) if reverse else order
        if total is None:
            source, total = outer, REVERSE
        return self.stacked(source, rank - 1, total)

    def _counter(self, first: ir.Value, inner: ir.Value, following: ir.Value) -> Lane:
        """Match a state i' = i + step, whose instance is first + step · number."""
        node = unchanged(following).producer()
        if node is None or node.op_type not in ("Add", "Sub") or node.graph is not self.loop.body:
            return Miss(CARRIED)
        left, right = node.inputs
        if right is not None and unchanged(right) is inner and node.op_type == "Add":
            left, right = right, left
        if left is None or unchanged(left) is not inner or right is None:
            return Miss(CARRIED)
        dtype = dtype_of(first) or dtype_of(right)
        step, rank = self.lane(right), self.rank(first)
        if not isinstance(step, Fixed) or step.rank is None or rank is None or step.rank > rank:
            return Miss(CARRIED)
        if dtype is None or not dtype.is_integer():
            return Miss(CARRIED)
        numbers = self.lifted(self.emit.cast(self.numbers(), dtype, ir.DataType.INT64), 0, rank)
        plain = self.array(first)
        counts = node.op_type == "Add" and plain is not None and not plain.any()
        if counts and is_one(self.array(step.value)):
            return self.stacked(numbers, rank, index=rank == 0 and dtype == ir.DataType.INT64)
        return self.stacked(self.emit.op(node.op_type, first, self.emit.op("Mul", numbers, step.value)), rank)

    def _by_rule(self, node: ir.Node, value: ir.Value) -> Lane:
        if node.domain not in ONNX_DOMAINS:
            return Miss(f"{node.domain}::{node.op_type} has no rule over all iterations")
        if node.op_type == "If" and not node.inputs:
            return Miss("an If lacks its condition")
        if node.op_type in RANDOM:
            return Miss(f"{node.op_type} draws numbers anew in every iteration")
        if not bodies_of(node):
            lanes = [self.lane(item) for item in node.inputs if item is not None]
            if all(isinstance(item, Fixed) for item in lanes):
                return self._alike(node, value)
        rule = self.rules.get(node.op_type)
        if rule is None:
            return self._why_not(node)
        return rule(self, node)

    def _why_not(self, node: ir.Node) -> Miss:
        for item in reads(node):
            lane = self.lane(item)
            if isinstance(lane, Miss):
                return lane
        return Miss(f"{node.op_type} has no rule over all iterations")

    def _alike(self, node: ir.Node, value: ir.Value) -> Lane:
        """Return the lane of what every iteration does alike; each reads the rows of a table anew."""
        if node.op_type not in LOOKUPS or not is_table(node.inputs[0], self):
            return self._copied(node, value)
        if self.mask_of(node) is not None:
            return Miss(f"a {node.op_type} in a branch that not every iteration takes")
        ids = self.lane(node.inputs[1])
        if node.op_type != "Gather" or not isinstance(ids, Fixed):
            return Miss(f"a {node.op_type} with the same ids in every iteration")
        copies = self.everywhere(ids)
        table = self.lane(node.inputs[0])
        axis = int_attribute(node, "axis", 0)
        if isinstance(copies, Miss) or not isinstance(table, Fixed) or axis != 0 or table.rank is None:
            return Miss("a Gather along another axis with the same ids in every iteration")
        rows = self.emit.op("Gather", table.value, copies.value, axis=0)
        return self.stacked(rows, copies.rank + table.rank - 1)

    def _copied(self, node: ir.Node, value: ir.Value) -> Lane:
        """Emit a node outside that every iteration does alike."""
        inputs: list[ir.Value | None] = []
        for item in node.inputs:
            lane = None if item is None else self.lane(item)
            inputs.append(lane.value if isinstance(lane, Fixed) else None)
        results = self.emit.many(node.op_type, inputs, len(node.outputs), node.attributes, node.domain)
        copy = results[0].producer()
        if copy is None:
            raise AssertionError("an emitted value has a producer")
        index = next(i for i, item in enumerate(node.outputs) if item is value)
        result = results[index]
        if value.type is not None:
            result.type = value.type
        rank = self._rank_of_copy(node, copy, value)
        return self.fixed(result, rank)

    def _rank_of_copy(self, node: ir.Node, copy: ir.Node, value: ir.Value) -> int | None:
        known = rank_of(value)
        if known is not None:
            return known
        ranks = [None if item is None else self.rank(item) for item in copy.inputs]
        match node.op_type:
            case "Shape" | "Range":
                return 1
            case "NonZero":
                return 2
            case "Size":
                return 0
            case "Unsqueeze" | "Squeeze":
                axes = self.array(copy.inputs[1]) if len(copy.inputs) > 1 else None
                if ranks[0] is None or axes is None:
                    return None
                return ranks[0] + (axes.size if node.op_type == "Unsqueeze" else -axes.size)
            case "Reshape" | "Expand":
                shape = copy.inputs[1]
                size = None if shape is None or shape.shape is None else shape.shape[0]
                return size if isinstance(size, int) else None
            case "Gather":
                if ranks[0] is None or ranks[1] is None:
                    return None
                return ranks[0] + ranks[1] - 1
            case op if op in ELEMENTWISE and all(item is not None for item in ranks):
                return max(item for item in ranks if item is not None)
            case op if op in SAME_RANK:
                return ranks[0]
            case _:
                return None

    def one_each(self, node: ir.Node, data: Fixed, starts: ir.Value) -> Lane | None:
        """Return the lane of data[i : i + 1], that is of Slices whose bounds are one apart."""
        first, last = (_affine(item, self) for item in node.inputs[1:3])
        if data.rank is None or first[0] is not last[0] or last[1] - first[1] != 1:
            return None
        entries = self.emit.op("Gather", data.value, starts, axis=0)
        return self.stacked(self.emit.op("Unsqueeze", entries, self.emit.ints(1)), data.rank)

    def mask_of(self, node: ir.Node) -> ir.Value | None:
        """Return bool[T]: the iterations in which a node of a branch runs; None for all."""
        graph = node.graph
        return self._masks.get(graph) if isinstance(graph, ir.Graph) else None

    def enter(self, graph: ir.Graph, mask: ir.Value) -> None:
        """Say in which iterations, bool[T], a branch runs."""
        self._masks[graph] = mask


def is_table(value: ir.Value | None, vec: Vectorizer) -> bool:
    """Say whether a value is a float matrix that the graph is given, or a view of one."""
    lane = vec.lane(value)
    if not isinstance(lane, Fixed) or lane.rank not in (1, 2):
        return False
    dtype = dtype_of(lane.value)
    if dtype is not None and not dtype.is_floating_point():
        return False
    root: ir.Value | None = lane.value
    while root is not None and (node := root.producer()) is not None:
        if node.op_type not in VIEWS | {"Slice", "Mul"}:  # also rows of it, and the whole table scaled
            return False
        root = node.inputs[0]
    return root is not None and (root.is_graph_input() or root.is_initializer())


def _affine(value: ir.Value | None, vec: Vectorizer) -> tuple[ir.Value | None, int]:
    """Return (x, n) such that an integer value is x + n."""
    offset = 0
    while value is not None and (node := unchanged(value).producer()) is not None:
        value = unchanged(value)
        if node.op_type not in ("Add", "Sub"):
            break
        left, right = node.inputs
        step = vec.array(right)
        if step is None and node.op_type == "Add":
            left, step = right, vec.array(left)
        if step is None or step.size != 1 or step.dtype.kind not in "iu":
            break
        number = int(step.reshape(()))
        offset += number if node.op_type == "Add" else -number
        value = left
    return (None if value is None else unchanged(value)), offset
