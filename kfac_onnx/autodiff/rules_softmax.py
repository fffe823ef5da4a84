"""Gradients of softmax and of the losses that end in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx.autodiff.backward import no_gradient
from kfac_onnx.autodiff.rules_activation import of_output
from kfac_onnx.autodiff.working import Working
from kfac_onnx.canonical.lowering.activations import log_softmax_grad, softmax_grad
from kfac_onnx.canonical.lowering.cross_entropy import loss_gradient
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]


def cross_entropy(back: Backward) -> Gradients:
    """SoftmaxCrossEntropyLoss(scores, labels, weight; reduction, ignore_index) -> loss, log_prob.

    dscores = w (exp(log_prob) − onehot(labels)) dloss / divisor, 0 where the label is ignored, and what
    log_prob passes on as a LogSoftmax along axis 1.
    """
    node, scores = back.node, back.x(0)
    if back.needs(2):
        return Miss("its class weights are trained, which is not supported")
    work = Working.of(back, scores)
    log_prob = node.outputs[1] if len(node.outputs) > 1 and node.outputs[1].name else None
    if log_prob is None:
        log_prob = back.emit.op("LogSoftmax", scores, axis=1)
    result = None
    if back.grad(0) is not None:
        result = _loss(back, log_prob, through_softmax=True)
    above = back.grad(1)
    if above is not None:
        along = ir.Node("", "LogSoftmax", [], attributes=[ir.AttrInt64("axis", 1)])
        through = log_softmax_grad(back.emit, along, work.up(above), work.up(log_prob))
        result = through if result is None else back.emit.op("Add", result, through)
    return [None if result is None else work.down(result)]


def negative_log_likelihood(back: Backward) -> Gradients:
    """NegativeLogLikelihoodLoss(log_prob, labels, weight): dlog_prob = −w onehot(labels) dloss / divisor."""
    if back.needs(2):
        return Miss("its class weights are trained, which is not supported")
    return [Working.of(back, back.x(0)).down(_loss(back, back.x(0), through_softmax=False))]


def _loss(back: Backward, log_prob: ir.Value, *, through_softmax: bool) -> ir.Value:
    """Return the gradient that comes from the loss itself, in the working type."""
    attributes = back.node.attributes
    reduction, ignored = attributes.get("reduction"), attributes.get("ignore_index")
    return loss_gradient(
        back.emit,
        back.dy,
        log_prob,
        back.x(1),
        back.input(2),
        None if ignored is None else ignored.as_int(),
        "mean" if reduction is None else reduction.as_string(),
        dtype_of(back.x(0)) or back.dtype(back.dy),
        through_softmax=through_softmax,
    )


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "Hardmax": no_gradient,
    "LogSoftmax": of_output(log_softmax_grad),
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "Softmax": of_output(softmax_grad),
    "SoftmaxCrossEntropyLoss": cross_entropy,
}
