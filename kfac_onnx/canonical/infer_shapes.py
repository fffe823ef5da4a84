"""The pass that tells the shapes and types of values, as far as ONNX's own inference can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir

from kfac_onnx.graph.census import shapes_of
from kfac_onnx.graph.shapes import infer_shapes, lacks_shapes
from kfac_onnx.graph.values import all_graphs
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from kfac_onnx.pipeline.log import Log

__all__ = ["InferShapes"]


@register
@dataclass(frozen=True, kw_only=True)
class InferShapes(Pass):
    """Fill in the shapes and types that values lack, as ONNX's shape inference tells them.

    A constant is declared as its data is, whatever the graph declares for it. What is known is replaced only
    by what ONNX knows better; a graph that ONNX cannot infer stays as it is.
    """

    name: ClassVar[str] = "infer-shapes"
    keeps_meaning: ClassVar[bool] = True
    tells_shapes: ClassVar[bool] = True
    when: Literal["always", "changed", "missing"] = opt(
        "always",
        "changed: only if a pass changed the graph since; missing: if, besides, a value lacks its shape",
    )

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each value that is declared otherwise is one change."""
        if self.when != "always" and not log.stale:
            return NO_CHANGES
        if self.when == "missing" and not lacks_shapes(model):
            return NO_CHANGES
        before = shapes_of(model)
        for graph in all_graphs(model.graph):
            for value in graph.initializers.values():
                _declare_as_stored(value)
        log.inferred = infer_shapes(model)
        after = shapes_of(model)
        edited = sum(after[value] != declared for value, declared in before.items())
        log.count("values", edited)
        return Changes(edited=edited)


def _declare_as_stored(value: ir.Value) -> None:
    """Declare the shape that a constant has: exporters leave the sizes of another batch, or names, behind."""
    if value.const_value is None or value.shape is None or value.is_graph_input():
        return
    stored = [int(dim) for dim in value.const_value.shape.numpy()]
    if list(value.shape) != stored:
        value.shape = ir.Shape(stored)
