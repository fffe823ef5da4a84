"""Pairs the lookups of a table with the terms of its gradient, and says what cannot be paired.

A site is accepted when every use is claimed and every term of the gradient is accounted for. Anything
else is a `Refusal` with its path, the nearest rule, the reason and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kfac_onnx import metadata
from kfac_onnx.graph.values import label, static_shape
from kfac_onnx.metadata import Projection, Refusal, Site, Use
from kfac_onnx.tables.facts import Facts, ancestors
from kfac_onnx.tables.lookups import DenseUse, Lookup, forward_uses
from kfac_onnx.tables.match_uses import MatchedUse, claim, with_clamping, with_shared
from kfac_onnx.tables.nested import looked_up_inside
from kfac_onnx.tables.passed_over import passed_over
from kfac_onnx.tables.penalties import Coefficient, decay_of, parts_of, split_penalties
from kfac_onnx.tables.products import projections
from kfac_onnx.tables.pull_back import Miss, Pulled
from kfac_onnx.tables.scatters import gradient_terms
from kfac_onnx.tables.terms import DenseTerm, RowTerm

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["SiteMatch", "Verdict", "match_table"]

REPORT = "leave it to the ordinary optimizer (allow-fallback={name}), or see `why {name}`"


@dataclass(frozen=True)
class SiteMatch:
    """An accepted table, with the values of the graph that it is made of."""

    weight: ir.Value
    gradient: ir.Value
    uses: tuple[MatchedUse, ...]
    dense_uses: tuple[DenseUse, ...]
    dense_terms: tuple[DenseTerm, ...]
    projections: tuple[Projection, ...] = ()
    dead_ends: tuple[DenseUse, ...] = ()
    penalties: tuple[DenseUse, ...] = ()
    penalty_parts: tuple[ir.Value, ...] = ()
    """The parts of the gradient that no lookup and no projection has, each of the gradient's own shape."""
    decay: Coefficient | None = None
    """The number c where those parts are c·W together."""

    @property
    def pulled(self) -> Pulled:
        """Layout and size of the table; the same for all uses."""
        return self.uses[0].pulled

    def _penalties(self) -> tuple[Use, ...]:
        """Return what the penalty is: its uses in the loss, or what is added to the gradient outside."""
        if self.penalties:
            return tuple(use.describe() for use in self.penalties)
        makers = [(part.producer(), part) for part in self.penalty_parts]
        return tuple(
            Use("input" if node is None else node.op_type, None, str(part.name), None)
            for node, part in makers
        )

    def describe(self) -> Site:
        """Return what the model's metadata and `scan` say of this site."""
        paddings = [use.padding_idx for use in self.uses if use.padding_idx is not None]
        dtype = self.weight.dtype
        return Site(
            parameter=str(self.weight.name),
            vocab_size=self.pulled.vocab_size,
            embedding_dim=self.pulled.embedding_dim,
            dtype="float32" if dtype is None else dtype.numpy().name,
            layout=self.pulled.layout,
            padding_idx=paddings[0] if paddings else None,
            uses=tuple(describe_lookup(use.lookup, use.output_gradient) for use in self.uses),
            dense_uses=tuple(use.describe() for use in self.dense_uses),
            dead_ends=tuple(use.describe() for use in self.dead_ends),
            penalties=self._penalties(),
            row_decay=self.decay is not None,
            gradient=str(self.gradient.name),
            projections=self.projections,
        )


def describe_lookup(lookup: Lookup, gradient: ir.Value | None) -> Use:
    """Return a lookup as the metadata names it."""
    return Use(
        op=lookup.op,
        ids=None if lookup.ids is None else str(lookup.ids.name),
        output=str(lookup.output.name),
        output_gradient=None if gradient is None else str(gradient.name),
    )


@dataclass
class Verdict:
    """What was found of one parameter; `trail` says which pairs were tried, in order, for `why`."""

    weight: ir.Value
    site: SiteMatch | None = None
    refusal: Refusal | None = None
    aside: Refusal | None = None
    """Why a parameter is no table although rows are looked up in it; the optimizer of the rest trains it."""
    trail: list[str] = field(default_factory=list[str])

    def refuse(self, reason: str, path: list[str], remedy: str | None = None) -> Verdict:
        """Turn the verdict into a refusal."""
        name = str(self.weight.name)
        self.refusal = Refusal(name, " -> ".join([name, *path]), reason, remedy or REPORT.format(name=name))
        self.trail.append(f"refused: {reason}")
        return self


def match_table(weight: ir.Value, gradient: ir.Value | None, facts: Facts) -> Verdict:
    """Decide whether a trained parameter is an embedding table, and pair its uses if it is.

    The verdict of a parameter that no operator looks rows up in has neither site nor refusal.
    """
    verdict = Verdict(weight)
    every = forward_uses(weight, facts)
    lookups, dense_uses = every.lookups, every.dense
    inside = looked_up_inside(weight, facts)
    if inside is not None:
        return verdict.refuse(
            f"{inside.path[-1].op_type} looks it up inside the body of a Loop, Scan or If: {inside.reason}",
            [_step(node) for node in inside.path],
            "unroll the loop when exporting, or leave the table to the ordinary optimizer "
            f"(allow-fallback={weight.name})",
        )
    slices = [use for use in lookups if use.node.graph is not facts.model.graph]  # entry t in iteration t
    dense_uses = [*dense_uses, *(DenseUse(use.node, use.output) for use in slices)]
    lookups = [use for use in lookups if use not in slices]
    if not lookups:
        verdict.trail.append("no operator looks up rows of this parameter: it is not an embedding table")
        verdict.aside = passed_over(weight, facts)
        return verdict
    if gradient is None:
        return verdict.refuse(
            "no output of the graph is its gradient",
            [_step(lookups[0].node)],
            f"name its gradient: --gradients {weight.name}=OUTPUT",
        )
    if facts.vanishes(gradient):
        return verdict.refuse(
            f"its gradient '{gradient.name}' is zero whatever the batch is, so it would never be trained",
            [_step(lookups[0].node), str(gradient.name)],
            "check the model: is the lookup detached, or is the gradient that of another lookup?",
        )
    terms = gradient_terms(gradient, facts)
    verdict = _pair(verdict, gradient, lookups, dense_uses, terms, facts)
    if verdict.site is not None:
        verdict.site = replace(verdict.site, dead_ends=(*every.dead, *verdict.site.dead_ends))
    return verdict


def _pair(
    verdict: Verdict,
    gradient: ir.Value,
    lookups: list[Lookup],
    dense_uses: list[DenseUse],
    terms: list[RowTerm | DenseTerm],
    facts: Facts,
) -> Verdict:
    shape = static_shape(verdict.weight)
    if shape is None:
        return verdict.refuse("its shape is not known when the graph is read", [])
    left = list(terms)
    uses: list[MatchedUse] = []
    misses: list[str] = []
    for lookup in lookups:
        found = claim(lookup, left, shape, facts, misses)
        if found is not None:
            left.remove(found.term)
            uses.append(with_clamping(found, facts))
    # In the order of the gradient's terms: rows and ids that are handed out stay where the exporter has them.
    places = {_rows_of(term): place for place, term in enumerate(terms)}
    uses.sort(key=lambda use: places.get(_rows_of(use.term), 0))
    uses = [with_shared(use, left, shape, facts) for use in uses]
    unclaimed = [lookup for lookup in lookups if all(use.lookup is not lookup for use in uses)]
    rows_left = [term for term in left if isinstance(term, RowTerm)]
    dense_left = tuple(term for term in left if isinstance(term, DenseTerm))
    verdict.trail.extend(f"tried: {miss}" for miss in dict.fromkeys(misses))
    detached: list[DenseUse] = []
    if unclaimed and uses and not left and metadata.unmerged(facts.model):
        # All of the gradient is accounted for, and its exporter gave no part of it to another parameter.
        detached += [DenseUse(lookup.node, lookup.output) for lookup in unclaimed]
        unclaimed = []
    if unclaimed:
        return _refuse_unclaimed(verdict, unclaimed[0], bool(uses), gradient, left, misses)
    if rows_left:
        return verdict.refuse(
            f"its gradient also gets rows from {rows_left[0].op} that belong to no lookup in the loss",
            [str(rows_left[0].updates.name), str(gradient.name)],
        )
    kinds = split_penalties(dense_uses, dense_left, facts)
    if isinstance(kinds, DenseUse):
        return verdict.refuse(
            f"{label(kinds.node)} uses the whole table beside a projection, and what its gradient gets from "
            "each cannot be told apart",
            [_step(kinds.node)],
        )
    parts = parts_of(kinds.terms, terms)
    if isinstance(parts, str):
        return verdict.refuse(f"the gradient of its penalty cannot be told from the rest: {parts}", [])
    if kinds.uses and not kinds.terms:
        dense_uses = list(kinds.uses)
        dense_left = ()
    else:
        dense_uses, dense_left = list(kinds.projections), kinds.projection_terms
    if dense_uses and not dense_left and metadata.unmerged(facts.model):
        detached += dense_uses
        dense_uses = []
    if dense_uses and not dense_left:
        return verdict.refuse(
            f"{dense_uses[0].node.op_type} '{dense_uses[0].output.name}' also uses the table, "
            f"but its gradient '{gradient.name}' holds nothing of that use",
            [_step(dense_uses[0].node)],
            "check how the exporter computes this gradient: `verify MODEL --data FILE` tests it",
        )
    if dense_left and not dense_uses:
        term = dense_left[0]
        part = term.steps[0].node.outputs[0] if term.steps else term.value
        node = part.producer()
        return verdict.refuse(
            f"its gradient also gets a part from {node.op_type if node else 'an input'} "
            f"'{part.name}' that belongs to no use of the table in the loss",
            [str(part.name), str(gradient.name)],
        )
    if len({(use.pulled.layout, use.pulled.vocab_size, use.pulled.embedding_dim) for use in uses}) > 1:
        return verdict.refuse(
            "its uses disagree about which axis holds the rows", [_step(uses[1].lookup.node)]
        )
    products = projections(verdict.weight, uses[0].pulled.layout, dense_uses, dense_left, facts)
    if isinstance(products, Miss):
        verdict.trail.append(f"tied=both cannot be had: {products.reason}")
        products = ()
    verdict.site = SiteMatch(
        verdict.weight,
        gradient,
        tuple(uses),
        tuple(dense_uses),
        dense_left,
        products,
        dead_ends=tuple(detached),
        penalties=kinds.uses,
        penalty_parts=tuple(parts),
        decay=decay_of(parts, verdict.weight),
    )
    verdict.trail.append("accepted")
    return verdict


def _rows_of(term: RowTerm | DenseTerm) -> ir.Value:
    return term.updates if isinstance(term, RowTerm) else term.value


def _refuse_unclaimed(
    verdict: Verdict,
    lookup: Lookup,
    others: bool,
    gradient: ir.Value,
    left: list[RowTerm | DenseTerm],
    misses: list[str],
) -> Verdict:
    ids = "its fixed ids" if lookup.ids is None else f"the ids '{lookup.ids.name}'"
    if others and not left:
        return verdict.refuse(
            f"{lookup.op} '{lookup.output.name}' looks rows up by {ids}, but its gradient '{gradient.name}' "
            "holds no rows of that lookup: the exporter merged two tables that started equal, or the "
            "lookup is detached",
            [_step(lookup.node)],
            "export with the parameters as inputs, or with different starting values, and without "
            "optimization",
        )
    computed = _computed_from(lookup, verdict.weight)
    if computed is not None:
        return verdict.refuse(
            f"{lookup.op} '{lookup.output.name}' looks rows up in a table that {computed.op_type} "
            f"'{computed.outputs[0].name}' computes from it, not in the parameter itself",
            [_step(computed), _step(lookup.node)],
            "normalize the looked-up rows instead of the table, or leave it to the ordinary optimizer "
            f"(allow-fallback={verdict.weight.name})",
        )
    why = f" ({misses[-1]})" if misses else ""
    return verdict.refuse(
        f"no operator of its gradient '{gradient.name}' scatters the rows of "
        f"{lookup.op} '{lookup.output.name}', which looks rows up by {ids}{why}",
        [_step(lookup.node)],
    )


def _computed_from(lookup: Lookup, weight: ir.Value) -> ir.Node | None:
    """Return the operator between the parameter and the lookup that scales the table by itself, if any."""
    value = lookup.node.inputs[0]
    while value is not None and value is not weight:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in ("Mul", "Div"):
            operands = [item for item in node.inputs if item is not None]
            depends = [item for item in operands if weight in ancestors([item])]
            if len(depends) > 1:
                return node
            value = depends[0] if depends else None
        else:
            value = node.inputs[0]
    return None


def _step(node: ir.Node) -> str:
    """Return how a path names a node: by the name that a viewer of graphs shows."""
    return f"{node.name or node.outputs[0].name} ({node.op_type})"
