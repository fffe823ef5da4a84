"""What rules share: arithmetic wide enough for half types, and the rules of `lowering` as formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.graph.emit import HALF_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kfac_onnx.autodiff.backward import Backward
    from kfac_onnx.graph.emit import Emitter, Lowered
    from kfac_onnx.graph.emit import Rule as Lowering

__all__ = ["Working", "by_lowering", "float_attribute"]


@dataclass(frozen=True)
class Working:
    """Emission in float32 where the node's type is a half, otherwise in the node's own type.

    The operators round once, at their end; so do the gradients.
    """

    emit: Emitter
    own: ir.DataType
    """The type of the gradients that the rule returns."""
    work: ir.DataType
    """The type that its formula is computed in."""

    @classmethod
    def of(cls, back: Backward, value: ir.Value) -> Working:
        """Return the working types for a rule whose gradients are of the type of `value`."""
        own = back.dtype(value)
        return cls(back.emit, own, ir.DataType.FLOAT if own in HALF_TYPES else own)

    def up(self, value: ir.Value, current: ir.DataType | None = None) -> ir.Value:
        """Return a value of the node in the working type; `current` is its type if not the node's."""
        return self.emit.cast(value, self.work, current or self.own)

    def down(self, value: ir.Value, wanted: ir.DataType | None = None) -> ir.Value:
        """Return a result in the type of the node, or in `wanted`."""
        return self.emit.cast(value, wanted or self.own, self.work)

    def number(self, number: float) -> ir.Value:
        """Return a constant of rank 0 in the working type."""
        return self.emit.scalar(number, self.work)


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a float attribute of a node, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.as_float()


def by_lowering(
    back: Backward,
    rule: Lowering,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    wanted: Sequence[bool],
    attributes: Mapping[str, int] | None = None,
    shapes: Sequence[ir.Value | None] = (),
) -> Lowered:
    """Return what a lowering rule makes of ONNX Runtime's gradient operator with these inputs.

    The operator has the forward node's attributes, unless `attributes` says otherwise, and one output per
    entry of `wanted`, which has the shape of the value at its place in `shapes`. It stays in no graph.
    """
    node = ir.Node("com.microsoft", op_type, inputs, num_outputs=len(wanted))
    for name, attribute in back.node.attributes.items():
        node.attributes[name] = attribute
    for name, number in (attributes or {}).items():
        node.attributes[name] = ir.AttrInt64(name, number)
    label = next((value.name for value in back.node.outputs if value.name), "")
    for index, output in enumerate(node.outputs):
        output.name = f"{label}/{op_type}/{index}" if wanted[index] else ""
        like = shapes[index] if index < len(shapes) else None
        if like is not None:
            output.type, output.shape = like.type, like.shape
    try:
        return rule(back.emit, node)
    finally:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
