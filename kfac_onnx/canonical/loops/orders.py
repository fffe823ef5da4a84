"""Nodes that only put the entries of a tensor along axis 0 in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.loops.lanes import REVERSE, named_order
from kfac_onnx.graph.operators import ORDERED_VIEWS
from kfac_onnx.graph.values import int_attribute, unchanged

if TYPE_CHECKING:
    from kfac_onnx.canonical.loops.lanes import Order

__all__ = ["is_length", "is_one", "permutation"]

Known: TypeAlias = Callable[[ir.Value | None], np.ndarray | None]
"""Returns the contents of a constant, None for every other value."""


def permutation(node: ir.Node, known: Known) -> Order | None:
    """Return the order of a node that only puts the entries of axis 0 in another one."""
    source = node.inputs[0]
    length = None if source is None or not source.shape else source.shape[0]
    if node.op_type == "Gather" and int_attribute(node, "axis", 0) == 0:
        places = known(node.inputs[1])
        if places is None or places.ndim != 1:
            return REVERSE if _is_reversed_range(node, known) else None
        if not isinstance(length, int) or len(places) != length:
            return None
        return named_order([int(item) for item in places % length])
    if node.op_type == "Slice" and len(node.inputs) == 5:
        starts, ends, axes, steps = (known(item) for item in node.inputs[1:])
        if any(item is None or item.size != 1 for item in (starts, ends, axes, steps)):
            return None
        numbers = [int(item.reshape(())) for item in (starts, ends, axes, steps) if item is not None]
        far = -(1 << 30) if not isinstance(length, int) else -length - 1
        return REVERSE if numbers[0] == -1 and numbers[1] <= far and numbers[2:] == [0, -1] else None
    return None


def is_one(array: np.ndarray | None) -> bool:
    """Say whether an array holds the number 1 alone."""
    return array is not None and array.size == 1 and array.reshape(()) == 1


def _is_reversed_range(node: ir.Node, known: Known) -> bool:
    """Match x[(n − 1) − Range(0, n)] with n = Shape(x)[0], in this form or as Range(n − 1, −1, −1)."""
    source, index = node.inputs[:2]
    maker = None if index is None else unchanged(index).producer()
    if maker is None or source is None:
        return False
    if maker.op_type == "Range":
        start, limit, step = maker.inputs
        going_down = known(limit), known(step)
        down = all(item is not None and int(item.reshape(())) == -1 for item in going_down)
        return down and is_length(start, source, known, minus_one=True)
    if maker.op_type != "Sub":
        return False
    last, counted = maker.inputs
    line = None if counted is None else unchanged(counted).producer()
    if line is None or line.op_type != "Range" or not is_length(last, source, known, minus_one=True):
        return False
    zero, one = known(line.inputs[0]), known(line.inputs[2])
    from_zero = zero is not None and int(zero.reshape(())) == 0
    return from_zero and is_one(one) and is_length(line.inputs[1], source, known)


def is_length(value: ir.Value | None, source: ir.Value, known: Known, *, minus_one: bool = False) -> bool:
    """Say whether a value is Shape(source)[0], less one if `minus_one`."""
    node = None if value is None else unchanged(value).producer()
    if minus_one:
        if node is None or node.op_type not in ("Sub", "Add"):
            return False
        other = known(node.inputs[1])
        wanted = 1 if node.op_type == "Sub" else -1
        if other is None or other.size != 1 or int(other.reshape(())) != wanted:
            return False
        return is_length(node.inputs[0], source, known)
    while node is not None and node.op_type in ORDERED_VIEWS:
        value = node.inputs[0]
        node = None if value is None else unchanged(value).producer()
    if node is None:
        return False
    if node.op_type in ("Gather", "Slice"):
        place = known(node.inputs[1])
        if place is None or place.size != 1 or int(place.reshape(())) != 0:
            return False
        shape = node.inputs[0]
        node = None if shape is None else unchanged(shape).producer()
    elif int_attribute(node, "end", 0) != 1:
        return False
    return node is not None and node.op_type == "Shape" and node.inputs[0] is source
