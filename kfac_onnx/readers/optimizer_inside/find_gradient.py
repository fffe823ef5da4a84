"""From what is added to a parameter back to the gradient that it is made of.

Everything that an optimizer computes for a parameter, it computes from the one gradient, its own states and
numbers. So the gradient is a value that all ways from the update back to the batch pass through (a
dominator). Of those values the right one is the first behind which no state is read, no entry is put
through a function that is not linear, and no learning rate or norm is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.operators import ELEMENTWISE, ORDERED_VIEWS, VIEWS, Trait, having
from kfac_onnx.graph.values import ONNX_DOMAINS, static_shape
from kfac_onnx.readers.optimizer_inside.flow import PER_ENTRY, Flow, factor_of, operands

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import onnx_ir as ir

__all__ = ["Crossing", "Found", "find_gradient"]

LIMIT: Final = 512
"""Nodes of an optimizer's arithmetic for one parameter."""
NEARLY: Final = 1e-5


@dataclass(frozen=True)
class Crossing:
    """What lies between one candidate and the next: `needed` parts surely belong to the optimizer.

    `factor` is a constant that may be a learning rate or a part of the gradient.
    """

    value: ir.Value
    needed: bool
    factor: float | None = None
    clips: bool = False
    tuned: bool = False
    view: ir.Node | None = None

    @property
    def rates(self) -> bool:
        """Whether a learning rate is multiplied here."""
        return self.tuned or (self.factor is not None and self.factor != -1.0)


@dataclass(frozen=True)
class Found:
    """The gradient in an update; `constant` is a factor below which another candidate lies (`inner`).

    `views` and `inner_views` turn the gradient into the parameter's shape, the first of them first.
    """

    value: ir.Value
    views: tuple[ir.Node, ...]
    inner: ir.Value | None
    inner_views: tuple[ir.Node, ...]
    constant: float | None
    held: bool
    clipped: bool
    rated: bool
    rate: float | None


def find_gradient(
    starts: Sequence[ir.Value],
    shape: tuple[int, ...] | None,
    flow: Flow,
    known: Collection[ir.Value],
    outer: Sequence[ir.Node] = (),
) -> Found | Miss:
    """Return the gradient that all of `starts` are computed from; `shape` is that of the gradient.

    `outer` are views of the starts that lead to that shape, the first of them first. `known` are values
    that are gradients for sure: of the candidates, one of them is taken.
    """
    single = shape is not None and all(dim == 1 for dim in shape)
    candidates: list[ir.Value] = []
    crossings: list[Crossing] = []
    held = False
    for value, region in _dominators(starts, flow, single):
        if candidates or region:
            previous = candidates[-1] if candidates else None
            stateful = any(item in flow.held for item in ([previous] if previous else starts))
            crossing = _cross(previous, value, region, stateful, flow)
            if crossing is None:
                break
            held = held or stateful
            crossings.append(crossing)
        candidates.append(value)
        if value in known:
            break
    if not candidates:
        return Miss("what is added to it is not computed from one gradient")
    offset = len(candidates) - len(crossings)  # 0 where several starts were joined by the first crossing
    depth = max((i + 1 for i, item in enumerate(crossings) if item.needed), default=0)
    if candidates[-1] in known:
        depth = len(crossings)
    index = depth - (1 - offset) if offset == 0 else depth
    chosen = candidates[max(index, 0)]
    if chosen in flow.held:
        return Miss("what is added to it reads optimizer states, and no single gradient is behind them")
    constants = [item.factor for item in crossings[:depth] if item.factor is not None]
    factors = [(i, item) for i, item in enumerate(crossings) if i >= depth and item.factor is not None]
    scaling = next((pair for pair in factors if abs(pair[1].factor or 1.0) != 1.0), None)
    scaling = scaling or next((pair for pair in factors if pair[1].factor == 1.0), None)
    placed = _shaped(chosen, crossings, depth, shape, outer)
    inner = None if scaling is None else _shaped(scaling[1].value, crossings, scaling[0] + 1, shape, outer)
    if placed is None or (scaling is not None and inner is None):
        return Miss(f"'{chosen.name}', which its update is made of, has another shape")
    return Found(
        value=placed[0],
        views=placed[1],
        inner=None if inner is None else inner[0],
        inner_views=() if inner is None else inner[1],
        constant=None if scaling is None else scaling[1].factor,
        held=held,
        clipped=any(item.clips for item in crossings[:depth]),
        rated=any(item.rates for item in crossings[:depth]) or candidates[-1] in known,
        rate=next((abs(item) for item in constants if abs(item) != 1.0), None),
    )


def _shaped(
    value: ir.Value,
    crossings: Sequence[Crossing],
    depth: int,
    shape: tuple[int, ...] | None,
    outer: Sequence[ir.Node],
) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """Return a value of the gradient's shape: this one, one behind views of it, or itself through views."""
    own = static_shape(value)
    if shape is None or own is None or own == shape:
        return value, ()
    following = value
    for item in crossings[depth:]:
        if item.view is None:
            break
        following = item.value
        if static_shape(following) == shape:
            return following, ()
    views: list[ir.Node] = []
    inner = [item.view for item in reversed(crossings[:depth]) if item.view is not None]
    for view in (*inner, *outer):
        views.append(view)
        if static_shape(view.outputs[0]) == shape:
            return value, tuple(views)
    return None


def _dominators(
    starts: Sequence[ir.Value], flow: Flow, single: bool
) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Yield the values that all ways from the batch to `starts` pass, nearest first, with what is between."""
    pending = dict.fromkeys(value for value in starts if value in flow.batch)
    region: list[ir.Node] = []
    for _ in range(LIMIT):
        if not pending or any(value in flow.forward for value in pending):
            return
        if len(pending) == 1:
            yield next(iter(pending)), region
            region = []
        value = max(pending, key=lambda item: _index(item, flow))
        node = value.producer()
        if node is None:
            return
        region.append(node)
        for item in [item for item in pending if item.producer() is node]:
            del pending[item]
        pending.update(dict.fromkeys(_followed(node, flow, single)))


def _index(value: ir.Value, flow: Flow) -> int:
    node = value.producer()
    return -1 if node is None else flow.order.get(node, -1)


def _followed(node: ir.Node, flow: Flow, single: bool) -> list[ir.Value]:
    """Return the inputs through which a gradient may come: tensors of numbers that depend on the batch."""
    return [
        value
        for value in operands(node)
        if value in flow.batch and flow.is_float(value) and (single or not flow.is_number(value))
    ]


def _cross(
    previous: ir.Value | None, value: ir.Value, region: list[ir.Node], stateful: bool, flow: Flow
) -> Crossing | None:
    """Say what lies between two candidates; None where it belongs to the gradient itself."""
    if not flow.is_float(value):
        return None
    if stateful:
        number = flow.number(factor_of(region[0], value)) if len(region) == 1 else None
        view = region[0] if len(region) == 1 and region[0].op_type in VIEWS else None
        return Crossing(value, needed=True, factor=number, view=view)
    if any(node.domain not in ONNX_DOMAINS or node.op_type not in PER_ENTRY for node in region):
        return _permuted(value, region)
    if len(region) == 1:
        return _cross_one(value, region[0], flow)
    if previous is None:
        return None  # a sum of several gradients, or of the parts of one
    if not _linear(region, flow, single=False) or any(node.op_type == "Where" for node in region):
        return Crossing(value, needed=True, clips=True)
    return None


def _permuted(value: ir.Value, region: list[ir.Node]) -> Crossing | None:
    one = len(region) == 1 and region[0].op_type == "Transpose"
    return Crossing(value, needed=False, view=region[0]) if one else None


def _cross_one(value: ir.Value, node: ir.Node, flow: Flow) -> Crossing | None:
    op = node.op_type
    if op in ORDERED_VIEWS:
        return Crossing(value, needed=False, view=node)
    if op == "Neg":
        return Crossing(value, needed=False)
    factor = factor_of(node, value)
    if factor is not None:
        if not flow.is_number(factor):
            return None
        number = flow.number(factor)
        if number is not None:
            number = number if op == "Mul" else 1.0 / number if number else None
            if _completes(number, node, flow):
                return Crossing(value, needed=True)
            return Crossing(value, needed=False, factor=number)
        if factor in flow.tuned:
            return Crossing(value, needed=True, tuned=True)
        if factor in flow.batch and value in flow.behind(factor):
            return Crossing(value, needed=True, clips=True)
        return None
    if op in having(Trait.ADDS):
        others = [item for item in operands(node) if item is not value]
        plain = all(item not in flow.batch for item in others) and (op != "Sub" or node.inputs[0] is value)
        return Crossing(value, needed=True) if plain and others else None
    if op == "Where":
        number = flow.is_number(node.inputs[0])
        return Crossing(value, needed=True, clips=True) if number else None
    return Crossing(value, needed=True, clips=op in having(Trait.BOUNDS))


def _completes(factor: float | None, node: ir.Node, flow: Flow) -> bool:
    """Say whether a factor c and a state's factor b make an average: b·m + c·g with b + c = 1."""
    if factor is None:
        return False
    for use in node.outputs[0].uses():
        if use.node.op_type not in ("Add", "Sum"):
            continue
        for item in operands(use.node):
            producer = item.producer()
            if item is node.outputs[0] or item not in flow.held or producer is None:
                continue
            kept = next((flow.number(part) for part in operands(producer) if flow.is_number(part)), None)
            if kept is not None and abs(kept + factor - 1.0) < NEARLY:
                return True
    return False


def _linear(region: list[ir.Node], flow: Flow, single: bool) -> bool:
    """Say whether a region's result is a linear function of what it is computed from."""
    for node in region:
        if node.op_type in ORDERED_VIEWS or node.op_type in ELEMENTWISE & having(Trait.LINEAR):
            continue
        followed = _followed(node, flow, single)
        if node.op_type == "Mul" and len(followed) == 1 and node.inputs[0] is not node.inputs[1]:
            continue
        if node.op_type == "Div" and len(followed) == 1 and node.inputs[0] is followed[0]:
            continue
        return False
    return True
