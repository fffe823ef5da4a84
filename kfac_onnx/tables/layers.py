"""What K-FAC needs of a layer: what its matrix multiplies, and the gradients of the products.

The gradient of a matrix W [m, n] is a sum over its uses, Σ δᵀh over the rows of each, and that of a kernel
[m, c, k...] a convolution of its inputs with δ. So h and δ = dL/d(product) are read off the gradient, and
every use counts: as many terms as products, each with the activations of one of them. A graph whose gradient
does not show them (as where an exporter reorders gates) is a `Miss` with the reason. Names are never looked
at.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from kfac_onnx.graph.operators import VIEWS, Keeps, keeping
from kfac_onnx.graph.values import int_attribute, static_shape
from kfac_onnx.tables.products import operands_of_product
from kfac_onnx.tables.pull_back import Miss
from kfac_onnx.tables.roles import products_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.metadata import Role
    from kfac_onnx.tables.facts import Facts

__all__ = ["LayerUse", "layer_uses"]

_STRIPPED: Final = VIEWS | {"Expand"}
_BETWEEN: Final = keeping(Keeps.PLACES, Keeps.ORDER)
_AROUND: Final = _BETWEEN | {"Transpose", "Slice"}
_Operand: TypeAlias = tuple["ir.Value", int]
"""A tensor, with the axis of it that a product keeps."""


@dataclass(frozen=True)
class LayerUse:
    """One use of a matrix or kernel: its inputs and the gradient of the product, with the features' axes.

    Of a convolution the axes are the channels', and `convolution` is the node.
    """

    inputs: ir.Value
    input_axis: int
    gradient: ir.Value
    gradient_axis: int
    convolution: ir.Node | None = None


def layer_uses(role: Role, weight: ir.Value, gradient: ir.Value, facts: Facts) -> tuple[LayerUse, ...] | Miss:
    """Return every use of a matrix or kernel, or why the graph does not show them all."""
    products = products_of(weight, facts)
    if any(product.node.op_type == "ConvTranspose" for product in products):
        return Miss("a transposed convolution has no block")
    if any(product.node.op_type == "Conv" for product in products):
        return _convolution(weight, gradient, [product.node for product in products], facts)
    shape = static_shape(weight) or ()
    if len(shape) != 2 or not role.rows or role.stack:
        return Miss("it is no single matrix [outputs, inputs] as it is stored")
    operands = [product.activations for product in products]
    terms = _terms(gradient, facts)
    if isinstance(terms, Miss):
        return terms
    uses: list[LayerUse] = []
    for (one, one_axis), (other, other_axis) in terms:
        if role.rows == (0,):
            uses.append(LayerUse(other, other_axis, one, one_axis))
        else:
            uses.append(LayerUse(one, one_axis, other, other_axis))
    number = facts.numbering.number
    multiplied = Counter(number(_base(value)) for value in operands if value is not None)
    if multiplied != Counter(number(_base(use.inputs)) for use in uses):
        return Miss(
            f"the gradient has {len(uses)} products of other tensors than its {len(products)} uses have"
        )
    return tuple(uses)


def _terms(gradient: ir.Value, facts: Facts) -> list[tuple[_Operand, _Operand]] | Miss:
    """Return the operands of each product of a sum, with the axes that become rows and columns as stored."""
    terms: list[tuple[_Operand, _Operand]] = []
    waiting = [(gradient, False)]
    while waiting:
        value, turned = waiting.pop()
        node = value.producer()
        if node is None or facts.is_forward(node):
            return Miss(f"the part '{value.name}' of its gradient is no product")
        first = node.inputs[0] if node.inputs else None
        if node.op_type in ("Add", "Sum"):
            if any(static_shape(item) != static_shape(value) for item in node.inputs):
                return Miss(f"{node.op_type} '{value.name}' adds tensors of other shapes to its gradient")
            waiting.extend((item, turned) for item in node.inputs if item is not None)
        elif node.op_type == "Transpose" and first is not None and len(first.shape or ()) == 2:
            waiting.append((first, not turned))
        elif node.op_type in _BETWEEN and first is not None and _large(first) == _large(value):
            waiting.append((first, turned))
        else:
            operands = _einsum(node) if node.op_type == "Einsum" else operands_of_product(value, facts)
            if isinstance(operands, Miss):
                return operands
            one, other = operands
            terms.append((other, one) if turned else (one, other))
    return terms


def _large(value: ir.Value) -> list[int] | None:
    """Return the sizes above 1; None where they are not known."""
    shape = static_shape(value)
    return None if shape is None else [size for size in shape if size > 1]


def _einsum(node: ir.Node) -> tuple[_Operand, _Operand] | Miss:
    """Return the operands of an Einsum that sums over all positions and leaves one axis of each."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    named = f"Einsum '{node.outputs[0].name}'"
    if len(terms) != 2 or len(right) != 2 or "." in equation or len(node.inputs) != 2:
        return Miss(f"{named} is no sum over positions of two tensors")
    one, other = terms
    first, second = node.inputs
    if right[0] not in one:
        one, other, first, second = other, one, second, first
    positions = set(one) - {right[0]}
    if first is None or second is None or right[1] not in other or positions != set(other) - {right[1]}:
        return Miss(f"{named} is no sum over positions of two tensors")
    if [letter for letter in one if letter in positions] != [
        letter for letter in other if letter in positions
    ]:
        return Miss(f"{named} has its positions in two orders")
    return (first, one.index(right[0])), (second, other.index(right[1]))


def _convolution(
    weight: ir.Value, gradient: ir.Value, nodes: list[ir.Node], facts: Facts
) -> tuple[LayerUse, ...] | Miss:
    """Return the one use of a kernel: its gradient convolves x with δ, batch and channels swapped in both."""
    (node, *others) = nodes
    name = f"Conv '{node.outputs[0].name}'"
    if others or node.inputs[1] is not weight:
        return Miss(f"{name} is one of several uses of the kernel, or reads a function of it")
    if int_attribute(node, "group", 1) != 1:
        return Miss(f"{name} has groups of channels")
    value = gradient
    while (producer := value.producer()) is not None and producer.op_type in (
        _BETWEEN | {"Transpose", "Slice"}
    ):
        first = producer.inputs[0]
        if first is None:
            break
        value = first
    swapped = [None, None]
    if producer is not None and producer.op_type == "Conv" and int_attribute(producer, "group", 1) == 1:
        swapped = [_swapped(item) for item in producer.inputs[:2]]
    data, slopes = swapped
    inputs = node.inputs[0]
    number = facts.numbering.number
    if data is None or slopes is None or inputs is None or number(_base(data)) != number(_base(inputs)):
        return Miss(f"its gradient is no convolution of what {name} reads with the gradient of the result")
    return (LayerUse(inputs, 1, slopes, 1, node),)


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """Return what a transposition that only swaps the first two axes reads."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose":
        return None
    order = list(node.attributes.get_ints("perm") or ())
    source = node.inputs[0]
    return _whole(source) if source is not None and order == [1, 0, *range(2, len(order))] else None


def _whole(value: ir.Value) -> ir.Value:
    """Return what a Split into one part reads: exporters write one for each group of channels."""
    node = value.producer()
    source = (
        node.inputs[0] if node is not None and node.op_type == "Split" and len(node.outputs) == 1 else None
    )
    return value if source is None else source


def _base(value: ir.Value) -> ir.Value:
    """Return what a value is a view of."""
    while (node := value.producer()) is not None and node.op_type in _STRIPPED and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
