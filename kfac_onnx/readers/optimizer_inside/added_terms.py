"""How a parameter passes into its new value, and what is added to it on the way.

    W' = c·W + term + term + ...

The way from W' back to W goes through sums, scalings, views, guards (`Where`) and scatters that add rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import ORDERED_VIEWS, SCATTERS, Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, static_shape
from kfac_onnx.readers.optimizer_inside.flow import Flow, operands

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Source", "Spine", "Term", "linear_sources", "spine_of"]

LIMIT: Final = 256
"""Nodes within which a parameter passes into its new value."""
SUMS: Final = having(Trait.ADDS)
BOUNDS: Final = having(Trait.BOUNDS)
KEEPS: Final = 0.5
"""Smallest constant that a parameter may be scaled by in one update: weight decay is far above."""


@dataclass(frozen=True)
class Source:
    """An input or initializer that passes linearly into a value: `exact` with coefficient one.

    `added` says that something is added to it on the way.
    """

    value: ir.Value
    exact: bool
    added: bool


@dataclass(frozen=True)
class Term:
    """Something added to the parameter: a tensor, or the rows that `scatter` adds.

    `views` turn it into the parameter's shape, the first of them first.
    """

    value: ir.Value
    scatter: ir.Node | None = None
    views: tuple[ir.Node, ...] = ()


@dataclass
class Spine:
    """What is added to a parameter, and what else happens to it."""

    terms: list[Term] = field(default_factory=list[Term])
    decayed: bool = False
    bounded: bool = False
    views: tuple[ir.Node, ...] = ()


def linear_sources(value: ir.Value, flow: Flow) -> list[Source]:
    """Return the inputs and initializers that pass linearly into a value, those nearest to it first.

    One that passes with a coefficient that is no weight decay (below `KEEPS`, negative, or unknown) is left
    out.
    """
    found: dict[ir.Value, tuple[bool, bool]] = {}
    queue: list[tuple[ir.Value, bool, bool]] = [(value, True, False)]
    seen: set[ir.Value] = set()
    while queue and len(seen) < LIMIT:
        item, exact, added = queue.pop(0)
        node = item.producer()
        if node is None:
            before = found.get(item, (False, False))
            found[item] = (before[0] or exact, before[1] or added)
        elif item not in seen:
            seen.add(item)
            adds = added or node.op_type in SUMS | SCATTERS
            queue.extend((part, exact and one, adds) for part, one in _parts(node, flow))
    return [Source(item, exact, added) for item, (exact, added) in found.items()]


def _parts(node: ir.Node, flow: Flow) -> list[tuple[ir.Value, bool]]:
    """Return the inputs that pass positively into a node's result; whether with coefficient one."""
    if node.domain not in ONNX_DOMAINS or not node.inputs or node.inputs[0] is None:
        return []
    first = node.inputs[0]
    op = node.op_type
    if op in ORDERED_VIEWS or op in SCATTERS or op == "Transpose":
        return [(first, True)]
    if op in ("Add", "Sum"):
        return [(item, True) for item in operands(node)]
    if op == "Sub":
        return [(first, True)]
    if op == "Where":
        return [(item, True) for item in operands(node)[1:]]
    if op in BOUNDS:
        return [(item, True) for item in operands(node) if not flow.is_number(item)] or [(first, True)]
    if op in ("Mul", "Div"):
        parts: list[tuple[ir.Value, bool]] = []
        for item in dict.fromkeys(operands(node)[: 2 if op == "Mul" else 1]):
            other = node.inputs[1] if item is first else first
            if flow.is_number(other) and other is not item and (kept := _keeps(other, op, flow)) is not None:
                parts.append((item, kept == 1.0))
        return parts
    return []


def _keeps(factor: ir.Value | None, op: str, flow: Flow) -> float | None:
    """Return the number by which weight decay scales a parameter (less than one where unknown), or None."""
    number = flow.number(factor)
    if number is not None:
        number = number if op == "Mul" else 1.0 / number if number else 0.0
        return number if KEEPS <= number <= 1.0 else None
    node = None if factor is None else factor.producer()
    while node is not None and node.op_type in ORDERED_VIEWS | {"Expand"} and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "Sub" and flow.number(node.inputs[0]) == 1.0:
        return KEEPS
    return None


def spine_of(new: ir.Value, parameter: ir.Value, flow: Flow) -> Spine | Miss:
    """Return what is added to `parameter` to make `new`."""
    reach = _Reach(parameter, flow)
    spine = Spine()
    value = new
    for _ in range(LIMIT):
        if value is parameter:
            return spine
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS:
            break
        op = node.op_type
        if op in SCATTERS:
            if (miss := _scatter(node, spine)) is not None:
                return miss
            following = node.inputs[0]
        elif op in SUMS:
            following = _sum(node, spine, reach, flow)
        elif op == "Where":
            following = _guarded(node, flow)
        elif op in BOUNDS:
            spine.bounded = True
            following = next((item for item in operands(node) if reach(item)), None)
        elif op in ("Mul", "Div"):
            following = next((item for item in operands(node) if reach(item)), None)
            spine.decayed = True
        else:
            following = node.inputs[0] if op in ORDERED_VIEWS or op == "Transpose" else None
            spine.views = (node, *spine.views)
        if following is None or not reach(following):
            break
        value = following
    if not spine.terms and flow.batch and new in flow.batch and not flow.is_number(new):
        return Spine([Term(new)], bounded=True)  # some other function of the parameter and its gradient
    return Miss(f"'{parameter.name}' does not pass into '{new.name}' by addition")


class _Reach:
    """Says whether a parameter passes linearly into a value."""

    def __init__(self, parameter: ir.Value, flow: Flow) -> None:
        self.parameter = parameter
        self.flow = flow
        self._known: dict[ir.Value, bool] = {}

    def __call__(self, value: ir.Value) -> bool:
        if value not in self._known:
            sources = linear_sources(value, self.flow)
            self._known[value] = any(item.value is self.parameter for item in sources)
        return self._known[value]


def _scatter(node: ir.Node, spine: Spine) -> Miss | None:
    found = node.attributes.get("reduction")
    kind = "none" if found is None else found.as_string()
    if kind != "add" or len(node.inputs) < 3 or node.inputs[2] is None:
        return Miss(
            f"{node.op_type} '{node.outputs[0].name}' sets rows (reduction={kind}), "
            "so of rows that repeat in a batch only one counts"
        )
    spine.terms.append(Term(node.inputs[2], node, spine.views))
    return None


def _sum(node: ir.Node, spine: Spine, reach: _Reach, flow: Flow) -> ir.Value | None:
    """Follow the operand that is the parameter itself; the others are what is added."""
    items = operands(node)
    ways = [item for item in (items[:1] if node.op_type == "Sub" else items) if reach(item)]
    if not ways:
        return None
    # W + (−lr)·(g + decay·W): the operand that does not depend on the batch is the parameter itself
    way = next((item for item in ways if item not in flow.batch), ways[0])
    for item in items:
        if item is way:
            continue
        if item in flow.batch and (not flow.is_number(item) or _single(way)):
            spine.terms.append(Term(item, views=spine.views))
    return way


def _single(value: ir.Value) -> bool:
    shape = static_shape(value)
    return shape is not None and all(dim == 1 for dim in shape)


def _guarded(node: ir.Node, flow: Flow) -> ir.Value | None:
    """Follow the branch of a Where that is updated; the other keeps the parameter as it was."""
    updated = [item for item in operands(node)[1:] if item in flow.batch]
    return updated[0] if len(updated) == 1 else None
