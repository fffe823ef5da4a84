"""Lookups inside the bodies of loops and branches, which the frontends could not move out.

A table may enter a body as an outer value or as a state that the loop carries; either way it is followed to
the operator that looks its rows up, so that the table can be refused with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.canonical.loops import why_not_outside
from kfac_onnx.canonical.loops.recurrence import Recurrence
from kfac_onnx.graph.operators import LOOKUPS, VIEWS
from kfac_onnx.graph.values import bodies_of, rank_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts

__all__ = ["Inside", "looked_up_inside", "reads_entry_by_number"]


class Inside:
    """A lookup in a body: the nodes from the table to it, and why it is still there."""

    def __init__(self, path: list[ir.Node], reason: str) -> None:
        self.path = path
        self.reason = reason


def looked_up_inside(weight: ir.Value, facts: Facts) -> Inside | None:
    """Return the first lookup of a matrix's rows inside a body that the loss depends on, if there is one."""
    stack: list[tuple[ir.Value, list[ir.Node]]] = [(weight, [])]
    seen: set[ir.Value] = set()
    while stack:
        value, path = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if not facts.is_forward(node):
                continue
            inner = _inner(node, index)
            if inner is not None:
                stack.append((inner, [*path, node]))
            elif index == 0 and node.op_type in VIEWS:
                stack.append((node.outputs[0], [*path, node]))
            elif index == 0 and node.op_type in LOOKUPS and node.graph is not facts.model.graph:
                matrix = rank_of(weight) == 2 and rank_of(value) in (2, None)
                if (
                    matrix
                    and facts.constant(node.inputs[1]) is None
                    and not reads_entry_by_number(node, facts)
                ):
                    return Inside([*path, node], why_not_outside(facts.model, node))
    return None


def _inner(node: ir.Node, index: int) -> ir.Value | None:
    """Return the value of a loop's body that an input of the loop is carried in."""
    loop = Recurrence.of(node)
    if loop is None:
        return None
    before = 0 if loop.is_scan else 2
    place = index - before
    return loop.states[place].inner if 0 <= place < len(loop.states) else None


def reads_entry_by_number(node: ir.Node, facts: Facts) -> bool:
    """Say whether a Gather reads entry t in iteration t: that is a slice, as a Scan reads it, no lookup."""
    body, place = node.graph, node.inputs[1]
    if place is None or body is facts.model.graph:
        return False
    for graph in (facts.model.graph, *facts.model.graph.subgraphs()):
        for owner in graph:
            if body in bodies_of(owner):
                loop = Recurrence.of(owner)
                return loop is not None and not loop.is_scan and loop.number is place
    return False
