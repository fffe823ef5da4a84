"""The pass that finds embedding tables and marks what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kfac_onnx import metadata
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.metadata import Loss, Parameter, Refusal, Site
from kfac_onnx.passes.accounting import accounts_of
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register
from kfac_onnx.tables.facts import Facts
from kfac_onnx.tables.labels import label_checks
from kfac_onnx.tables.marking import id_checks, mark
from kfac_onnx.tables.matching import Verdict, match_table
from kfac_onnx.tables.padding import check_padding, padding_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["FindEmbeddings", "facts_of", "find_sites", "find_tables", "values_by_name"]


def find_tables(model: ir.Model) -> list[Verdict]:
    """Return a verdict for every trained parameter of a canonical training graph; edits nothing."""
    values = values_by_name(model)
    return _verdicts(model, values, facts_of(model, values))


def _verdicts(model: ir.Model, values: Mapping[str, ir.Value], facts: Facts) -> list[Verdict]:
    return [
        match_table(values[item.name], values.get(item.gradient) if item.gradient else None, facts)
        for item in metadata.read_list(model, "parameters", Parameter)
        if item.name in values
    ]


def facts_of(model: ir.Model, values: Mapping[str, ir.Value]) -> Facts:
    """Return what the rules may know of a canonical graph; `values` are its values by name."""
    parameters = metadata.read_list(model, "parameters", Parameter)
    loss = metadata.read(model, "loss", Loss)
    weights = [values[item.name] for item in parameters if item.name in values]
    top = values.get(loss.value) if loss is not None and loss.value is not None else None
    facts = Facts(model, weights, top)
    if loss is not None and top is None:
        facts.follow(values[name] for name in loss.predictions if name in values)
    return facts


def find_sites(model: ir.Model) -> tuple[list[Site], list[metadata.IdCheck]]:
    """Return the tables of a canonical training graph and the checks of their ids; edits nothing."""
    found = [verdict.site for verdict in find_tables(model) if verdict.site is not None]
    checks = [check for site in found for check in id_checks(site)]
    return [site.describe() for site in found], [*checks, *label_checks(model, _loss_of(model))]


def _loss_of(model: ir.Model) -> ir.Value | None:
    """Return the loss that the model declares."""
    loss = metadata.read(model, "loss", metadata.Loss)
    return None if loss is None or loss.value is None else values_by_name(model).get(loss.value)


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Return the values of the main graph by name."""
    found = {str(value.name): value for value in model.graph.inputs}
    found.update(model.graph.initializers)
    for node in model.graph:
        found.update((str(value.name), value) for value in node.outputs if value.name)
    return found


@register
@dataclass(frozen=True, kw_only=True)
class FindEmbeddings(Pass):
    """Find the embedding tables, and mark the ids, rows and kept lookups of each.

    Reads   `kfac.parameters` and `kfac.loss` of a canonical training graph.
    Adds    per table the values ids int64[N], rows float32[N, D], keep float32[N] (if rows are dropped)
    Writes  `kfac.sites`, `kfac.refused`, `kfac.id_checks`, and `kfac.accounts`: what becomes of each tensor.
    Source  docs/architecture.md: match by data flow, claim every use or report it.
    """

    name: ClassVar[str] = "find-embeddings"
    padding: tuple[str, ...] = opt((), "PARAM=ROW: rows that are padding, where the graph does not say so")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for a padding row that no table has.
        """
        values = values_by_name(model)
        facts = facts_of(model, values)
        verdicts = _verdicts(model, values, facts)
        accounts = accounts_of(model, verdicts, values, facts)
        found = [verdict.site for verdict in verdicts if verdict.site is not None]
        padding = check_padding(padding_rows(self.padding), found)
        emitter = Emitter(model, self.name)
        sites: list[Site] = []
        checks: list[metadata.IdCheck] = []
        refused = metadata.read_list(model, "refused", Refusal)
        for verdict in verdicts:
            if verdict.site is not None:
                sites.append(mark(verdict.site, emitter, padding.get(str(verdict.weight.name))))
                checks.extend(id_checks(verdict.site))
                log.count("tables")
                log.count("lookups", len(verdict.site.uses))
            elif verdict.refusal is not None:
                refused.append(verdict.refusal)
            elif verdict.aside is not None:
                log.warning(f"'{verdict.aside.parameter}' is no table: {verdict.aside.reason}")
        for refusal in refused:
            log.warning(f"'{refusal.parameter}' is not transformed: {refusal.reason}")
        emitter.metadata("sites", sites)
        emitter.metadata("refused", refused)
        emitter.metadata("accounts", accounts)
        emitter.metadata("id_checks", [*checks, *label_checks(model, _loss_of(model))])
        return emitter.changes
