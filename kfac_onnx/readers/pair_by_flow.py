"""Which output is the gradient of which parameter, where no name says it: read off the flow of data.

TensorFlow's exporter freezes variables to constants with names of its own, in an order of its own. An output
is a parameter's gradient if it has its shape and type and one of these holds:

- the parameter is looked up at ids, and the output scatters rows at those ids;
- the parameter is multiplied with x, and the output is a product with x;
- the parameter is added to a product with x, and the output sums what another product multiplies with x.

Between there may only be views and sums: a parameter that was scaled, and folded into a constant with its
scale, has another gradient. An output that several parameters could own is given to none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.disk.mapped import equal
from kfac_onnx.graph.numbering import Numbering
from kfac_onnx.graph.operators import (
    ELEMENTWISE,
    LOOKUPS,
    PRODUCTS,
    SCATTERS,
    VIEWS,
    Keeps,
    Trait,
    having,
    keeping,
)
from kfac_onnx.graph.values import ancestors, dtype_of, is_float, static_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["FlowPairs", "owners_by_flow", "pair_by_flow"]

PASSES: Final = VIEWS | {"Expand", "Clip"}
SUMS: Final = PASSES | (having(Trait.ADDS) - {"Sub"}) | {"ReduceSum"}
"""Operators that a gradient may pass through between the product or scatter that makes it and the output."""
CUTS: Final = (
    SUMS
    | ELEMENTWISE & (having(Trait.LINEAR) | having(Trait.SCALES))
    | keeping(Keeps.SOME, Keeps.JOINS)
    | {"Pad"}
)
"""Operators that a scaled or cut gradient passes through; it is one, but not of a parameter of its shape."""


@dataclass
class FlowPairs:
    """Parameters with their gradients, and gradients without.

    `unsure` are outputs that could belong to the parameters listed, `gone` those that are like none.
    """

    found: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    unsure: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    gone: list[str] = field(default_factory=list[str])


def pair_by_flow(model: ir.Model, loss: ir.Value) -> FlowPairs:
    """Return the gradients among the outputs of a graph whose operators are standard ones.

    Inputs are taken for parameters only where no initializer is one: else they are the batch.
    """
    forward = ancestors([loss])
    held = [value for value in model.graph.initializers.values() if value in forward and _is_tensor(value)]
    fed = [value for value in model.graph.inputs if value in forward and _is_tensor(value)]
    outputs = [value for value in dict.fromkeys(model.graph.outputs) if value not in forward]
    outputs = [value for value in outputs if _is_tensor(value)]
    evidence = _Evidence(forward)
    result = _pairs(outputs, held, fed, evidence)
    return result if result.found else _pairs(outputs, list(dict.fromkeys((*fed, *held))), [], evidence)


def owners_by_flow(model: ir.Model, loss: ir.Value, pairs: Mapping[str, ir.Value]) -> dict[str, list[str]]:
    """Return who may own the gradient of each parameter that has a likeness among the others.

    `pairs` maps a parameter to the output that is said to be its gradient. Nobody is listed where the flow of
    data says nothing; where it lists others, and not the parameter itself, the pair is wrong.
    """
    known = {str(value.name): value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    parameters = {name: known[name] for name in pairs if name in known}
    evidence = _Evidence(ancestors([loss]))
    result: dict[str, list[str]] = {}
    for name, output in pairs.items():
        alike = [item for item in parameters.values() if _is_like(item, output)]
        if len(alike) > 1:
            result[name] = [str(item.name) for item in evidence.owners(output, alike)]
    return result


def _pairs(
    outputs: list[ir.Value], parameters: list[ir.Value], batch: list[ir.Value], evidence: _Evidence
) -> FlowPairs:
    alike = {output: [item for item in parameters if _is_like(item, output)] for output in outputs}
    result = FlowPairs()
    proven = {output: evidence.owners(output, owners) for output, owners in alike.items()}
    _settle(result, {output: owners for output, owners in proven.items() if owners})
    settled, taken = set(result.found.values()), set(result.found)
    for output, owners in alike.items():
        left = [str(item.name) for item in owners if item.name not in taken]
        if output in settled or not evidence.is_gradient(output):
            continue
        if left:
            result.unsure[str(output.name)] = left
        elif not any(_is_like(item, output) for item in batch):
            result.gone.append(str(output.name))
    return result


def _is_like(parameter: ir.Value, gradient: ir.Value) -> bool:
    same = static_shape(parameter) == static_shape(gradient)
    return same and dtype_of(parameter) == dtype_of(gradient)


def _is_tensor(value: ir.Value) -> bool:
    return static_shape(value) is not None and is_float(value)


def _settle(result: FlowPairs, proven: dict[ir.Value, list[ir.Value]]) -> None:
    """Give each output its one owner, again and again, until nothing changes.

    Where two outputs claim the same parameter alone, neither gets it: an exporter merged two parameters.
    """
    while proven:
        claims: dict[ir.Value, list[ir.Value]] = {}
        for output, owners in proven.items():
            if len(owners) == 1:
                claims.setdefault(owners[0], []).append(output)
        if not claims:
            wanted = {item: [o for o, owners in proven.items() if item in owners] for item in _all(proven)}
            claims = {item: outputs for item, outputs in wanted.items() if len(outputs) == 1}
            claims = dict(list(claims.items())[:1])
        if not claims:
            return
        for owner, outputs in claims.items():
            if len(outputs) == 1:
                result.found[str(owner.name)] = outputs[0]
            for output in outputs:
                del proven[output]
        left = {o: [item for item in owners if item not in claims] for o, owners in proven.items()}
        proven = {output: owners for output, owners in left.items() if owners}


def _all(proven: dict[ir.Value, list[ir.Value]]) -> list[ir.Value]:
    return list(dict.fromkeys(item for owners in proven.values() for item in owners))


class _Evidence:
    """What the flow of data says about outputs and parameters; `forward` are the loss' ancestors."""

    def __init__(self, forward: set[ir.Value]) -> None:
        self.forward = forward
        self.numbers = Numbering()

    def is_gradient(self, output: ir.Value) -> bool:
        """Say whether an output comes from a product or scatter of something that the loss does not use."""
        for node, value in self._ends(output, CUTS):
            if node.op_type in SCATTERS or self._multiplied(value):
                return True
            if node.op_type in PRODUCTS:
                bases = [self._base(item) for item in node.inputs[:2] if item is not None]
                if any(item not in self.forward and item.producer() is not None for item in bases):
                    return True
        return False

    def _multiplied(self, value: ir.Value) -> bool:
        """Say whether a product that the loss does not use takes a value."""
        return any(
            node.op_type in PRODUCTS and not any(item in self.forward for item in node.outputs)
            for node, _ in self._uses(value, forward=False)
        )

    def owners(self, output: ir.Value, parameters: Sequence[ir.Value]) -> list[ir.Value]:
        """Return those of the parameters whose gradient the output may be, by the strongest evidence."""
        ends = list(self._ends(output, SUMS))
        scattered = {key for node, _ in ends if node.op_type in SCATTERS for key in self._ids(node.inputs[1])}
        products = [node for node, _ in ends if node.op_type in PRODUCTS]
        factors = {self._key(item) for node in products for item in node.inputs[:2]}
        summed = {value for _, value in ends}
        found = [item for item in parameters if self._fits(item, scattered, factors, summed)]
        if len(found) > 1 and products:
            # Several weights multiply the same x: the other factor, dL/d(product), also meets its own weight.
            operands = [item for node in products for item in node.inputs[:2] if item is not None]
            deltas = [item for item in operands if self._base(item) not in self.forward]
            own = [item for item in found if any(self._meets(delta, item) for delta in deltas)]
            found = own or found
        return found

    def _fits(
        self, parameter: ir.Value, scattered: set[int], factors: set[int], summed: set[ir.Value]
    ) -> bool:
        for node, value in self._uses(parameter):
            others = [item for item in node.inputs if item is not None and item is not value]
            if node.op_type in LOOKUPS and node.inputs[0] is value:
                if scattered & set(self._ids(node.inputs[1])):
                    return True
            elif node.op_type in PRODUCTS and len(node.inputs) > 2 and node.inputs[2] is value:
                if self._is_bias([node.outputs[0]], summed):
                    return True
            elif node.op_type in PRODUCTS:
                if any(self._key(item) in factors for item in others):
                    return True
            elif node.op_type in having(Trait.ADDS) and self._is_bias(others, summed):
                return True
        return False

    def _is_bias(self, others: list[ir.Value], summed: set[ir.Value]) -> bool:
        made = [self._base(item).producer() for item in others]
        sources = {
            self._key(item)
            for node in made
            if node is not None and node.op_type in PRODUCTS
            for item in node.inputs[:2]
        }
        return any(
            self._key(item) in sources
            for value in summed
            for node, view in self._uses(self._base(value), forward=False)
            if node.op_type in PRODUCTS
            for item in node.inputs[:2]
            if item is not None and item is not view
        )

    def _meets(self, delta: ir.Value, parameter: ir.Value) -> bool:
        """Say whether a product multiplies `delta` with the parameter, or with a copy that was folded."""
        for node, view in self._uses(self._base(delta), forward=False):
            if node.op_type in PRODUCTS:
                others = [item for item in node.inputs[:2] if item is not None and item is not view]
                if any(_same_contents(self._base(item), parameter) for item in others):
                    return True
        return False

    def _uses(self, value: ir.Value, *, forward: bool = True) -> Iterator[tuple[ir.Node, ir.Value]]:
        """Yield the operators that use a value through views, each with the view that it takes."""
        stack, seen = [value], set[ir.Value]()
        while stack:
            view = stack.pop()
            if view in seen:
                continue
            seen.add(view)
            for node, _ in view.uses():
                if forward and not any(item in self.forward for item in node.outputs):
                    continue
                if node.op_type in PASSES and node.inputs[0] is view:
                    stack.append(node.outputs[0])
                else:
                    yield node, view

    def _ends(self, output: ir.Value, through: frozenset[str]) -> Iterator[tuple[ir.Node, ir.Value]]:
        """Yield the operators of all chains of `through` that end in the output, with their results."""
        stack, seen = [output], set[ir.Value]()
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in seen or node is None or value in self.forward:
                continue
            seen.add(value)
            yield node, value
            if node.op_type in through:
                stack.extend(item for item in node.inputs if item is not None and is_float(item))

    def _base(self, value: ir.Value | None) -> ir.Value:
        if value is None:
            raise AssertionError("a product has two operands")
        while (node := value.producer()) is not None and node.op_type in PASSES:
            source = node.inputs[0]
            if source is None:
                break
            value = source
        return value

    def _key(self, value: ir.Value | None) -> int:
        return self.numbers.number(self._base(value))

    def _ids(self, indices: ir.Value | None) -> list[int]:
        """Return the numbers of the values that indices may come from."""
        return [] if indices is None else [self._key(indices)]


def _same_contents(value: ir.Value, parameter: ir.Value) -> bool:
    if value is parameter:
        return True
    if value.const_value is None or parameter.const_value is None or value.producer() is not None:
        return False
    one, other = value.const_value, parameter.const_value
    if sorted(one.shape.numpy()) != sorted(other.shape.numpy()):
        return False
    held, own = one.numpy(), other.numpy()
    return equal(held, own) or (own.ndim == 2 and equal(held, own.T))
