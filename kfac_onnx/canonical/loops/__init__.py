"""Loops, scans and branches around tables, brought into a form without them where that is exact.

Exporters write recurrent networks as Scan or Loop, embedding bags as a Loop over the bags, gradients through
time as a Loop that carries the gradient. In all of these each iteration looks rows up, or adds rows to
a gradient, by ids that are known before the loop. `open_loops` moves lookups before the loop, scatters behind
it, and bags out of it, so that what comes later sees one Gather and one scatter per table. Every rewrite
is exact, by structure and data flow; what fits none of them stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from onnx_ir.passes.common import LiftSubgraphInitializersToMainGraphPass

from kfac_onnx.canonical.loops.accumulators import scatter_after
from kfac_onnx.canonical.loops.branches import take_known_branches
from kfac_onnx.canonical.loops.casts import drop_round_trips, name_types_of_casts
from kfac_onnx.canonical.loops.lookups import look_up_before
from kfac_onnx.canonical.loops.recurrence import Recurrence, prune
from kfac_onnx.canonical.loops.results import compute_outside, prune_emitted, stack_sequences
from kfac_onnx.canonical.loops.rules import RULES
from kfac_onnx.canonical.loops.scopes import name_values_apart
from kfac_onnx.canonical.loops.states import (
    counts_iterations,
    drop_unchanged,
    drop_unread,
    read_shapes_outside,
    runs_to_the_end,
)
from kfac_onnx.canonical.loops.vectorizer import Vectorizer
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import BODIES
from kfac_onnx.graph.shapes import infer_shapes
from kfac_onnx.graph.values import all_graphs, bodies_of, operators_in
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


__all__ = ["OpenLoops", "open_loops", "why_not_outside"]

SWEEPS = 16
"""Bound on the sweeps over a model; each works on what the one before it has opened."""


def open_loops(model: ir.Model) -> list[str]:
    """Move what can be out of the loops and branches of a model; return one note per kind of rewrite."""
    if not any(node.op_type in BODIES for graph in all_graphs(model.graph) for node in graph):
        return []
    name_values_apart(model, Context.of(model))
    LiftSubgraphInitializersToMainGraphPass()(model)
    Context.of(model).invalidate()
    counts: Counter[str] = Counter()
    for _ in range(SWEEPS):
        before = counts.total()
        _sweep(model, counts)
        if counts.total() == before:
            break
        infer_shapes(model)
    prune(model.graph, [node for node in model.graph if node.op_type == "SequenceEmpty"])
    return [f"{what}: {count}" for what, count in counts.items() if count]


def _sweep(model: ir.Model, counts: Counter[str]) -> None:
    names = Context.of(model)
    name_types_of_casts(model, names)
    counts["casts to a wider type and back"] += drop_round_trips(model)
    constants = _constants(model)
    counts["branches that are always taken"] += take_known_branches(model, names, constants)
    for graph in reversed(list(all_graphs(model.graph))):  # inner ones first
        for node in list(graph):
            loop = Recurrence.of(node)
            if loop is not None and node.graph is graph:
                _open(loop, names, _constants(model), counts)


def why_not_outside(model: ir.Model, node: ir.Node) -> str:
    """Return why a lookup inside a body cannot be moved out of it, as a clause after "because"."""
    owner = _owner(model, node)
    loop = None if owner is None else Recurrence.of(owner)
    if loop is None:
        return "it runs under a condition, so that the number of its lookups is not known before"
    vec = Vectorizer(loop, Context.of(model), _constants(model), RULES)
    table, ids = (vec.lane(value) for value in node.inputs[:2])
    prune_emitted(vec.emit)
    if isinstance(table, Miss):
        return "the table that it reads is a state that the iterations change"
    if not runs_to_the_end(loop, _constants(model)):
        return "the loop ends by its own data, so that the number of its lookups is not known before"
    reason = ids.reason if isinstance(ids, Miss) else "an operator on them has no rule over all iterations"
    return f"its ids cannot be known before the loop: {reason}"


def _owner(model: ir.Model, node: ir.Node) -> ir.Node | None:
    """Return the node of whose body another one is a part."""
    for graph in all_graphs(model.graph):
        for item in graph:
            if node.graph in bodies_of(item):
                return item
    return None


def _constants(model: ir.Model) -> Constants:
    return Constants(model.graph.inputs, model.opset_imports.get("", 18))


def _open(loop: Recurrence, names: Context, constants: Constants, counts: Counter[str]) -> None:
    counted = counts_iterations(loop, names, constants)
    if counted is not None:
        loop = counted
        counts["loops given their number of iterations"] += 1
    for simplify in (drop_unchanged, drop_unread):
        simpler = simplify(loop, names)
        if loop.node.graph is None and simpler is None:
            return
        if simpler is not None:
            loop = simpler
            counts["loops freed of states that do not change"] += 1
    counts["shapes of states read outside of loops"] += read_shapes_outside(loop, names, constants)
    constants = Constants(constants.varying, constants.opset)
    if runs_to_the_end(loop, constants):
        stacked = stack_sequences(loop, names, constants)
        if stacked is not None:
            loop = stacked
            counts["sequences that became stacks"] += 1
        if computed := compute_outside(loop, names, constants):
            counts["results computed outside of loops"] += computed
            loop = drop_unread(loop, names) or loop
            if loop.node.graph is None:
                return
        loop, hoisted = look_up_before(loop, names, constants)
        counts["lookups moved before loops"] += hoisted
    loop, scatters = scatter_after(loop, names, constants)
    counts["sums of rows moved behind loops"] += scatters


@register
@dataclass(frozen=True, kw_only=True)
class OpenLoops(Pass):
    """Move lookups before loops, scatters behind them, and bags out of them, where that is exact.

    Branches that are always taken take the place of their If. Loops get their number of iterations, lose
    states that do not change and shapes that they read, and sequences that they append to become stacks. What
    an iteration computes by itself is computed outside for all iterations at once.
    """

    name: ClassVar[str] = "open-loops"
    keeps_meaning: ClassVar[bool] = True

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place."""
        if not operators_in(model) & {"Loop", "Scan", "If"}:
            return NO_CHANGES
        census = Census(model)
        for note in open_loops(model):
            log.note(note)
        return census.changes()
