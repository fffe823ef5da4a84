"""Why the loss has no derivative with respect to a weight that it is computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.autodiff.backward import captured_values, no_gradient
from kfac_onnx.autodiff.table import rule_of
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = ["blocking_nodes", "has_derivative", "why_untrained"]

OF_SHAPES: Final = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike"})
"""Operators that read no number of their input."""
MOST: Final = 3
"""Operators that a sentence names."""


def has_derivative(node: ir.Node) -> bool:
    """Say whether a node's operator passes gradients on; one without any rule is refused elsewhere."""
    return rule_of(node) is not no_gradient


def blocking_nodes(weight: ir.Value, loss: ir.Value, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the operators without a derivative on the ways from a weight to the loss, nearest first.

    Empty where the loss does not depend on the weight, or only on its shape. `nodes` are those of the main
    graph, sorted.
    """
    needed = {loss}
    for node in reversed(nodes):
        if node.op_type not in OF_SHAPES and any(value in needed for value in node.outputs):
            needed.update(value for value in (*node.inputs, *captured_values(node)) if value is not None)
    reached = {weight}
    blocking: list[ir.Node] = []
    for node in nodes:
        if not any(value in needed for value in node.outputs):
            continue
        if not any(value in reached for value in (*node.inputs, *captured_values(node))):
            continue
        if not has_derivative(node) or not any(map(_is_number, node.outputs)):
            if node.op_type not in OF_SHAPES:
                blocking.append(node)
            continue
        reached.update(filter(_is_number, node.outputs))
    return blocking


def why_untrained(weight: ir.Value, loss: ir.Value, nodes: Sequence[ir.Node]) -> str:
    """Return why a weight has no gradient, as a clause: `the loss depends on it only through ...`."""
    blocking = blocking_nodes(weight, loss, nodes)
    if not blocking:
        return "the loss does not depend on it"
    shown = [f"{node.op_type} '{node.outputs[0].name}'" for node in blocking[:MOST]]
    if len(blocking) > MOST:
        shown.append(f"{len(blocking) - MOST} more")
    verb = "which has" if len(blocking) == 1 else "which have"
    return f"the loss depends on it only through {' and '.join(shown)}, {verb} no derivative"


def _is_number(value: ir.Value) -> bool:
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point()
