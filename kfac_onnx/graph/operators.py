"""Kinds of operators, and what an operator passes on unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.graph.values import ONNX_DOMAINS, dtype_of, static_shape

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ELEMENTWISE", "LOOKUPS", "RANDOM", "VIEWS", "unchanged"]

RANDOM: Final = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "Dropout",
    }
)
ELEMENTWISE: Final = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Div",
        "Equal",
        "Exp",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "Where",
        "Xor",
        "IsNaN",
    }
)
"""Operators of one result whose entries depend on the operands' entries at the same place, broadcast."""


LOOKUPS: Final = frozenset({"Gather", "GatherND", "GatherElements"})
VIEWS: Final = frozenset(
    {"Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Mul"}
)


def unchanged(value: ir.Value) -> ir.Value:
    """Return the value that Identity, a Cast to its own type, or an Expand to its own shape passes on."""
    while (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        if source is None or node.domain not in ONNX_DOMAINS:
            return value
        if node.op_type == "Cast":
            dtype = dtype_of(source)
            if dtype is None or int(dtype) != node.attributes["to"].as_int():
                return value
        elif node.op_type == "Expand":
            if static_shape(source) is None or static_shape(source) != static_shape(value):
                return value
        elif node.op_type != "Identity":
            return value
        value = source
    return value
