"""The one table of gradient rules, merged from the modules that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.autodiff import (
    rules_activation,
    rules_arithmetic,
    rules_attention,
    rules_conv,
    rules_einsum,
    rules_loops,
    rules_matmul,
    rules_norm,
    rules_quantize,
    rules_recurrent,
    rules_reduce,
    rules_rows,
    rules_shape,
    rules_softmax,
)
from kfac_onnx.autodiff.decompose import has_body, through_body
from kfac_onnx.graph.values import ONNX_DOMAINS

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Rule

__all__ = ["RULES", "rule_of"]

RULES: Final[dict[str | tuple[str, str], Rule]] = {
    **rules_arithmetic.RULES,
    **rules_shape.RULES,
    **rules_matmul.RULES,
    **rules_einsum.RULES,
    **rules_rows.RULES,
    **rules_reduce.RULES,
    **rules_activation.RULES,
    **rules_softmax.RULES,
    **rules_quantize.RULES,
    **rules_norm.RULES,
    **rules_conv.RULES,
    **rules_recurrent.RULES,
    **rules_attention.RULES,
    **rules_loops.RULES,
}
"""Operator of the standard, or (domain, operator) -> rule."""


def rule_of(node: ir.Node) -> Rule | None:
    """Return the rule of a node's operator, or None."""
    if node.domain not in ONNX_DOMAINS:
        return RULES.get((node.domain, node.op_type))
    found = RULES.get(node.op_type)
    return through_body if found is None and has_body(node.op_type) else found
