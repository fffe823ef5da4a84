"""The loss: which output it is, how it reduces over examples, and the number that a mean divides by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from kfac_onnx.errors import UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.graph.operators import ORDERED_VIEWS, Trait, having
from kfac_onnx.graph.values import constant, dtype_of, int_attribute, is_float, static_shape
from kfac_onnx.metadata import Loss, read

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Reduction", "choose_loss", "emit_divisor", "find_reduction", "loss_candidates"]

PASSES = ORDERED_VIEWS | {"Expand", "Neg"}
"""Operators that a one-entry loss may pass through after its reduction."""
CROSS_ENTROPIES = frozenset({"SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"})
SUMS = having(Trait.TOTAL)
"""Sums over examples, also of squares or absolute values of errors."""
SINGLE = (1,)


@dataclass(frozen=True)
class Reduction:
    """How a loss reduces: its kind, and for a mean the node and what it divides by.

    `by` is `labels` (a cross-entropy node counts its labels), `elements` (of the input of a ReduceMean)
    `divisor` (the second input of a Div) or `factor` (a constant 1/N that a sum of N is multiplied with).
    """

    kind: Literal["mean", "sum", "unknown"]
    by: Literal["labels", "elements", "divisor", "factor"] | None = None
    node: ir.Node | None = None


def loss_candidates(model: ir.Model, exclude: Collection[ir.Value]) -> list[ir.Value]:
    """Return the outputs that may be the loss: floats of one entry, not in `exclude`; rank 0 is preferred."""
    outputs = [value for value in model.graph.outputs if value not in exclude and is_float(value)]
    scalars = [value for value in outputs if static_shape(value) == ()]
    return scalars or [value for value in outputs if static_shape(value) == SINGLE]


def choose_loss(found: list[ir.Value], *, boundary: bool, place: str | None) -> ir.Value | None:
    """Return the one candidate; None if there is none and the loss lies outside the graph.

    Raises:
        UserError: if no output qualifies, or several do.

    """
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(value.name) for value in found)
        raise UserError(
            f"{len(found)} outputs of the graph could be the loss: {names}",
            place=place,
            help="name it with --loss NAME",
        )
    if boundary:
        return None
    raise UserError(
        "no output of the graph is a scalar that could be the loss",
        place=place,
        help="export the loss as an output of the training graph, or name it with --loss NAME",
    )


def find_reduction(loss: ir.Value | None) -> Reduction:
    """Return how a loss reduces over examples, read off the operators that produce it."""
    value = loss
    divider: ir.Node | None = None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in PASSES:
            value = node.inputs[0]
        elif node.op_type == "Div" and divider is None and _single(node.inputs[1]):
            value, divider = node.inputs[0], node
        elif node.op_type == "Mul" and divider is None and (factor := _factor_of(node)) is not None:
            value, divider = node.inputs[factor[0] - 1], node
        elif node.op_type in SUMS:
            return _of_sum(node, divider)
        elif node.op_type in CROSS_ENTROPIES or node.op_type == "ReduceMean":
            return Reduction("unknown") if divider is not None else _of_node(node)
        else:
            break
    return Reduction("unknown")


def _of_sum(node: ir.Node, divider: ir.Node | None) -> Reduction:
    if divider is None:
        return Reduction("sum")
    if divider.op_type == "Div":
        return Reduction("mean", "divisor", divider)
    # A constant factor says a mean only if it is one over how many there are, of one or more leading axes.
    factor, shape = _factor_of(divider), static_shape(node.inputs[0])
    counts = np.cumprod(shape or ())
    if factor is not None and np.any(np.isclose(counts * abs(factor[1]), 1.0, rtol=1e-6, atol=0)):
        return Reduction("mean", "factor", divider)
    return Reduction("unknown")


def _factor_of(node: ir.Node) -> tuple[int, float] | None:
    """Return which input of a Mul is a constant number, and the number."""
    for index, value in enumerate(node.inputs):
        array = constant(value)
        if array is not None and array.size == 1 and array.reshape(-1)[0] != 0:
            return index, float(array.reshape(-1)[0])
    return None


def _of_node(node: ir.Node) -> Reduction:
    if node.op_type == "ReduceMean":
        return Reduction("mean", "elements", node)
    found = node.attributes.get("reduction")
    match "mean" if found is None else found.as_string():
        case "mean":
            return Reduction("mean", "labels", node)
        case "sum":
            return Reduction("sum")
        case _:
            return Reduction("unknown")


def _single(value: ir.Value | None) -> bool:
    """Say whether a value has one entry (an unknown shape counts as one: the loss has one entry)."""
    shape = static_shape(value)
    return shape is None or int(np.prod(shape)) == 1


def emit_divisor(model: ir.Model) -> ir.Value | None:
    """Append nodes that compute the number a mean loss divides by; return it, float32 scalar.

    It is the count of labels that are not ignored, the number of elements, or the graph's own
    divisor; 1 for a sum; None where the reduction is unknown or the loss is outside the graph. With class
    weights it is the sum of the weights of the labels.
    """
    declared = read(model, "loss", Loss)
    if declared is None or declared.value is None:
        return None
    loss = next((value for value in model.graph.outputs if value.name == declared.value), None)
    reduction = find_reduction(loss)
    if loss is None or reduction.kind == "unknown":
        return None
    anchor = reduction.node or loss.producer()
    if anchor is None:
        return None
    emit = Emitter.in_place_of(Context.of(model), anchor, "divisor")
    result = _divisor(emit, reduction)
    emit.nodes[-1].outputs[0].name = emit.context.fresh("kfac/divisor")
    for node in emit.nodes:
        node.metadata_props.pop("kfac.lowered", None)
    model.graph.extend(emit.nodes)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return result


def _divisor(emit: Emitter, reduction: Reduction) -> ir.Value:
    node = reduction.node
    if node is None:
        return emit.op("Identity", emit.scalar(1.0))
    scalar = emit.constant(np.zeros(0, np.int64))
    if reduction.by == "divisor":
        divisor = node.inputs[1]
        return emit.op("Reshape", emit.op("Cast", divisor, to=int(ir.DataType.FLOAT)), scalar)
    if reduction.by == "elements":
        return _elements(emit, node)
    if reduction.by == "factor" and (factor := _factor_of(node)) is not None:
        return emit.op("Identity", emit.scalar(round(1 / abs(factor[1]))))
    label = node.inputs[1]
    weight = node.inputs[2] if len(node.inputs) > 2 else None
    ignored = node.attributes.get("ignore_index")
    if weight is None and ignored is None:
        return emit.op("Cast", emit.op("Size", label), to=int(ir.DataType.FLOAT))
    labels = label if label is None else emit.cast(label, ir.DataType.INT64, dtype_of(label))
    kept = None
    if ignored is not None:
        mark = emit.constant(np.array(ignored.as_int(), np.int64))
        kept = emit.op("Not", emit.op("Equal", labels, mark))
    if weight is None:
        return emit.op("ReduceSum", emit.op("Cast", kept, to=int(ir.DataType.FLOAT)), keepdims=0)
    known = labels
    if kept is not None:
        known = emit.op("Where", kept, labels, emit.constant(np.array(0, np.int64)))
    importance = emit.op("Gather", emit.op("Cast", weight, to=int(ir.DataType.FLOAT)), known, axis=0)
    if kept is not None:
        importance = emit.op("Where", kept, importance, emit.scalar(0.0))
    return emit.op("ReduceSum", importance, keepdims=0)


def _elements(emit: Emitter, node: ir.Node) -> ir.Value:
    """Return how many entries of a ReduceMean's input one entry of its output averages."""
    size = emit.op("Size", node.inputs[0])
    count = emit.op("Div", size, emit.op("Size", node.outputs[0]))
    if int_attribute(node, "noop_with_empty_axes", 0):
        count = emit.op("Identity", count)
    return emit.op("Cast", count, to=int(ir.DataType.FLOAT))
