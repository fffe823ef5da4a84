"""Whether an update goes against the value that was found as its gradient, or along it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from kfac_onnx.graph.operators import ORDERED_VIEWS, SCATTERS, VIEWS, Trait, having
from kfac_onnx.readers.optimizer_inside.flow import Flow, operands

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Polarity", "polarity_of"]

Polarity: TypeAlias = Literal["along", "against", "even", "none", "unknown"]
"""How a value changes with the gradient: with it, against it, with its size alone, not at all."""

SIGNED: Final = VIEWS | having(Trait.KEEPS_SIGN) | {"Expand"}
# the bounds of a Clip are no gradients, and Sub negates its second operand
JOINED: Final = (having(Trait.ADDS) | having(Trait.BOUNDS)) - {"Clip", "Sub"}
FLIPPED: dict[Polarity, Polarity] = {"along": "against", "against": "along"}
DEPTH = 400


def polarity_of(value: ir.Value, gradient: ir.Value, flow: Flow) -> Polarity:
    """Return how `value` changes with `gradient`; learning rates and norms count as positive."""
    return _Walk(gradient, flow).of(value, 0)


class _Walk:
    def __init__(self, gradient: ir.Value, flow: Flow) -> None:
        self.gradient = gradient
        self.flow = flow
        self.single = flow.is_number(gradient)
        self.known: dict[ir.Value, Polarity] = {gradient: "along"}

    def of(self, value: ir.Value | None, depth: int) -> Polarity:
        if value is None:
            return "none"
        if value not in self.known:
            self.known[value] = "unknown"  # also where the walk is too deep
            self.known[value] = self._of(value, depth) if depth < DEPTH else "unknown"
        return self.known[value]

    def _of(self, value: ir.Value, depth: int) -> Polarity:
        node = value.producer()
        if node is None or value not in self.flow.batch or value in self.flow.forward:
            return "none"
        if not self.single and self.flow.is_number(value):  # a norm, a condition
            return "none"
        parts: list[Polarity] = [self.of(item, depth + 1) for item in node.inputs]
        op = node.op_type
        if op in SIGNED:
            return parts[0]
        if op == "Neg":
            return FLIPPED.get(parts[0], parts[0])
        if op in JOINED:
            return _joined(parts)
        if op == "Sub":
            return _joined([parts[0], FLIPPED.get(parts[1], parts[1])])
        if op == "Where":
            return _joined(parts[1:])
        if op in SCATTERS:
            return _joined([parts[0], parts[2]])
        if op in ("Mul", "Div"):
            return self._product(node, parts)
        if op in having(Trait.UNSIGNED) | {"Pow"}:
            return "none" if set(parts) == {"none"} else "even"
        return "none" if set(parts) <= {"none"} else "unknown"

    def _product(self, node: ir.Node, parts: list[Polarity]) -> Polarity:
        negative = False
        for item, part in zip(operands(node), parts, strict=True):
            number = self.flow.number(item)
            negative ^= part == "none" and (number < 0 if number is not None else self._negated(item))
        odd: list[Polarity] = [part for part in parts if part in FLIPPED]
        if "unknown" in parts:
            return "unknown"
        if len(odd) == len(parts):
            return "even"
        if not odd:
            return "even" if "even" in parts else "none"
        return FLIPPED[odd[0]] if negative else odd[0]

    def _negated(self, value: ir.Value) -> bool:
        """Say whether a number is the negative of another, such as −lr."""
        node = value.producer()
        while node is not None and (node.op_type in ORDERED_VIEWS or node.op_type == "Expand"):
            source = node.inputs[0]
            node = None if source is None else source.producer()
        if node is None:
            return False
        if node.op_type == "Neg":
            return True
        if node.op_type not in ("Mul", "Div"):
            return False
        signs = [self.flow.number(item) for item in operands(node)]
        return sum(number is not None and number < 0 for number in signs) % 2 == 1


def _joined(parts: list[Polarity]) -> Polarity:
    odd: set[Polarity] = {part for part in parts if part != "none"}
    if not odd:
        return "none"
    return odd.pop() if len(odd) == 1 else "unknown"
