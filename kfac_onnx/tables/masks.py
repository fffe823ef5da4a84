"""Rows that a graph drops between dL/d(rows) and the table by their ids alone: padding, and invalid ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.graph.operators import COMPARISONS
from kfac_onnx.tables.lookups import RESHAPES

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = ["DropMask", "drop_mask"]


@dataclass(frozen=True)
class DropMask:
    """Rows that the graph drops between dL/d(rows) and the table: `condition` is true (or false) there."""

    condition: ir.Value
    drops_where: bool
    padding_idx: int | None
    drops_negatives: bool
    exact: bool
    """True if every part of the condition was understood: valid ids are dropped at `padding_idx` only."""


def drop_mask(updates: ir.Value, facts: Facts) -> DropMask | None:
    """Find the `Where` next to the scatter that zeroes rows by their ids alone.

    A `Where` whose condition the loss also uses is the user's own masking after the lookup: such a row
    is a lookup whose gradient happens to be zero, and it counts. Where only parts of the condition are the
    loss's (a user's mask `ids != 0` and the exporter's test for padding are one node), it is the exporter's.
    """
    value: ir.Value | None = updates
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Where":
            break
        if node.op_type not in RESHAPES and node.op_type != "Transpose":
            return None
        value = node.inputs[0]
    else:
        return None
    condition, yes, no = node.inputs
    drops_where = facts.is_zeros(yes)
    if condition is None or not (drops_where or facts.is_zeros(no)):
        return None
    parts = _Parts(facts)
    parts.collect(condition, inside=not drops_where)
    if (parts.shared and not parts.own) or not parts.by_ids_alone:
        return None
    return DropMask(condition, drops_where, parts.padding_idx, parts.drops_negatives, parts.exact)


class _Parts:
    """The comparisons that a keep condition is made of."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.shared = False
        """Whether the loss compares some of it too."""
        self.own = False
        """Whether something is compared that the loss does not compare."""
        self.by_ids_alone = True
        self.exact = True
        self.padding_idx: int | None = None
        self.drops_negatives = False

    def collect(self, value: ir.Value | None, *, inside: bool) -> None:
        """Walk a condition; `inside` says that rows are kept where it is true."""
        if value is None:
            return
        if self.facts.constant(value) is not None:
            self.exact = self.exact and bool(np.all(self.facts.constant(value)) == inside)
            return
        node = value.producer()
        if node is None or value in self.facts.trained:
            self.by_ids_alone = False
            return
        match node.op_type:
            case "Not":
                self.collect(node.inputs[0], inside=not inside)
            case "And" if inside:
                for item in node.inputs:
                    self.collect(item, inside=inside)
            case "Or" if not inside:
                for item in node.inputs:
                    self.collect(item, inside=inside)
            case op if op in RESHAPES:
                self.collect(node.inputs[0], inside=inside)
            case op if op in COMPARISONS:
                self._leaf(value)
                self._compare(node, inside=inside)
            case _:
                self._leaf(value)
                self.exact = False
                self.by_ids_alone = self.by_ids_alone and self._integers_only(value)

    def _leaf(self, value: ir.Value) -> None:
        self.shared = self.shared or value in self.facts.forward
        self.own = self.own or value not in self.facts.forward

    def _compare(self, node: ir.Node, *, inside: bool) -> None:
        ids, bound = node.inputs[0], self.facts.scalar(node.inputs[1])
        if bound is None or ids is None or ids.dtype is None or not ids.dtype.is_integer():
            self.exact = False
            self.by_ids_alone = ids is not None and ids.dtype is not None and ids.dtype.is_integer()
            return
        match node.op_type, inside:
            case "Equal", False:
                if bound >= 0:
                    self.padding_idx = int(bound)
            case "GreaterOrEqual", True if bound == 0:
                self.drops_negatives = True
            case "Less", False if bound == 0:
                self.drops_negatives = True
            case ("Less", True) | ("GreaterOrEqual", False):
                pass  # the upper bound: valid ids are below it
            case _:
                self.exact = False

    def _integers_only(self, value: ir.Value) -> bool:
        node = value.producer()
        inputs = [] if node is None else [item for item in node.inputs if item is not None]
        return all(item.dtype is not None and not item.dtype.is_floating_point() for item in inputs)
