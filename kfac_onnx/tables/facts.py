"""What can be known of a value without running the graph.

All answers come from data flow and static shapes; names are never looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.numbering import Numbering
from kfac_onnx.graph.values import ancestors, carrying, descendants, static_shape

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Facts", "ancestors"]


class Facts(Constants):
    """Answers about the values of one model; `trained` are the parameters, which are never constant."""

    def __init__(self, model: ir.Model, trained: Iterable[ir.Value], loss: ir.Value | None) -> None:
        self.model = model
        self.trained = set(trained)
        self.inputs = set(model.graph.inputs)
        self.forward = set[ir.Value]()
        self.carrying = set[ir.Value]()
        """Values of `forward` through which a gradient of the ends passes."""
        self.follow([] if loss is None else [loss])
        self.numbering = Numbering()
        self._of_batch: set[ir.Value] | None = None
        self._varying: set[ir.Value] | None = None
        super().__init__(self.trained | self.inputs, model.opset_imports.get("", 18))

    def follow(self, ends: Iterable[ir.Value]) -> None:
        """Take these values for what the graph is there for: its loss, or its predictions."""
        ends = list(ends)
        self.forward = ancestors(ends)
        self.carrying = carrying(ends)

    def depends_on_batch(self, value: ir.Value) -> bool:
        """Say whether a value is other in each step for another reason than that parameters are trained."""
        if self._of_batch is None:
            self._of_batch = descendants(self.model.graph, self._batch())
        return value in self._of_batch

    def varies(self, value: ir.Value) -> bool:
        """Say whether a value depends on the batch, other than through single numbers such as the loss."""
        if self._varying is None:
            self._varying = descendants(self.model.graph, self._batch(), _is_no_number)
        return value in self._varying

    def _batch(self) -> set[ir.Value]:
        return self.inputs - self.trained - set(self.model.graph.initializers.values())

    def is_carrying(self, value: ir.Value) -> bool:
        """Say whether a gradient of the ends passes through a value."""
        return value in self.carrying

    def is_dead_end(self, node: ir.Node) -> bool:
        """Say whether no gradient of the ends passes through a node, although they depend on it."""
        return self.is_forward(node) and not any(value in self.carrying for value in node.outputs)

    def is_forward(self, node: ir.Node) -> bool:
        """Say whether the loss depends on this node; every other node belongs to the backward part."""
        return any(value in self.forward for value in node.outputs)


def _is_no_number(value: ir.Value) -> bool:
    shape = static_shape(value)
    return shape is None or any(dim != 1 for dim in shape)
