"""Stacks of the instances of all iterations: how many there are, in which order, and of which rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import (
    FORWARD,
    REVERSE,
    Fixed,
    Lane,
    Order,
    Stacked,
    composed,
    inverse,
)
from kfac_onnx.canonical.loops.orders import is_length, permutation
from kfac_onnx.graph.emit import Emitter, Miss
from kfac_onnx.graph.values import dtype_of, rank_of

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.recurrence import Recurrence
    from kfac_onnx.graph.constants import Constants
    from kfac_onnx.graph.context import Context

__all__ = ["Stacks"]

INT64_MIN = np.iinfo(np.int64).min


class Stacks:
    """Emits stacks of the instances of one loop's values, outside of it, into `emit.nodes`."""

    def __init__(self, loop: Recurrence, names: Context, constants: Constants) -> None:
        self.loop = loop
        self.names = names
        self.constants = constants
        self.emit = Emitter.in_place_of(names, loop.node, "loop")
        self.ranks: dict[ir.Value, int] = {}
        self._count: ir.Value | None = None
        self._inside = {loop.body, *loop.body.subgraphs()}

    def is_inside(self, value: ir.Value) -> bool:
        """Say whether a value belongs to the body or to a graph in it."""
        node = value.producer()
        if node is not None:
            return node.graph in self._inside
        return any(
            value in graph.inputs or graph.initializers.get(str(value.name)) is value
            for graph in self._inside
        )

    def rank(self, value: ir.Value) -> int | None:
        """Return the rank of an outer value."""
        found = self.ranks.get(value)
        return found if found is not None else rank_of(value)

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the contents of a constant outer value or value of the body."""
        return None if value is None else self.constants.constant(value)

    def fixed(self, value: ir.Value, rank: int | None = None) -> Fixed:
        """Return the lane of an outer value."""
        if rank is not None:
            self.ranks[value] = rank
        return Fixed(value, self.rank(value))

    def stacked(self, value: ir.Value, rank: int, order: Order = FORWARD, *, index: bool = False) -> Stacked:
        """Return the lane whose instances of this rank lie along axis 0 of `value`."""
        self.ranks[value] = rank + 1
        return Stacked(value, rank, order, index)

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

    def reads_all(self, value: ir.Value) -> bool:
        """Say whether an outer value is known to have one entry per iteration along axis 0."""
        length = None if not value.shape else value.shape[0]
        static = self.static_count()
        if static is not None or isinstance(length, int):
            return static is not None and length == static
        if not self.loop.is_scan:
            return self.loop.trip is not None and is_length(self.loop.trip, value, self.array)
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

    def unpermuted(self, value: ir.Value) -> tuple[ir.Value, Order]:
        """Return (x, order) such that entry t along axis 0 of `value` is entry order[t] of x."""
        order: Order = FORWARD
        while True:
            node = value.producer()
            if node is None or self.is_inside(value):
                return value, order
            source = node.inputs[0] if node.inputs else None
            step = permutation(node, self.array) if source is not None else None
            if node.op_type == "Identity" and source is not None:
                value = source
                continue
            total = None if step is None else composed(step, order)
            if total is None or source is None:
                return value, order
            value, order = source, total

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
        self.ranks[result] = wanted + 1
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
