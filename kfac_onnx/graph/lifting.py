"""Weights in `Constant` nodes become initializers, which is where everything else looks for weights.

The specification lets a model keep its weights in `Constant` nodes, in graphs and in functions alike, and
Paddle2ONNX keeps all of them there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.context import Context
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lift_constants"]

_NUMBERS: Final = ("value", "value_floats")
"""Attributes of a Constant that hold a floating-point tensor of one or more dimensions."""


def lift_constants(model: ir.Model) -> int:
    """Make every floating-point `Constant` of one or more dimensions an initializer; return how many.

    Constants of nested graphs go to the main graph; functions must be inlined before. Names stay, unless two
    nested graphs use the same one. Single numbers of rank 0, integers and texts stay nodes.
    """
    lifted = list(_weights(model))
    names = Context.of(model) if any(node.graph is not model.graph for node, _ in lifted) else None
    for node, tensor in lifted:
        output, graph = node.outputs[0], node.graph
        name = str(output.name)
        if names is not None and graph is not model.graph and name in model.graph.initializers:
            name = names.fresh(name)
        value = ir.Value(
            name=name,
            shape=ir.Shape([int(dim) for dim in tensor.shape.numpy()]),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
            metadata_props=dict(output.metadata_props),
        )
        tensor.name = name
        if output.is_graph_output():  # a graph inside must make what it returns
            copy = ir.node("Identity", [value])
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
            value.name = tensor.name = (names or Context.of(model)).fresh(f"{name}.value")
            if graph is not None:
                graph.insert_before(node, copy)
            output.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
        else:
            output.replace_all_uses_with(value)
        if graph is not None:
            graph.remove(node, safe=True)
        model.graph.register_initializer(value)
    return len(lifted)


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    for graph in all_graphs(model.graph):
        for node in graph:
            if node.op_type != "Constant" or node.domain not in ONNX_DOMAINS or not node.outputs[0].name:
                continue
            for key in _NUMBERS:
                attribute = node.attributes.get(key)
                if attribute is None or attribute.is_ref():
                    continue
                if key == "value_floats":
                    tensor: ir.TensorProtocol = ir.tensor(np.array(attribute.as_floats(), np.float32))
                else:
                    tensor = attribute.as_tensor()
                if len(tensor.shape) and tensor.dtype.is_floating_point():
                    yield node, tensor
