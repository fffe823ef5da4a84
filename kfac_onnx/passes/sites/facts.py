"""What can be known of a value without running the graph.

All answers come from data flow and static shapes; names are never looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.frontends.constants import Constants
from kfac_onnx.frontends.numbering import Numbering

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Facts", "ancestors"]


def ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    """Return the values and everything that they are computed from, also through subgraphs."""
    seen: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            continue
        stack.extend(item for item in node.inputs if item is not None)
        for attr in node.attributes.values():
            if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                graphs = [attr.as_graph()] if attr.type == ir.AttributeType.GRAPH else list(attr.as_graphs())
                for graph in graphs:
                    stack.extend(item for inner in graph for item in inner.inputs if item is not None)
                    stack.extend(graph.outputs)
    return seen


class Facts(Constants):
    """Answers about the values of one model; `trained` are the parameters, which are never constant."""

    def __init__(self, model: ir.Model, trained: Iterable[ir.Value], loss: ir.Value | None) -> None:
        self.model = model
        self.trained = set(trained)
        self.inputs = set(model.graph.inputs)
        self.forward = ancestors([loss]) if loss is not None else set[ir.Value]()
        self.numbering = Numbering()
        super().__init__(self.trained | self.inputs, model.opset_imports.get("", 18))

    def is_forward(self, node: ir.Node) -> bool:
        """Say whether the loss depends on this node; every other node belongs to the backward part."""
        return any(value in self.forward for value in node.outputs)
