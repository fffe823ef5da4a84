"""The dense part of a tied table's gradient as a sum of outer products over positions.

For z = h·Wᵀ the part is dL/dW = Σ_p δ_p h_pᵀ with δ = dL/dz: a `left` vector on the vocabulary's side and a
`right` one on the embedding's side for each position p. The same holds for any product with the table, also
for x·W, where x is on the vocabulary's side. Which operand is which is read off the operator that sums them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.graph.operators import PRODUCTS, VIEWS
from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.metadata import Projection
from kfac_onnx.tables.pull_back import Miss, pull_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.lookups import DenseUse
    from kfac_onnx.tables.pull_back import Layout
    from kfac_onnx.tables.terms import DenseTerm

__all__ = ["operands_of_product", "projections"]

TWO_DIMENSIONS = PRODUCTS - {"Einsum"}  # whose axes would have to be read off its equation
STRIPPED = VIEWS | {"Expand"}


def projections(
    weight: ir.Value,
    layout: Layout,
    uses: Sequence[DenseUse],
    terms: Sequence[DenseTerm],
    facts: Facts,
) -> tuple[Projection, ...] | Miss:
    """Return each dense term as left and right vectors, or why one of them is no such sum."""
    shape = static_shape(weight)
    inputs = [_other_operand(use, weight) for use in uses]
    if shape is None or any(value is None for value in inputs):
        return Miss(f"{uses[0].node.op_type} '{uses[0].output.name}' is no product with the table")
    known = {facts.numbering.number(_base(value)) for value in inputs if value is not None}
    found: list[Projection] = []
    for term in terms:
        match = _factors(term, shape, layout, facts)
        if isinstance(match, Miss):
            return match
        (left, _), (right, _) = match
        if not known & {facts.numbering.number(_base(value)) for value in (left, right)}:
            return Miss(f"'{term.value.name}' does not multiply what the table was multiplied with")
        found.append(Projection(str(left.name), match[0][1], str(right.name), match[1][1]))
    return tuple(found)


def _base(value: ir.Value) -> ir.Value:
    """Return what a value is a view of."""
    while (node := value.producer()) is not None and node.op_type in STRIPPED and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _other_operand(use: DenseUse, weight: ir.Value) -> ir.Value | None:
    """Return what a product multiplies the table with."""
    if use.node.op_type not in TWO_DIMENSIONS:
        return None
    one, other = use.node.inputs[:2]
    if one is None or other is None:
        return None
    if _base(other) is weight:
        return one
    return other if _base(one) is weight else None


def _factors(
    term: DenseTerm, shape: tuple[int, ...], layout: Layout, facts: Facts
) -> tuple[tuple[ir.Value, int], tuple[ir.Value, int]] | Miss:
    """Return (left, its vocabulary axis) and (right, its embedding axis) of one term."""
    pulled = pull_whole(term, shape)
    if isinstance(pulled, Miss):
        return pulled
    if any(step.kind != "negate" for step in pulled.steps):
        return Miss(f"the product '{term.value.name}' is scaled or cut before it reaches the table")
    operands = operands_of_product(term.value, facts)
    if isinstance(operands, Miss):
        return operands
    one, other = operands
    return (one, other) if pulled.layout == layout else (other, one)


def operands_of_product(
    value: ir.Value, facts: Facts
) -> tuple[tuple[ir.Value, int], tuple[ir.Value, int]] | Miss:
    """Return the operands of a product [..., i, j], each with the axis that becomes i or j."""
    node = value.producer()
    summed: list[int] = []
    if node is not None and node.op_type == "ReduceSum":
        source, axes = node.inputs[0], facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        summed = [] if axes is None else sorted(int(axis) for axis in axes.reshape(-1))
        node = None if source is None else source.producer()
    if node is None or node.op_type not in TWO_DIMENSIONS:
        return Miss(f"'{value.name}' is no product of two tensors")
    one, other = node.inputs[:2]
    if one is None or other is None or one.shape is None or other.shape is None:
        return Miss(f"the operands of '{value.name}' have no known rank")
    rank = len(one.shape)
    alpha = node.attributes.get("alpha")
    plain = len(node.inputs) < 3 or node.inputs[2] is None
    batches = int_attribute(node, "transBatchA", 0) or int_attribute(node, "transBatchB", 0)
    if not plain or batches or (alpha is not None and alpha.as_float() != 1.0):
        return Miss(f"the product '{value.name}' is scaled, shifted or turned")
    if rank != len(other.shape) or [axis % rank for axis in summed] != list(range(rank - 2)):
        return Miss(f"'{value.name}' is no sum over positions alone")
    first = rank - 1 if int_attribute(node, "transA", 0) else rank - 2
    second = rank - 2 if int_attribute(node, "transB", 0) else rank - 1
    return (one, first), (other, second)
