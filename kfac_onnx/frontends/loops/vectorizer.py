"""Computing a value of a loop's body for all iterations at once, outside of the loop.

`Vectorizer.lane` follows the value back to scan inputs, the iteration number and outer values, by one rule
per operator, and emits outside what the body does to a single instance. What depends on a state that
the iterations change has no such form: the answer is then a `Miss` that says so. Nothing is edited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.frontends.loops.lanes import (
    FORWARD,
    REVERSE,
    Fixed,
    Lane,
    Order,
    Stacked,
    composed,
    inverse,
    named_order,
)
from kfac_onnx.frontends.loops.recurrence import reads, subgraphs
from kfac_onnx.frontends.lowering.emit import Emit, Miss, Names
from kfac_onnx.frontends.values import ONNX_DOMAINS, constant, dtype_of, int_attribute, rank_of, static_shape

if TYPE_CHECKING:
    from kfac_onnx.frontends.constants import Constants
    from kfac_onnx.frontends.loops.lanes import Segments
    from kfac_onnx.frontends.loops.recurrence import Recurrence

__all__ = ["ELEMENTWISE", "INT64_MIN", "Vectorizer", "is_table", "unchanged"]

INT64_MIN = np.iinfo(np.int64).min
RANDOM = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Dropout",
    }
)
CARRIED = "a state that the iterations change is needed for it"


class Vectorizer:
    """Lanes of the values of one recurrence; what they need is collected in `emit.nodes`.

    With `leaf`, values that no rule covers become results of the loop, and only the operators that `leaf`
    names are done outside to such a result.
    """

    def __init__(
        self,
        loop: Recurrence,
        names: Names,
        constants: Constants,
        leaf: frozenset[str] | None = None,
    ) -> None:
        self.loop = loop
        self.names = names
        self.constants = constants
        self.leaf = leaf
        self.emit = Emit(names, loop.node, "loop")
        self.segments: dict[tuple[ir.Value, ir.Value, ir.Value | None], Segments] = {}
        self.sums: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self.flat_bounds: dict[ir.Value, ir.Value] = {}
        self._lanes: dict[ir.Value, Lane] = {}
        self._ranks: dict[ir.Value, int] = {}
        self._masks: dict[ir.Graph, ir.Value] = {}
        self._count: ir.Value | None = None
        self._inside = _graphs_of(loop.body)
        self._hints: dict[ir.Value, int] = {}
        self._pure: Vectorizer | None = None
        if leaf is not None:
            self._pure = Vectorizer(loop, names, constants)
            self._pure.emit, self._pure._ranks = self.emit, self._ranks

    # What is known of outer values.

    def rank(self, value: ir.Value) -> int | None:
        """Return the rank of an outer value."""
        found = self._ranks.get(value)
        return found if found is not None else rank_of(value)

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the contents of a constant outer value or value of the body."""
        return None if value is None else self.constants.constant(value)

    def fixed(self, value: ir.Value, rank: int | None = None) -> Fixed:
        """Return the lane of an outer value."""
        if rank is not None:
            self._ranks[value] = rank
        return Fixed(value, self.rank(value))

    def stacked(self, value: ir.Value, rank: int, order: Order = FORWARD, *, index: bool = False) -> Stacked:
        """Return the lane whose instances of this rank lie along axis 0 of `value`."""
        self._ranks[value] = rank + 1
        return Stacked(value, rank, order, index)

    # The number of iterations.

    def static_count(self) -> int | None:
        """Return the number of iterations where the graph says it."""
        if self.loop.is_scan:
            item = self.loop.read[0]
            dim = None if item.outer.shape is None else item.outer.shape[item.axis]
            return dim if isinstance(dim, int) else None
        found = self.array(self.loop.trip)
        return None if found is None or found.size != 1 else max(int(found.reshape(())), 0)

    def count(self) -> ir.Value:
        """Return the number of iterations as int64 of rank 0."""
        if self._count is None:
            static = self.static_count()
            if static is not None:
                self._count = self.names.constant(np.array(static, np.int64))
            elif self.loop.is_scan:
                item = self.loop.read[0]
                self._count = self.emit.entry(self.emit.op("Shape", item.outer), item.axis)
            else:
                if self.loop.trip is None:
                    raise AssertionError("a loop without a trip count is not vectorized")
                self._count = self.emit.op("Reshape", self.loop.trip, self._nothing())
        return self._count

    def counts(self) -> ir.Value:
        """Return the number of iterations as int64[1]."""
        static = self.static_count()
        return (
            self.emit.ints(static)
            if static is not None
            else self.emit.op("Reshape", self.count(), self.emit.ints(-1))
        )

    def numbers(self) -> ir.Value:
        """Return the iteration numbers, int64[T]."""
        static = self.static_count()
        if static is not None:
            return self.names.constant(np.arange(static, dtype=np.int64))
        zero, one = (self.names.constant(np.array(item, np.int64)) for item in (0, 1))
        return self.emit.op("Range", zero, self.count(), one)

    def _nothing(self) -> ir.Value:
        return self.names.constant(np.zeros(0, np.int64))

    # Lanes.

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

    def is_inside(self, value: ir.Value) -> bool:
        """Say whether a value belongs to the body or to a graph in it."""
        node = value.producer()
        if node is not None:
            return node.graph in self._inside
        return any(
            value in graph.inputs or graph.initializers.get(str(value.name)) is value
            for graph in self._inside
        )

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
        if counts and _is_one(self.array(step.value)):
            return self.stacked(numbers, rank, index=rank == 0 and dtype == ir.DataType.INT64)
        return self.stacked(self.emit.op(node.op_type, first, self.emit.op("Mul", numbers, step.value)), rank)

    def _by_rule(self, node: ir.Node, value: ir.Value) -> Lane:
        from kfac_onnx.frontends.loops.rules import RULES

        if node.domain not in ONNX_DOMAINS:
            return Miss(f"{node.domain}::{node.op_type} has no rule over all iterations")
        if node.op_type == "If" and not node.inputs:
            return Miss("an If lacks its condition")
        if node.op_type in RANDOM:
            return Miss(f"{node.op_type} draws numbers anew in every iteration")
        if not subgraphs(node):
            lanes = [self.lane(item) for item in node.inputs if item is not None]
            if all(isinstance(item, Fixed) for item in lanes):
                return self._alike(node, value)
        rule = RULES.get(node.op_type)
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
        results = self.emit.many(node.op_type, inputs, len(node.outputs), None, node.domain)
        copy = results[0].producer()
        if copy is None:
            raise AssertionError("an emitted value has a producer")
        for attr in node.attributes.values():
            copy.attributes.add(attr)
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
            case "Shape" | "NonZero" | "Range":
                return 1 if node.op_type != "NonZero" else 2
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
            case "Slice" | "Transpose" | "Concat" | "CumSum":
                return ranks[0]
            case _:
                return None

    # Helpers of rules.

    def reads_all(self, value: ir.Value) -> bool:
        """Say whether an outer value is known to have one entry per iteration along axis 0."""
        length = None if not value.shape else value.shape[0]
        static = self.static_count()
        if static is not None or isinstance(length, int):
            return static is not None and length == static
        if not self.loop.is_scan:
            return self.loop.trip is not None and _is_length(self.loop.trip, value, minus_one=False)
        item = self.loop.read[0]
        if item.outer is value:
            return item.axis == 0
        other = None if item.outer.shape is None else item.outer.shape[item.axis]
        names = [dim.value for dim in (length, other) if isinstance(dim, ir.SymbolicDim)]
        return len(names) == 2 and names[0] is not None and names[0] == names[1]

    def describe(self, value: ir.Value, like: ir.Value, count: int | None) -> None:
        """Say of an emitted value that it has `count` entries (any number if None) like those of another."""
        dtype = dtype_of(like)
        if like.shape is None or dtype is None:
            return
        value.shape = ir.Shape([count, *list(like.shape)[1:]])
        value.type = ir.TensorType(dtype)

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

    def unpermuted(self, value: ir.Value) -> tuple[ir.Value, Order]:
        """Return (x, order) such that entry t along axis 0 of `value` is entry order[t] of x."""
        order: Order = FORWARD
        while True:
            node = value.producer()
            if node is None or self.is_inside(value):
                return value, order
            source = node.inputs[0] if node.inputs else None
            step = self._permutation(node) if source is not None else None
            if node.op_type == "Identity" and source is not None:
                value = source
                continue
            total = None if step is None else composed(step, order)
            if total is None or source is None:
                return value, order
            value, order = source, total

    def _permutation(self, node: ir.Node) -> Order | None:
        """Return the order of a node that only puts the entries of axis 0 in another one."""
        source = node.inputs[0]
        length = None if source is None or not source.shape else source.shape[0]
        if node.op_type == "Gather" and int_attribute(node, "axis", 0) == 0:
            places = self.array(node.inputs[1])
            if places is None or places.ndim != 1:
                return REVERSE if _is_reversed_range(node, self) else None
            if not isinstance(length, int) or len(places) != length:
                return None
            return named_order([int(item) for item in places % length])
        if node.op_type == "Slice" and len(node.inputs) == 5:
            starts, ends, axes, steps = (self.array(item) for item in node.inputs[1:])
            if any(item is None or item.size != 1 for item in (starts, ends, axes, steps)):
                return None
            numbers = [int(item.reshape(())) for item in (starts, ends, axes, steps) if item is not None]
            far = -(1 << 30) if not isinstance(length, int) else -length - 1
            return REVERSE if numbers[0] == -1 and numbers[1] <= far and numbers[2:] == [0, -1] else None
        return None

    def aligned(self, lane: Stacked) -> Stacked:
        """Return a stack whose entries are in the order of the iterations."""
        if lane.order == FORWARD:
            return lane
        return self.stacked(self.reordered(lane.value, lane.order), lane.rank)

    def reordered(self, value: ir.Value, order: Order) -> ir.Value:
        """Return a tensor whose entry t along axis 0 is entry order[t] of `value`."""
        if order == FORWARD:
            return value
        if order == REVERSE:
            emit = self.emit
            return emit.op("Slice", value, emit.ints(-1), emit.ints(INT64_MIN), emit.ints(0), emit.ints(-1))
        return self.emit.op("Gather", value, self.emit.ints(*order), axis=0)

    def in_order(self, lane: Stacked, order: Order) -> ir.Value:
        """Return the stack such that iteration t has its entry order[t]."""
        total = composed(lane.order, inverse(order))
        if total is None:
            raise AssertionError("orders of one loop have one length")
        return self.reordered(lane.value, total)

    def lifted(self, value: ir.Value, rank: int, wanted: int) -> ir.Value:
        """Return a stack whose instances of `rank` have got leading axes of size 1, up to `wanted`."""
        if rank >= wanted:
            return value
        result = self.emit.op("Unsqueeze", value, self.emit.ints(*range(1, wanted - rank + 1)))
        self._ranks[result] = wanted + 1
        return result

    def everywhere(self, lane: Fixed) -> Stacked | Miss:
        """Return a value that all iterations share as a stack of copies."""
        if lane.rank is None:
            return Miss(f"the rank of '{lane.value.name}' is not known")
        emit = self.emit
        one = emit.op("Unsqueeze", lane.value, emit.ints(0))
        shape = emit.concat(self.counts(), emit.ints(*(1,) * lane.rank)) if lane.rank else self.counts()
        return self.stacked(emit.op("Expand", one, shape), lane.rank)

    def as_stack(self, lane: Lane) -> Stacked | Miss:
        """Return a lane as a stack in the order of the iterations."""
        if isinstance(lane, Fixed):
            return self.everywhere(lane)
        if isinstance(lane, Stacked):
            return self.aligned(lane)
        return lane if isinstance(lane, Miss) else Miss("its instances have different lengths")


ELEMENTWISE = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Div",
        "Equal",
        "Exp",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "Where",
        "Xor",
        "IsNaN",
    }
)
"""Operators of one result whose entries depend on the operands' entries at the same place, broadcast."""


LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
VIEWS = frozenset(
    {"Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Mul"}
)


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
        if node.op_type not in VIEWS:
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


def unchanged(value: ir.Value) -> ir.Value:
    """Return the value that Identity, a Cast to its own type, or an Expand to its own shape passes on."""
    while (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if source is None or node.domain not in ONNX_DOMAINS:
            return value
        if node.op_type == "Cast":
            dtype = dtype_of(source)
            if dtype is None or int(dtype) != node.attributes["to"].as_int():
                return value
        elif node.op_type == "Expand":
            if static_shape(source) is None or static_shape(source) != static_shape(value):
                return value
        elif node.op_type != "Identity":
            return value
        value = source
    return value


def _graphs_of(graph: ir.Graph) -> set[ir.Graph]:
    return {graph, *graph.subgraphs()}


def _is_one(array: np.ndarray | None) -> bool:
    return array is not None and array.size == 1 and array.reshape(()) == 1


def _is_reversed_range(node: ir.Node, vectorizer: Vectorizer) -> bool:
    """Match x[(n − 1) − Range(0, n)] with n = Shape(x)[0], in this form or as Range(n − 1, −1, −1)."""
    source, index = node.inputs[:2]
    maker = None if index is None else unchanged(index).producer()
    if maker is None or source is None:
        return False
    if maker.op_type == "Range":
        start, limit, step = maker.inputs
        going_down = constant(limit), constant(step)
        down = all(item is not None and int(item.reshape(())) == -1 for item in going_down)
        return down and _is_length(start, source, minus_one=True)
    if maker.op_type != "Sub":
        return False
    last, counted = maker.inputs
    line = None if counted is None else unchanged(counted).producer()
    if line is None or line.op_type != "Range" or not _is_length(last, source, minus_one=True):
        return False
    zero, one = vectorizer.array(line.inputs[0]), vectorizer.array(line.inputs[2])
    from_zero = zero is not None and int(zero.reshape(())) == 0
    return from_zero and _is_one(one) and _is_length(line.inputs[1], source, minus_one=False)


def _is_length(value: ir.Value | None, source: ir.Value, *, minus_one: bool) -> bool:
    """Say whether a value is Shape(source)[0], less one if `minus_one`."""
    node = None if value is None else unchanged(value).producer()
    if minus_one:
        if node is None or node.op_type not in ("Sub", "Add"):
            return False
        other = constant(node.inputs[1])
        wanted = 1 if node.op_type == "Sub" else -1
        if other is None or other.size != 1 or int(other.reshape(())) != wanted:
            return False
        return _is_length(node.inputs[0], source, minus_one=False)
    while node is not None and node.op_type in ("Squeeze", "Reshape", "Cast"):
        value = node.inputs[0]
        node = None if value is None else unchanged(value).producer()
    if node is None:
        return False
    if node.op_type in ("Gather", "Slice"):
        place = constant(node.inputs[1])
        if place is None or place.size != 1 or int(place.reshape(())) != 0:
            return False
        shape = node.inputs[0]
        node = None if shape is None else unchanged(shape).producer()
    elif int_attribute(node, "end", 0) != 1:
        return False
    return node is not None and node.op_type == "Shape" and node.inputs[0] is source
