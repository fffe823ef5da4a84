"""What an update is made of, by data flow: which values depend on the batch, on states, or are one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.backward import captured_values
from kfac_onnx.graph.constants import Constants
from kfac_onnx.graph.operators import ELEMENTWISE, ORDERED_VIEWS, Keeps, Trait, having, keeping
from kfac_onnx.graph.values import ONNX_DOMAINS, ancestors, dtype_of, static_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["PER_ENTRY", "Flow", "factor_of", "operands"]

CONDITIONS: Final = having(Trait.BOOLEAN)
PER_ENTRY: Final = ORDERED_VIEWS | (ELEMENTWISE - CONDITIONS)
"""Operators that an optimizer applies to every entry of a gradient alike."""
FILLS: Final = keeping(Keeps.REPEATS)
NEARLY: Final = 1e-5
"""Relative difference below which float32 constants are taken as the same number."""


class Flow:
    """Answers about the values of one graph, whose nodes are sorted.

    `forward` is everything that the loss is computed from. `states` are inputs that the loss does not
    depend on (an optimizer's moments, counters and learning rates), and initializers that are
    declared to change. After `mark`, `batch` holds what depends on the batch, `held` what depends on a state
    that is a tensor, `tuned` what depends on any state.
    """

    def __init__(self, model: ir.Model, losses: Iterable[ir.Value], changing: Collection[ir.Value]) -> None:
        self.model = model
        self.order = {node: index for index, node in enumerate(model.graph)}
        self.forward = ancestors(losses)
        leaves = dict.fromkeys([*model.graph.inputs, *changing])
        self.states = {value for value in leaves if value not in self.forward}
        self.constants = Constants(leaves, model.opset_imports.get("", 18))
        self.batch = set[ir.Value]()
        self.held = set[ir.Value]()
        self.tuned = set[ir.Value]()
        self._numbers: dict[ir.Value, bool] = {}
        self._behind: dict[ir.Value, set[ir.Value]] = {}

    def mark(self, parameters: Collection[ir.Value]) -> None:
        """Say which values are the trained parameters; every other input of the loss is the batch's."""
        self.batch = {value for value in self.model.graph.inputs if value in self.forward}
        self.batch -= set(parameters)
        self.tuned = set(self.states)
        self.held = {value for value in self.states if not self.is_number(value)}
        for node in self.model.graph:
            read = [value for value in (*node.inputs, *captured_values(node)) if value is not None]
            for marked in (self.batch, self.held, self.tuned):
                if any(value in marked for value in read):
                    marked.update(node.outputs)

    def is_number(self, value: ir.Value | None) -> bool:
        """Say whether all entries of a value are one number: a scalar, or a scalar that is spread out."""
        if value is None:
            return False
        if value not in self._numbers:
            self._numbers[value] = False
            self._numbers[value] = self._is_number(value)
        return self._numbers[value]

    def _is_number(self, value: ir.Value) -> bool:
        shape = static_shape(value)
        if shape is not None and int(np.prod(shape)) == 1:
            return True
        node = value.producer()
        if node is None or (node.op_type == "Constant" and not node.domain):
            array = self.constants.constant(value)
            return array is not None and array.size > 0 and bool(np.all(array == array.reshape(-1)[0]))
        if node.domain not in ONNX_DOMAINS:
            return False
        if node.op_type == "ConstantOfShape":
            return True
        if node.op_type in FILLS or node.op_type in ORDERED_VIEWS:
            return self.is_number(node.inputs[0])
        if node.op_type in PER_ENTRY or node.op_type in CONDITIONS:
            return all(item is None or self.is_number(item) for item in node.inputs)
        return False

    def number(self, value: ir.Value | None) -> float | None:
        """Return the constant that all entries of a value are, or None."""
        if value is None or not self.is_number(value):
            return None
        array = self.constants.constant(value)
        if array is not None and array.size:
            return float(array.reshape(-1)[0])
        node = value.producer()
        if node is not None and node.op_type in FILLS | ORDERED_VIEWS:
            return self.number(node.inputs[0])
        return None

    def behind(self, value: ir.Value) -> set[ir.Value]:
        """Return what a value, such as a norm of gradients, is computed from, as far as the forward part."""
        if value not in self._behind:
            seen: set[ir.Value] = set()
            stack = [value]
            while stack:
                item = stack.pop()
                node = item.producer()
                if item in seen or item not in self.batch or item in self.forward or node is None:
                    continue
                seen.add(item)
                stack.extend(operands(node))
            self._behind[value] = seen
        return self._behind[value]

    def is_float(self, value: ir.Value) -> bool:
        """Say whether a value holds floating-point numbers, or may."""
        dtype = dtype_of(value)
        return dtype is None or dtype.is_floating_point()


def operands(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are there."""
    return [value for value in node.inputs if value is not None]


def factor_of(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return what `value` is multiplied with or divided by in a Mul or Div node, else None."""
    if node.domain not in ONNX_DOMAINS or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if node.op_type == "Mul" and first is not second:
        return second if value is first else first if value is second else None
    return second if node.op_type == "Div" and value is first and value is not second else None
