"""Lowering of exporters' training operators to standard ONNX operators: one table, one rule per operator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Final

import onnx

from kfac_onnx.canonical.lowering import (
    activations,
    batch_norm,
    convolution,
    cross_entropy,
    normalization,
    optimizers,
    plumbing,
    recurrent,
    rows,
)
from kfac_onnx.device.kernels import has_cpu_kernel
from kfac_onnx.errors import UserError
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, Miss, Rule, replace_node
from kfac_onnx.graph.shapes import infer_shapes
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, label
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


__all__ = ["TABLE", "LowerTrainingOperators", "lower_training_operators", "runs"]

TABLE: Final[dict[tuple[str, str], Rule]] = {
    **rows.RULES,
    **activations.RULES,
    **batch_norm.RULES,
    **convolution.RULES,
    **cross_entropy.RULES,
    **optimizers.RULES,
    **normalization.RULES,
    **plumbing.RULES,
    **recurrent.RULES,
}
"""(domain, operator) -> rule."""


def lower_training_operators(
    model: ir.Model, place: str | None = None, *, keep: Collection[str] = ()
) -> list[str]:
    """Replace every operator that has a rule by standard ones, keeping the names of its outputs.

    Nodes must be in topological order; operators named in `keep` stay. Returns one sentence per kind of
    operator replaced.

    Raises:
        UserError: for all operators at once that plain onnxruntime lacks and no rule can lower.

    """
    counts: dict[str, int] = {}
    missing = _sweep(model, counts, keep)
    if missing and counts:  # what was lowered may tell the shapes that the others lacked
        infer_shapes(model)
        missing = _sweep(model, counts, keep)
    if missing:
        what = "1 node that" if len(missing) == 1 else f"{len(missing)} nodes that"
        raise UserError(
            f"the graph has {what} onnxruntime cannot run and no rule can lower",
            place=place,
            tried=missing,
            help="export the model without these operators",
        )
    return [f"{name} lowered to standard operators: {count}" for name, count in sorted(counts.items())]


def _sweep(model: ir.Model, counts: dict[str, int], keep: Collection[str]) -> list[str]:
    """Lower every node that has a rule, adding to `counts`; return what is missing, one line per node."""
    names = Context.of(model)
    missing: list[str] = []
    for graph in list(all_graphs(model.graph)):
        retired: list[ir.Node] = []
        for node in list(graph):
            if not _concerns(node, keep):
                continue
            domain = "" if node.domain in ONNX_DOMAINS else node.domain
            rule = TABLE.get((domain, node.op_type))
            if rule is None:
                missing.append(f"{label(node)}: no rule for {domain or 'ai.onnx'}::{node.op_type}")
                continue
            emit = Emitter.in_place_of(names, node)
            results = rule(emit, node)
            if isinstance(results, Miss):
                missing.append(f"{label(node)}: {results.reason}")
                continue
            if any(value.uses() or value.is_graph_output() for value in node.outputs[len(results) :]):
                missing.append(f"{label(node)}: only {len(results)} of its outputs are known")
                continue
            replace_node(node, emit, results, retired)
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        graph.remove(retired)
    return missing


def _concerns(node: ir.Node, keep: Collection[str]) -> bool:
    """Say whether a node has a rule, or needs one."""
    if node.op_type in keep and node.domain not in ONNX_DOMAINS:
        return False
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    return (domain, node.op_type) in TABLE or not runs(domain, node.op_type)


@cache
def runs(domain: str, op_type: str) -> bool:
    """Say whether onnxruntime runs an operator: of the standard, or one that the installed wheel has."""
    if domain in ("", "ai.onnx.ml") and onnx.defs.has(op_type, domain):
        return True
    return has_cpu_kernel(domain, op_type)


@register
@dataclass(frozen=True, kw_only=True)
class LowerTrainingOperators(Pass):
    """Replace exporters' training operators by standard ones, by one rule per operator.

    Outputs keep their names. Operators of other domains that the plain onnxruntime wheel runs stay.
    """

    name: ClassVar[str] = "lower-training-operators"
    keep: tuple[str, ...] = opt((), "operators that stay, for a later pass: [Gradient,Adam]")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for all operators at once that plain onnxruntime lacks and no rule can lower.
        """
        if not any(_concerns(node, self.keep) for graph in all_graphs(model.graph) for node in graph):
            return NO_CHANGES
        census = Census(model)
        for note in lower_training_operators(model, keep=self.keep):
            log.note(note)
        return census.changes()
