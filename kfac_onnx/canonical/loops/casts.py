"""Casts around loops: CastLike to a type that the graph says is a Cast, and there and back is nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, dtype_of

if TYPE_CHECKING:
    from kfac_onnx.graph.context import Context

__all__ = ["drop_round_trips", "name_types_of_casts"]

_T = ir.DataType
EXACT: Final = frozenset(
    {
        (_T.FLOAT16, _T.FLOAT), (_T.FLOAT16, _T.DOUBLE), (_T.BFLOAT16, _T.FLOAT), (_T.BFLOAT16, _T.DOUBLE),
        (_T.FLOAT, _T.DOUBLE), (_T.INT32, _T.INT64), (_T.INT32, _T.DOUBLE),
    }
)  # fmt: skip
"""Types of which the second holds every number of the first."""


def name_types_of_casts(model: ir.Model, names: Context) -> int:
    """Replace every CastLike whose other operand has a known type by a Cast; return how many."""
    count = 0
    for graph in list(all_graphs(model.graph)):
        for node in list(graph):
            if node.op_type != "CastLike" or node.domain not in ONNX_DOMAINS:
                continue
            dtype, old = dtype_of(node.inputs[1]), node.outputs[0]
            if dtype is None:
                continue
            cast = ir.Node(
                "",
                "Cast",
                [node.inputs[0]],
                attributes=[ir.AttrInt64("to", int(dtype))],
                num_outputs=1,
                name=node.name,
                metadata_props=dict(node.metadata_props),
            )
            new = cast.outputs[0]
            new.shape, new.type, name = old.shape, ir.TensorType(dtype), old.name
            graph.insert_before(node, cast)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            old.name, new.name = names.fresh(f"kfac/loop/{name}"), name
            count += 1
    return count


def drop_round_trips(model: ir.Model) -> int:
    """Let who reads a value that was cast to a wider type and back read the value itself; return how many.

    onnxruntime's optimizer removes such pairs too, and with them what the body of a Loop reads from outside.
    """
    count = 0
    for graph in all_graphs(model.graph):
        for node in graph:
            wide = node.inputs[0] if node.op_type == "Cast" and node.domain in ONNX_DOMAINS else None
            first = None if wide is None else wide.producer()
            if wide is None or first is None or first.op_type != "Cast" or node.outputs[0].is_graph_output():
                continue
            source, result = first.inputs[0], node.outputs[0]
            own = dtype_of(source)
            if source is None or own is None or own != dtype_of(result) or (own, dtype_of(wide)) not in EXACT:
                continue
            if result.uses():
                result.replace_all_uses_with(source)
                count += 1
    return count
