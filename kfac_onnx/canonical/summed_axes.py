"""Sums over axes that are found at run time, where every case gives the same numbers.

A gradient that was broadcast is summed over the axes along which its operand had one entry, and reshaped
to the operand's shape. For a dynamic batch an exporter computes these axes from shapes:

    axes = NonZero(mask),  mask bool[n]        so axes are among the first n
    y    = Reshape(ReduceSum(x, axes), shape)  x [d_1, ..., d_n, rest], shape as large as rest

The reshape needs a sum as large as `rest`: of the first n axes, those that are not summed have length one.
So y is the sum over all the first n axes, whatever the mask says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.operators import ELEMENTWISE, ORDERED_VIEWS, Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, int_attribute, operators_in, rank_of, static_shape
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


__all__ = ["SettleSummedAxes", "settle_summed_axes"]

BROADCAST: Final = having(Trait.BINARY)
SAME_LENGTH: Final = ELEMENTWISE - BROADCAST


def settle_summed_axes(model: ir.Model) -> int:
    """Make the axes of such sums constant; return of how many."""
    names = Context.of(model)
    constants = Constants(model.graph.inputs, model.opset_imports.get("", 18))
    settled = 0
    for node in model.graph:
        if node.domain not in ONNX_DOMAINS or node.op_type != "ReduceSum" or len(node.inputs) < 2:
            continue
        axes, noop = node.inputs[1], int_attribute(node, "noop_with_empty_axes", 0)
        if axes is None or not noop or constants.constant(axes) is not None:
            continue
        count = _leading_axes(axes, constants)
        if count is not None and _needs_all(node, count):
            node.replace_input_with(1, names.constant(np.arange(count, dtype=np.int64)))
            settled += 1
    return settled


def _leading_axes(axes: ir.Value, constants: Constants) -> int | None:
    """Return n if the axes are where a mask of n entries holds."""
    node = axes.producer()
    while node is not None and node.op_type in ORDERED_VIEWS:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.domain not in ONNX_DOMAINS or node.op_type != "NonZero":
        return None
    return _length(node.inputs[0], constants)


def _length(value: ir.Value | None, constants: Constants) -> int | None:
    """Return how many entries a vector always has, if that can be told."""
    if value is None:
        return None
    static = static_shape(value)
    if static is not None:
        return static[0] if len(static) == 1 else None
    known = constants.constant(value)
    if known is not None:
        return len(known) if known.ndim == 1 else None
    node = value.producer()
    if node is None or node.domain not in ONNX_DOMAINS:
        return None
    if node.op_type in SAME_LENGTH:
        return _length(node.inputs[0], constants)
    if node.op_type == "Concat":
        parts = [_length(item, constants) for item in node.inputs]
        return None if None in parts else sum(part for part in parts if part is not None)
    if node.op_type == "Expand":
        size, source = constants.constant(node.inputs[1]), static_shape(node.inputs[0])
        return int(size[0]) if size is not None and size.shape == (1,) and source in ((), (1,)) else None
    if node.op_type in BROADCAST:
        # two vectors of equal lengths, or one of them has one entry (or is a scalar)
        sizes = [1 if static_shape(item) == () else _length(item, constants) for item in node.inputs]
        lengths = [size for size in sizes if size is not None]
        return None if len(lengths) < len(sizes) else 0 if 0 in lengths else max(lengths)
    return None


def _needs_all(node: ir.Node, count: int) -> bool:
    """Say whether every reader of a sum reshapes it to as many entries as the axes after `count` have."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or rank_of(source) is None or result.is_graph_output():
        return False
    rest = list(source.shape)[count:]
    if count > len(source.shape) or not all(isinstance(dim, int) for dim in rest):
        return False
    size = int(np.prod([dim for dim in rest if isinstance(dim, int)]))
    shapes = [
        static_shape(reader.outputs[0]) if reader.op_type == "Reshape" and index == 0 else None
        for reader, index in result.uses()
    ]
    return bool(shapes) and all(shape is not None and int(np.prod(shape)) == size for shape in shapes)


@register
@dataclass(frozen=True, kw_only=True)
class SettleSummedAxes(Pass):
    """Make the axes of a sum constant where they are found at run time and every case gives the same numbers.

    That is so where all readers reshape the sum to as many entries as the axes after the candidates have.
    """

    name: ClassVar[str] = "settle-summed-axes"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not operators_in(model) & {"NonZero"}:
            return NO_CHANGES
        census = Census(model)
        if count := settle_summed_axes(model):
            log.note(f"sums over the batch that found their axes at run time: {count}")
            log.count("scatters", count)
        return census.changes()
