"""The pass that says what each trained parameter is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kfac_onnx import metadata
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.metadata import Parameter, Site
from kfac_onnx.passes.find_embeddings import facts_of, values_by_name
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.registry import register
from kfac_onnx.tables.roles import roles_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.metadata import Role
    from kfac_onnx.pipeline.log import Log

__all__ = ["Classify", "classified"]


def classified(model: ir.Model, sites: Sequence[Site]) -> list[Role]:
    """Return the role of each trained parameter of a canonical training graph; edits nothing."""
    values = values_by_name(model)
    weights = {
        item.name: values[item.name]
        for item in metadata.read_list(model, "parameters", Parameter)
        if item.name in values and item.gradient is not None
    }
    return roles_of(weights, sites, facts_of(model, values))


@register
@dataclass(frozen=True, kw_only=True)
class Classify(Pass):
    """Tell tables, output tables, heads, hidden matrices and vectors apart by how the graph uses them.

    Reads   `kfac.parameters`, `kfac.loss` and the sites left by `find-embeddings`.
    Writes  `kfac.roles`: the role of each trained parameter with a reason, and which axes of a matrix are
            outputs, inputs, or number matrices of their own.
    """

    name: ClassVar[str] = "classify"

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Write the roles; nothing else of `model` changes."""
        roles = classified(model, metadata.read_list(model, "sites", Site))
        for role in roles:
            log.count(role.kind)
        emitter = Emitter(model, self.name)
        emitter.metadata("roles", roles)
        return emitter.changes
