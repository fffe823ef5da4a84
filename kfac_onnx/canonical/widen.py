"""Running operators in float32 that onnxruntime's CPU provider has no kernel for in the graph's type.

A node of such a type becomes Cast to float32, the node, Cast back: it rounds its result once, as the
exporter's own node does. Operators that only move data have bfloat16 kernels and stay, so that a lookup
reads the table itself. float16 needs nothing: onnxruntime inserts these casts by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import onnx_ir as ir

from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, replace_node
from kfac_onnx.graph.operators import Trait, having
from kfac_onnx.graph.values import all_graphs, dtype_of
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kfac_onnx.pipeline.log import Log


__all__ = ["BFLOAT16_KERNELS", "Widen", "widen"]

BFLOAT16_KERNELS: Final = having(Trait.BFLOAT16)
DOUBLE_LACKING: Final = having(Trait.NO_FLOAT64)


def _needs(node: ir.Node, types: Iterable[ir.DataType | None]) -> ir.DataType | None:
    """Return the type that this node has no kernel for, if any."""
    present = set(types)
    adds = "reduction" in node.attributes and node.attributes["reduction"].as_string() != "none"
    if ir.DataType.BFLOAT16 in present and (node.op_type not in BFLOAT16_KERNELS or adds):
        return ir.DataType.BFLOAT16
    if ir.DataType.DOUBLE in present and node.op_type in DOUBLE_LACKING:
        return ir.DataType.DOUBLE
    return None


def _narrow(node: ir.Node) -> ir.DataType | None:
    return _needs(node, [dtype_of(value) for value in (*node.inputs, *node.outputs)])


def widen(model: ir.Model) -> list[str]:
    """Wrap nodes in casts where their type has no CPU kernel. Returns what was done, in sentences."""
    names = Context.of(model)
    counts: dict[ir.DataType, int] = {}
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            narrow = _narrow(node)
            if narrow is None:
                continue
            _wrap(names, node, narrow)
            counts[narrow] = counts.get(narrow, 0) + 1
    return [
        f"nodes without a {dtype.name.lower()} kernel that compute in float32: {count}"
        for dtype, count in sorted(counts.items())
    ]


def _wrap(names: Context, node: ir.Node, narrow: ir.DataType) -> None:
    emit = Emitter.in_place_of(names, node, "widen")
    inputs = [
        _in_float(emit, value) if value is not None and dtype_of(value) == narrow else value
        for value in node.inputs
    ]
    results = emit.many(node.op_type, inputs, len(node.outputs), node.attributes, node.domain)
    back: list[ir.Value | None] = []
    for old, new in zip(node.outputs, results, strict=True):
        if dtype_of(old) == narrow:
            new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), old.shape
            back.append(emit.cast(new, narrow))
        else:
            back.append(new)
    replace_node(node, emit, back)


def _in_float(emit: Emitter, value: ir.Value) -> ir.Value:
    cast = emit.cast(value, ir.DataType.FLOAT)
    cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    return cast


@register
@dataclass(frozen=True, kw_only=True)
class Widen(Pass):
    """Compute in float32 where ONNX Runtime's CPU provider has no kernel for a node's bfloat16 or float64.

    Such a node is put between casts, so that it rounds its result once. What only moves data has kernels and
    stays, so that a lookup reads the table itself.
    """

    name: ClassVar[str] = "widen"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not any(_narrow(node) for graph in all_graphs(model.graph) for node in graph):
            return NO_CHANGES
        census = Census(model)
        for note in widen(model):
            log.note(note)
        return census.changes()
