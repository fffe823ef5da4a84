"""Which values are equal because the same operators compute them from the same sources.

Exporters recompute: JAX's backward derives the ids of its scatter from the graph's input a second time. Two
values get the same number if their operators, attributes and inputs have the same numbers, up to
Identity. Equal numbers mean equal values; different numbers mean nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.graph.operators import RANDOM
from kfac_onnx.graph.values import ONNX_DOMAINS, contents_of

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Numbering"]

SMALL: Final = 1 << 12
"""Entries above which two constants are not compared by their contents."""


class Numbering:
    """Numbers of the values of one model, found when asked for and remembered."""

    def __init__(self) -> None:
        self._numbers: dict[ir.Value, int] = {}
        self._keys: dict[Hashable, int] = {}

    def number(self, value: ir.Value) -> int:
        """Return the number of a value; looks at what it is computed from, without recursion."""
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self._numbers:
                stack.pop()
                continue
            node = top.producer()
            sources = [] if node is None or _is_opaque(node) else list(node.inputs)
            waiting = [item for item in sources if item is not None and item not in self._numbers]
            if waiting:
                stack.extend(waiting)
                continue
            self._numbers[top] = self._new(top, node)
            stack.pop()
        return self._numbers[value]

    def same(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        """Say whether two values are known to be equal."""
        if one is None or other is None:
            return False
        return one is other or self.number(one) == self.number(other)

    def _new(self, value: ir.Value, node: ir.Node | None) -> int:
        if node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
            return self._numbers[node.inputs[0]]
        return self._keys.setdefault(self._key(value, node), len(self._keys))

    def _key(self, value: ir.Value, node: ir.Node | None) -> Hashable:
        tensor = value.const_value
        if node is None:
            if tensor is None or value.is_graph_input() or tensor.size > SMALL:
                return ("source", id(value))
            return ("constant", str(tensor.dtype), tuple(tensor.shape.numpy()), contents_of(tensor))
        if _is_opaque(node):
            return ("source", id(value))
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        attributes = tuple(
            ir.to_proto(attribute).SerializeToString(deterministic=True)
            for _, attribute in sorted(node.attributes.items())
        )
        inputs = tuple(None if item is None else self._numbers[item] for item in node.inputs)
        index = next(i for i, item in enumerate(node.outputs) if item is value)
        return (domain, node.op_type, attributes, inputs, index)


def _is_opaque(node: ir.Node) -> bool:
    """Say whether a node's results are unlike those of any other node."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return node.op_type in RANDOM or any(item.type in graphs for item in node.attributes.values())
