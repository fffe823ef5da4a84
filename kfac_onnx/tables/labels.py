"""The labels of a loss that are no classes: which values to look at, as ids are looked at.

An operator that reads a score per label fails for a label beyond the classes, and wraps a negative one to the
last classes, which nobody means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.graph.values import ONNX_DOMAINS, ancestors, int_attribute, unchanged
from kfac_onnx.metadata import IdCheck

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["label_checks"]


def label_checks(model: ir.Model, loss: ir.Value | None) -> list[IdCheck]:
    """Return a check for the labels of every cross-entropy that the loss depends on.

    Those are the labels of SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss, and what GatherElements
    reads a log softmax by. Labels that no batch brings have none, nor have scores of unknown size.
    """
    if loss is None:
        return []
    forward = ancestors([loss])
    inputs = set(model.graph.inputs)
    checks: list[IdCheck] = []
    for node in model.graph:
        if node.domain not in ONNX_DOMAINS or not any(value in forward for value in node.outputs):
            continue
        if node.op_type in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
            axis, ignored = 1, node.attributes.get("ignore_index")
        elif node.op_type == "GatherElements" and _is_log_softmax(node.inputs[0]):
            axis, ignored = int_attribute(node, "axis", 0), None
        else:
            continue
        scores, labels = node.inputs[:2]
        if scores is None or labels is None or scores.shape is None:
            continue
        classes = scores.shape[axis]
        if not isinstance(classes, int) or not ancestors([labels]) & inputs:
            continue
        checks.append(
            IdCheck(
                str(_named(node, scores).name),
                str(labels.name),
                classes,
                "reject",
                kind="labels",
                ignored=None if ignored is None else ignored.as_int(),
            )
        )
    return checks


def _is_log_softmax(value: ir.Value | None) -> bool:
    node = None if value is None else unchanged(value).producer()
    return node is not None and node.op_type == "LogSoftmax"


def _named(node: ir.Node, scores: ir.Value) -> ir.Value:
    """Return the scores as the user names them: what a log softmax is of."""
    source = unchanged(scores).producer()
    if node.op_type != "SoftmaxCrossEntropyLoss" and source is not None and source.op_type == "LogSoftmax":
        return source.inputs[0] or scores
    return scores
