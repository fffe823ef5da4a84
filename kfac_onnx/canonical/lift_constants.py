"""The pass that makes initializers of weights in `Constant` nodes (`kfac_onnx.graph.lifting`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kfac_onnx.graph.lifting import lift_constants
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["LiftConstants"]


@register
@dataclass(frozen=True, kw_only=True)
class LiftConstants(Pass):
    """Make initializers of floating-point tensors in Constant nodes, where everything else looks for weights.

    Constants of nested graphs go to the main graph. Single numbers, integers and texts stay nodes.
    """

    name: ClassVar[str] = "lift-constants"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each constant is two changes: an initializer more, a node less."""
        lifted = lift_constants(model)
        if lifted:
            log.note(f"constants in nodes made initializers: {lifted}")
            log.count("constants", lifted)
        return Changes(added=lifted, removed=lifted)
