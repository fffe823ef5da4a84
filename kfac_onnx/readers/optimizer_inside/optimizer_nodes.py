"""The optimizers of ONNX's training standard, Adam, Adagrad and Momentum, read as what they are.

Such a node takes a learning rate R, an update count T, and tensors X, their gradients G and their states; it
returns X' and the new states, in the same order. Its specification says which is which: nothing is guessed.

Source: the operators' specifications, domain ai.onnx.preview.training, version 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kfac_onnx.canonical.lowering.optimizers import GROUPS, TRAINING_DOMAIN, tensors_of
from kfac_onnx.graph.emit import Miss

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["NodeUpdate", "node_update"]

DECAYS: Final = ("norm_coefficient", "norm_coefficient_post")


@dataclass(frozen=True)
class NodeUpdate:
    """How an optimizer node updates one tensor: its gradient, states, learning rate; whether it decays it."""

    kind: str
    gradient: ir.Value
    states: tuple[ir.Value, ...]
    rate: ir.Value | None
    decayed: bool


def node_update(new: ir.Value, parameter: ir.Value) -> NodeUpdate | Miss | None:
    """Return the update of which `new` is the result; None where no optimizer node makes it."""
    value = new
    while (node := value.producer()) is not None and node.op_type == "Identity" and not node.domain:
        if node.inputs[0] is None:
            return None
        value = node.inputs[0]
    if node is None or node.domain != TRAINING_DOMAIN or node.op_type not in GROUPS:
        return None
    tensors = tensors_of(node)
    index = value.index()
    if tensors is None:
        return Miss(f"the inputs of {node.op_type} are not R, T and as many tensors as gradients and states")
    if index is None or index >= len(tensors) or tensors[index][0] is not parameter:
        return Miss(f"{node.op_type} does not make it of '{parameter.name}'")
    _, gradient, *states = tensors[index]
    coefficients = [node.attributes.get(name) for name in DECAYS]
    decayed = any(item is not None and item.as_float() != 0.0 for item in coefficients)
    return NodeUpdate(node.op_type.lower(), gradient, tuple(states), node.inputs[0], decayed)
