"""The updates of a graph that contains its optimizer: parameter, new value, gradient, kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import static_shape
from kfac_onnx.readers.optimizer_inside.added_terms import Spine, Term, spine_of
from kfac_onnx.readers.optimizer_inside.find_gradient import Found, find_gradient
from kfac_onnx.readers.optimizer_inside.flow import operands
from kfac_onnx.readers.optimizer_inside.gradient_sign import polarity_of
from kfac_onnx.readers.optimizer_inside.optimizer_nodes import NodeUpdate, node_update

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kfac_onnx.readers.optimizer_inside.flow import Flow

__all__ = ["Part", "Update", "find_updates"]


@dataclass(frozen=True)
class Part:
    """A part of a gradient: a tensor, or rows that `scatter` adds. `negative`: the graph has its negative.

    `views` are applied to the value, the first of them first.
    """

    value: ir.Value
    views: tuple[ir.Node, ...]
    scatter: ir.Node | None
    negative: bool


@dataclass(frozen=True)
class Update:
    """How one parameter is updated; its gradient is the sum of `parts`."""

    parameter: ir.Value
    new: ir.Value
    parts: tuple[Part, ...]
    kind: str
    rate: float | None
    decayed: bool
    clipped: bool
    states: tuple[ir.Value, ...]
    sure: bool
    """Whether the gradient's scale is certain: if not, a constant may be a part of it or a learning rate."""


@dataclass
class _Draft:
    parameter: ir.Value
    new: ir.Value
    spine: Spine
    found: list[tuple[Term, Found]] = field(default_factory=list["tuple[Term, Found]"])


def find_updates(
    pairs: Mapping[ir.Value, ir.Value], flow: Flow, known: Collection[ir.Value]
) -> tuple[list[Update], dict[ir.Value, Miss]]:
    """Return the updates, and for each parameter whose gradient could not be told, why.

    `known` are values that are gradients for sure.
    """
    drafts: list[_Draft] = []
    stated: list[Update] = []
    misses: dict[ir.Value, Miss] = {}
    for parameter, new in pairs.items():
        step = node_update(new, parameter)
        if step is not None:
            outcome = step if isinstance(step, Miss) else _of_node(step, parameter, new, flow, known)
            if isinstance(outcome, Miss):
                misses[parameter] = outcome
            else:
                stated.append(outcome)
            continue
        spine = spine_of(new, parameter, flow)
        if isinstance(spine, Miss):
            misses[parameter] = spine
            continue
        found = _of_terms(spine, parameter, flow, known)
        if isinstance(found, Miss):
            misses[parameter] = found
        else:
            drafts.append(_Draft(parameter, new, spine, found))
    plain = [item for draft in drafts for _, item in draft.found if not item.held and not item.rated]
    peel = bool(plain) and all(item.inner is not None for item in plain)
    return [*stated, *(_update(draft, flow, peel) for draft in drafts)], misses


def _of_node(
    step: NodeUpdate, parameter: ir.Value, new: ir.Value, flow: Flow, known: Collection[ir.Value]
) -> Update | Miss:
    """Return what an optimizer node does; its gradient may be clipped or scaled on the way into the node."""
    found = find_gradient([step.gradient], static_shape(step.gradient), flow, known)
    if isinstance(found, Miss):
        return found
    if found.value in flow.forward or found.value not in flow.batch:
        return Miss(f"'{found.value.name}', which {step.kind} takes as its gradient, is no gradient")
    against = polarity_of(step.gradient, found.value, flow) == "against"
    value = found.value
    if against and (inner := _negated(value)) is not None:
        value, against = inner, False
    return Update(
        parameter=parameter,
        new=new,
        parts=(Part(value, found.views, None, against),),
        kind=step.kind,
        rate=flow.number(step.rate),
        decayed=step.decayed,
        clipped=found.clipped,
        states=step.states,
        sure=True,
    )


def _of_terms(
    spine: Spine, parameter: ir.Value, flow: Flow, known: Collection[ir.Value]
) -> list[tuple[Term, Found]] | Miss:
    dense = [term for term in spine.terms if term.scatter is None]
    rows = [term for term in spine.terms if term.scatter is not None]
    if not spine.terms:
        return Miss("nothing that depends on the batch is added to it")
    results: list[tuple[Term, Found]] = []
    if dense:
        shape = static_shape(parameter)
        joint = find_gradient([term.value for term in dense], shape, flow, known, dense[0].views)
        if isinstance(joint, Found):
            results.append((dense[0], joint))
        else:
            for term in dense:
                found = find_gradient([term.value], shape, flow, known, term.views)
                if isinstance(found, Miss) or len(dense) == 1:
                    return found if isinstance(found, Miss) else joint
                if found.held:
                    return joint
                results.append((term, found))
    for term in rows:
        if any(view.op_type not in ("Identity", "Cast") for view in term.views):
            return Miss("rows are added to a view of it")
        found = find_gradient([term.value], static_shape(term.value), flow, known)
        if isinstance(found, Miss):
            return found
        results.append((term, found))
    for _, found in results:
        if found.value in flow.forward or found.value not in flow.batch:
            return Miss(f"'{found.value.name}', which is added to it, is no gradient")
    return results


def _update(draft: _Draft, flow: Flow, peel: bool) -> Update:
    parts: list[Part] = []
    rate: float | None = None
    for term, found in draft.found:
        value, views, constant = found.value, found.views, None
        if peel and not found.held and not found.rated and found.inner is not None:
            value, views, constant = found.inner, found.inner_views, found.constant
        rate = rate or found.rate or (None if constant is None else abs(constant))
        along = polarity_of(draft.new, value, flow) == "along"
        if along and (inner := _negated(value)) is not None:
            value, along = inner, False
        parts.append(Part(value, views, term.scatter, along))
    states, roots, reads = _inside(draft, [part.value for part in parts], flow)
    held = any(found.held for _, found in draft.found)
    return Update(
        parameter=draft.parameter,
        new=draft.new,
        parts=tuple(parts),
        kind=_kind(states, roots, held),
        rate=rate,
        decayed=draft.spine.decayed or reads > 1,
        clipped=any(found.clipped for _, found in draft.found),
        states=states,
        sure=all(found.held or found.rated for _, found in draft.found),
    )


def _negated(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Neg" and not node.domain else None


def _inside(draft: _Draft, gradients: list[ir.Value], flow: Flow) -> tuple[tuple[ir.Value, ...], bool, int]:
    """Return the tensors of state that an update reads, whether it takes roots, and how often it reads W."""
    states: dict[ir.Value, None] = {}
    roots, readers = False, set[ir.Node]()
    stack, seen = [draft.new], set(gradients)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if value in flow.states and not flow.is_number(value):
            states[value] = None
        if node is None or value in flow.forward or (value in flow.batch and flow.is_number(value)):
            continue
        roots = roots or (node.op_type in ("Sqrt", "Pow") and not flow.is_number(value))
        if draft.parameter in operands(node) and node.op_type not in ("Where", "Shape"):
            readers.add(node)
        stack.extend(operands(node))
    return tuple(states), roots, len(readers)


def _kind(states: tuple[ir.Value, ...], roots: bool, held: bool) -> str:
    """Return what an update is called, by the states that it keeps and whether it takes roots."""
    if not states or not held:
        return "sgd" if not roots else "an optimizer that keeps no state"
    if not roots:
        return "momentum" if len(states) == 1 else "an optimizer with several states"
    return "adagrad or rmsprop" if len(states) == 1 else "adam"
