"""CastLike to a type that the graph says is a Cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, dtype_of

if TYPE_CHECKING:
    from kfac_onnx.graph.context import Context

__all__ = ["name_types_of_casts"]


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
