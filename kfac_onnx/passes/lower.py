"""The pass that gives the dialect's operators their bodies for a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, assert_never

from kfac_onnx import metadata
from kfac_onnx.graph.operators import SCATTERS
from kfac_onnx.passes.device_scalars import Brought, bring_sizes_to_device
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.dialect import Variant
    from kfac_onnx.pipeline.log import Log

__all__ = ["Lower"]


@register
@dataclass(frozen=True, kw_only=True)
class Lower(Pass):
    """Attach a standard body to every `ai.kfac` operator, so that any runtime can run the model.

    On CPU rows are added by ScatterElements, which is right with any number of threads; ScatterND with
    reduction loses sums there when rows repeat. On CUDA ScatterND adds atomically, all operators of the
    bodies have kernels there, and sizes come there without a copy (`device_scalars`), so that nothing is
    copied within a step. `deterministic` gives bodies that add nothing atomically: the same bits in every
    run. On CPU every run gives the same bits anyway.
    """

    name: ClassVar[str] = "lower"
    target: Literal["cpu", "cuda"] = opt("cpu", "where the written model runs unaided")
    deterministic: bool = opt(False, "sum rows in one order on CUDA, at the cost of sorting them")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; each attached or exchanged function, and each node, is one change."""
        from kfac_onnx import dialect

        if self.target == "cuda" and self.deterministic:
            _warn_of_others(model, log)
        before = dict(model.functions)
        imports = dict(model.opset_imports)
        brought = bring_sizes_to_device(model) if self.target == "cuda" else Brought(0, 0)
        dialect.attach(model, self._variant)
        after = model.functions
        added, removed = len(set(after) - set(before)), len(set(before) - set(after))
        edited = sum(_differ(before[key], after[key]) for key in before if key in after)
        edited += sum(imports.get(domain) != version for domain, version in model.opset_imports.items())
        step = metadata.read(model, "step", metadata.Step)
        if step is not None and step.target != self.target:
            metadata.write(model, "step", replace(step, target=self.target))
            edited += 1
        log.count("functions", added)
        log.count("sizes brought to the device", brought.edited)
        return Changes(added=added + brought.added, removed=removed, edited=edited + brought.edited)

    @property
    def _variant(self) -> Variant:
        match self.target:
            case "cpu":
                return "safe"
            case "cuda":
                return "ordered" if self.deterministic else "atomic"
            case _:
                assert_never(self.target)


def _differ(one: ir.Function, other: ir.Function) -> bool:
    """Say whether two functions are written differently."""
    from onnx_ir import to_proto

    return to_proto(one).SerializeToString() != to_proto(other).SerializeToString()


def _warn_of_others(model: ir.Model, log: Log) -> None:
    """Say which nodes of the graph itself add atomically: no body of ours can put those in order."""
    adding = [
        str(node.name or node.outputs[0].name)
        for node in model.graph.all_nodes()
        if node.op_type in SCATTERS and node.attributes.get_string("reduction", "none") != "none"
    ]
    if adding:
        listed = f"{', '.join(adding[:5])}{', ...' if len(adding) > 5 else ''}"
        log.warning(
            f"{len(adding)} scatters of the graph itself add atomically on CUDA, so that runs may differ in "
            f"the last bits of what they feed: {listed}"
        )
