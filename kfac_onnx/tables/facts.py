"""What can be known of a value without running the graph.

All answers come from data flow and static shapes; names are never looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.numbering import Numbering
from kfac_onnx.graph.values import ancestors

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Facts", "ancestors"]


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
