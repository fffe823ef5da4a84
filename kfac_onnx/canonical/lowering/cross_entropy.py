"""Softmax cross entropy: its gradient, and the variant that takes `ignore_index` as an input.

log_prob is float[N, C, d1, ..], label int[N, d1, ..]; the class axis is 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.graph.emit import HALF_TYPES, Miss
from kfac_onnx.graph.values import constant, dtype_of

if TYPE_CHECKING:
    from kfac_onnx.graph.emit import Emitter, Lowered

__all__ = ["RULES", "loss_gradient"]


def _ignored(node: ir.Node) -> int | Miss | None:
    """Return the label that does not count (attribute, or last input of the Internal operators)."""
    if "ignore_index" in node.attributes:
        return node.attributes["ignore_index"].as_int()
    position = {"SoftmaxCrossEntropyLossInternal": 3, "SoftmaxCrossEntropyLossInternalGrad": 4}.get(
        node.op_type
    )
    if position is None or len(node.inputs) <= position or node.inputs[position] is None:
        return None
    array = constant(node.inputs[position])
    if array is None or array.size != 1 or array.dtype.kind not in "iu":
        return Miss("its ignore_index is not a constant number")
    return int(array.reshape(()))


def _reduction(node: ir.Node) -> str:
    found = node.attributes.get("reduction")
    return "mean" if found is None else found.as_string()


def loss_internal(emit: Emitter, node: ir.Node) -> Lowered:
    """SoftmaxCrossEntropyLossInternal(scores, label, weight, ignore_index) -> loss, log_prob."""
    ignored = _ignored(node)
    if isinstance(ignored, Miss):
        return ignored
    attributes: dict[str, int | str] = {"reduction": _reduction(node)}
    if ignored is not None:
        attributes["ignore_index"] = ignored
    inputs = list(node.inputs[:3])
    while inputs and inputs[-1] is None:
        inputs.pop()
    results = emit.many("SoftmaxCrossEntropyLoss", inputs, len(node.outputs), attributes)
    wanted = node.attributes.get("output_type")
    if wanted is None or dtype_of(node.inputs[0]) in (None, ir.DataType(wanted.as_int())):
        return results
    return [emit.cast(results[0], ir.DataType(wanted.as_int())), *results[1:]]


def loss_grad(emit: Emitter, node: ir.Node) -> Lowered:
    """SoftmaxCrossEntropyLossGrad(dL, log_prob, label, weight; reduction, ignore_index) -> dscores.

    w (exp(log_prob) − onehot(label)) dL / divisor, 0 where label = ignore_index; w = weight[label], or 1;
    divisor = Σ w over labels that count if the reduction is mean, else 1.
    """
    grad, log_prob, label = node.inputs[:3]
    weight = node.inputs[3] if len(node.inputs) > 3 else None
    dtype = dtype_of(log_prob)
    if grad is None or log_prob is None or label is None or dtype is None:
        return Miss("the type of its second input is unknown")
    if len(node.inputs) > 5 or (node.op_type == "SoftmaxCrossEntropyLossGrad" and len(node.inputs) > 4):
        return Miss("its bias input is not supported")
    ignored = _ignored(node)
    if isinstance(ignored, Miss):
        return ignored
    result = loss_gradient(emit, grad, log_prob, label, weight, ignored, _reduction(node), dtype)
    wanted = node.attributes.get("output_type")
    work = _work(dtype)
    return [emit.cast(result, dtype if wanted is None else ir.DataType(wanted.as_int()), work)]


def _work(dtype: ir.DataType) -> ir.DataType:
    return ir.DataType.FLOAT if dtype in HALF_TYPES else dtype


def loss_gradient(
    emit: Emitter,
    grad: ir.Value,
    log_prob: ir.Value,
    label: ir.Value,
    weight: ir.Value | None,
    ignored: int | None,
    reduction: str,
    dtype: ir.DataType,
    *,
    through_softmax: bool = True,
) -> ir.Value:
    """Return what `loss_grad` does, in float32 for half types: the gradient of the scores.

    Without `through_softmax` it is that of the negative log likelihood, with respect to `log_prob`: the
    same without exp(log_prob). `dtype` is the type of `log_prob`.
    """
    work = _work(dtype)
    zero = emit.scalar(0.0, work)
    labels = emit.cast(label, ir.DataType.INT64, dtype_of(label))
    classes = emit.entry(emit.op("Shape", log_prob), 1)
    bounds = emit.constant(np.array([0, 1] if through_softmax else [0, -1], np.float32))
    (hot,) = emit.many("OneHot", [labels, classes, bounds], 1, {"axis": 1})
    error = emit.cast(hot, work, ir.DataType.FLOAT)
    if through_softmax:
        error = emit.op("Sub", emit.op("Exp", emit.cast(log_prob, work, dtype)), error)
    kept = None
    if ignored is not None:
        kept = emit.op("Not", emit.op("Equal", labels, emit.constant(np.array(ignored, np.int64))))
    importance = None
    if weight is not None:
        known = (
            labels if kept is None else emit.op("Where", kept, labels, emit.constant(np.array(0, np.int64)))
        )
        importance = emit.op("Gather", emit.cast(weight, work, dtype_of(weight)), known, axis=0)
        if kept is not None:
            importance = emit.op("Where", kept, importance, zero)
    factor = emit.cast(grad, work, dtype_of(grad))
    if reduction == "mean":
        factor = emit.op("Div", factor, _divisor(emit, labels, kept, importance, work))
    if importance is not None:
        factor = emit.op("Mul", factor, importance)
    if importance is not None or reduction == "none":
        factor = emit.op("Unsqueeze", factor, emit.ints(1))
    result = emit.op("Mul", error, factor)
    if kept is not None:  # last, so that no ignored label lets 0/0 through
        result = emit.op("Where", emit.op("Unsqueeze", kept, emit.ints(1)), result, zero)
    return result


def _divisor(
    emit: Emitter, labels: ir.Value, kept: ir.Value | None, importance: ir.Value | None, work: ir.DataType
) -> ir.Value:
    """Return the number that the mean divides by, rank 0."""
    if importance is not None:
        return emit.op("ReduceSum", importance, None, keepdims=0)
    if kept is not None:
        return emit.op("ReduceSum", emit.cast(kept, work), None, keepdims=0)
    return emit.cast(emit.op("Size", labels), work)


RULES = {
    ("com.microsoft", "SoftmaxCrossEntropyLossInternal"): loss_internal,
    ("com.microsoft", "SoftmaxCrossEntropyLossGrad"): loss_grad,
    ("com.microsoft", "SoftmaxCrossEntropyLossInternalGrad"): loss_grad,
}
