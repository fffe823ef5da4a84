"""Graphs that no runtime can run: operands whose shapes or types contradict each other.

ONNX's checker does not notice them. jax2onnx, for one, writes the gradient xᵀ·g of a dense layer as a product
of x and g that lacks the transpose, so its rows and columns do not fit; with a batch of unknown size that
shows only in that both operands begin with the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.errors import UserError
from kfac_onnx.graph.operators import Trait, having
from kfac_onnx.graph.shapes import shape_problem
from kfac_onnx.graph.values import ONNX_DOMAINS, all_graphs, dtype_of, int_attribute

if TYPE_CHECKING:
    import onnx

__all__ = ["require_consistent", "require_inferable", "require_tensors"]

SAME_TYPE: Final = having(Trait.SAME_TYPE)
BROADCASTING: Final = having(Trait.BROADCASTS)

EXPORTERS: Final = {
    "jax2onnx": "jax2onnx writes x.T @ g without the transpose: give dense layers a custom_vjp with explicit "
    "transposes, as in jnp.transpose(x) @ g",
}
"""What is known of an exporter's wrong products."""


REMEDY: Final = "the exporter wrote an invalid graph: export with another version of it, or another way"


def require_tensors(model: ir.Model, place: str | None) -> None:
    """Raise UserError for the first input that is a sequence or anything else that no batch can hold."""
    for value in model.graph.inputs:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            kind = type(value.type).__name__.removesuffix("Type").lower()
            article = "an" if kind[0] in "aeiou" else "a"
            raise UserError(
                f"the input '{value.name}' is {article} {kind}; training graphs take tensors only",
                place=place,
                help="export the graph with one input for each tensor",
            )


def require_consistent(model: ir.Model, place: str | None) -> None:
    """Raise UserError for the first node whose operands cannot be combined, whatever the batch."""
    for graph in all_graphs(model.graph):
        for node in graph:
            if node.domain not in ONNX_DOMAINS:
                continue
            types, shapes = _of_types(node), _of_shapes(node)
            problem = types or shapes
            if problem is not None:
                raise UserError(
                    f"the graph cannot run: {node.op_type} '{node.outputs[0].name}' {problem}",
                    place=place,
                    path=", ".join(f"{item.name} {_shown(item)}" for item in node.inputs if item is not None),
                    help=REMEDY if types is not None else _remedy(model, node),
                )


def require_inferable(
    model: ir.Model, place: str | None, inferred_model: onnx.ModelProto | None = None
) -> None:
    """Raise UserError for the first node to whose inputs ONNX's own shape inference gives no result.

    `inferred_model` is what `infer_shapes` returned of the model, if nothing has changed since.
    """
    problem = shape_problem(model, inferred_model)
    if problem is not None:
        operator, name, why = problem
        raise UserError(
            f"the graph cannot run: {operator} '{name}' is invalid: {why}", place=place, help=REMEDY
        )


def _remedy(model: ir.Model, node: ir.Node) -> str:
    known = EXPORTERS.get(model.producer_name or "") if node.op_type in ("Gemm", "MatMul") else None
    return known or REMEDY


def _shown(value: ir.Value) -> str:
    dtype = dtype_of(value)
    dims = _dims(value)
    shape = "of unknown shape" if dims is None else str([dim or "?" for dim in dims]).replace("'", "")
    return shape if dtype is None else f"{dtype.name.lower()} {shape}"


def _of_types(node: ir.Node) -> str | None:
    if node.op_type not in SAME_TYPE:
        return None
    operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
    found = dict.fromkeys(dtype for value in operands if (dtype := dtype_of(value)) is not None)
    if len(found) < 2:
        return None
    return f"combines {' with '.join(dtype.name.lower() for dtype in found)}"


def _of_shapes(node: ir.Node) -> str | None:
    match node.op_type:
        case "Gemm":
            return _product(node, int_attribute(node, "transA", 0), int_attribute(node, "transB", 0))
        case "MatMul":
            return _product(node, 0, 0)
        case op if op in BROADCASTING:
            return _broadcast(node)
        case _:
            return None


def _product(node: ir.Node, turned_left: int, turned_right: int) -> str | None:
    left, right = _dims(node.inputs[0]), _dims(node.inputs[1])
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    rows, inner = (left[-1], left[-2]) if turned_left else (left[-2], left[-1])
    other = right[-1] if turned_right else right[-2]
    numbers = isinstance(inner, int) and isinstance(other, int)
    batch_twice = isinstance(other, str) and rows == other and isinstance(inner, int)
    if (numbers and inner != other) or (batch_twice and len(left) == len(right) == 2):
        return f"multiplies rows of {inner} by columns of {other}"
    return None


def _broadcast(node: ir.Node) -> str | None:
    shapes = [dims for value in node.inputs if (dims := _dims(value)) is not None]
    for axis in range(1, max(map(len, shapes), default=0) + 1):
        sizes = {dims[-axis] for dims in shapes if len(dims) >= axis}
        numbers = sorted(size for size in sizes if isinstance(size, int) and size != 1)
        if len(numbers) > 1:
            return f"combines dimensions of {numbers[0]} and {numbers[1]}"
    return None


def _dims(value: ir.Value | None) -> list[int | str | None] | None:
    """Return the numbers, names and None of a value's dimensions; None where its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]
