"""The pass that gives the dialect's operators their bodies for a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kfac_onnx.passes.base import Changes, Pass
from kfac_onnx.passes.options import opt
from kfac_onnx.passes.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.dialect import Variant
    from kfac_onnx.passes.log import Log

__all__ = ["Lower"]

_VARIANTS: dict[str, Variant] = {"cpu": "safe", "cuda": "atomic"}


@register
@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Attach a standard body to every `ai.kfac` operator, so that any runtime can run the model.

    On CPU rows are added by ScatterElements, which is right with any number of threads; ScatterND with
    reduction loses sums there when rows repeat. On CUDA ScatterND adds atomically.
    """

    name: ClassVar[str] = "lower"
    target: Literal["cpu", "cuda"] = opt("cpu", "where the written model runs unaided")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each attached or exchanged function is one change."""
        from onnx_ir import to_proto

        from kfac_onnx import dialect

        before = {key: to_proto(function).SerializeToString() for key, function in model.functions.items()}
        imports = dict(model.opset_imports)
        dialect.attach(model, _VARIANTS[self.target])
        after = {key: to_proto(function).SerializeToString() for key, function in model.functions.items()}
        added = len(set(after) - set(before))
        edited = sum(before[key] != after[key] for key in before if key in after)
        edited += sum(imports.get(domain) != version for domain, version in model.opset_imports.items())
        log.count("functions", added)
        return Changes(added=added, edited=edited)
