"""Losses over the logits of a forward-only model, made of standard operators.

| kind          | labels                                   | loss of one example or element             |
|---------------|------------------------------------------|--------------------------------------------|
| cross-entropy | int64, the logits' shape without classes | −w[label] log softmax(logits)[label]       |
| mse           | of the logits' shape and type            | (logits − labels)²                         |
| bce           | of the logits' shape and type, in [0, 1] | log(1 + exp(logits)) − labels · logits     |

`bce` is the binary cross-entropy of sigmoid(logits). The weights of classes w are 1 unless given; a mean over
examples divides by the sum of the weights of their labels. With label smoothing ε the loss of one example is

    (1 − ε)·(−w[label] log p[label]) + (ε / classes)·Σ_c (−w[c] log p[c]),      p = softmax(logits)

and is 0 for an example whose label is ignored; a mean divides by what it divides by without smoothing.

Source: Szegedy et al., Rethinking the Inception architecture, 2015, sec. 7 (https://arxiv.org/abs/1512.00567);
weights and divisor as in `torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.errors import UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import HALF_TYPES, Emitter
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LossKind", "Reduction", "append_loss"]

LossKind = Literal["cross-entropy", "mse", "bce"]
Reduction = Literal["mean", "sum"]


def append_loss(
    model: ir.Model,
    logits: ir.Value,
    kind: LossKind,
    *,
    reduction: Reduction = "mean",
    labels: str = "labels",
    class_axis: int | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    place: str | None = None,
) -> ir.Value:
    """Append the input `labels` and a float scalar loss to a graph; return the loss, which becomes an output.

    `class_axis`, `ignore_index`, `label_smoothing` and `class_weights` belong to cross-entropy: the axis of
    the classes (the last one if None), a label whose examples do not count, the share of a label that is
    spread over all classes, and one weight per class. Half-precision logits are taken to float32 first.

    Raises:
        UserError: if the name of the labels is taken, or the logits do not fit the loss.

    """
    names = Context.of(model)
    names.invalidate()
    if names.fresh(labels) != labels:
        raise UserError(
            f"the graph already has a value '{labels}', so the labels cannot be called that",
            place=place,
            help="give them another name: --labels NAME",
        )
    for option, given in (
        ("--class-axis", class_axis),
        ("--ignore-index", ignore_index),
        ("--label-smoothing", label_smoothing or None),
        ("--class-weights", class_weights or None),
    ):
        if given is not None and kind != "cross-entropy":
            raise UserError(f"{option} belongs to the loss cross-entropy, not to {kind}", place=place)
    dims, dtype = dimensions(logits), dtype_of(logits)
    if dtype is None or not dtype.is_floating_point():
        what = "of an unknown type" if dtype is None else f"of type {dtype.name.lower()}"
        raise UserError(f"the logits '{logits.name}' are {what}, not floating-point numbers", place=place)
    if dims is None:
        raise UserError(
            f"the number of dimensions of the logits '{logits.name}' is unknown",
            place=place,
            help="export the model with the shapes of its inputs",
        )
    emit = Emitter.in_place_of(names, ir.Node("", "Loss", [], outputs=[ir.Value(name="loss")]), "loss")
    scores = emit.cast(logits, ir.DataType.FLOAT, dtype) if dtype in HALF_TYPES else logits
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    if kind == "cross-entropy":
        axis = _class_axis(logits, len(dims), class_axis, place)
        target = _input(model, labels, ir.DataType.INT64, [*dims[:axis], *dims[axis + 1 :]])
        if class_weights and isinstance(dims[axis], int) and len(class_weights) != dims[axis]:
            raise UserError(
                f"{len(class_weights)} weights of classes are given, and the logits '{logits.name}' have "
                f"{dims[axis]} classes",
                place=place,
            )
        weights = names.constant(np.array(class_weights).astype(work.numpy())) if len(class_weights) else None
        entropy = _CrossEntropy(reduction, ignore_index, label_smoothing, weights, work)
        loss = entropy.of(emit, scores, target, axis, dims)
    else:
        target = _input(model, labels, work, dims)
        if kind == "mse":
            difference = emit.op("Sub", scores, target)
            each = emit.op("Mul", difference, difference)
        else:
            each = emit.op("Sub", emit.op("Softplus", scores), emit.op("Mul", scores, target))
        loss = emit.op("ReduceMean" if reduction == "mean" else "ReduceSum", each, keepdims=0)
    loss.name, loss.type, loss.shape = names.fresh("loss"), ir.TensorType(work), ir.Shape([])
    for node in emit.nodes:
        node.metadata_props.pop("kfac.lowered", None)
    model.graph.extend(emit.nodes)
    model.graph.outputs.append(loss)
    return loss


def _class_axis(logits: ir.Value, rank: int, axis: int | None, place: str | None) -> int:
    if rank < 2:
        raise UserError(
            f"the logits '{logits.name}' have {rank} dimensions; cross-entropy needs examples and classes",
            place=place,
        )
    axis = -1 if axis is None else axis
    if not -rank <= axis < rank:
        raise UserError(
            f"the logits '{logits.name}' have {rank} dimensions, so {axis} cannot be the axis of the classes",
            place=place,
        )
    return axis % rank


def _input(model: ir.Model, name: str, dtype: ir.DataType, dims: Sequence[int | str | None]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
    model.graph.inputs.append(value)
    return value


@dataclass(frozen=True)
class _CrossEntropy:
    """A cross-entropy with its settings; `weights` is float[classes] of the type `work` of the scores."""

    reduction: Reduction
    ignored: int | None
    smoothing: float
    weights: ir.Value | None
    work: ir.DataType

    def of(
        self, emit: Emitter, scores: ir.Value, labels: ir.Value, axis: int, dims: Sequence[int | str | None]
    ) -> ir.Value:
        """Return the loss; the operator wants classes at axis 1, so others are made a matrix of examples."""
        rank, classes = len(dims), dims[axis]
        if axis not in (1, rank - 1):
            order = [other for other in range(rank) if other != axis]
            scores = emit.op("Transpose", scores, perm=[*order, axis])
        if rank > 2 and axis != 1:
            width = emit.ints(classes) if isinstance(classes, int) else emit.op("Shape", scores, start=-1)
            scores = emit.op("Reshape", scores, emit.concat(emit.ints(-1), width))
            if isinstance(classes, int):
                scores.shape, scores.type = ir.Shape([None, classes]), ir.TensorType(_float_of(scores))
            labels = emit.op("Reshape", labels, emit.ints(-1))
            rank = 2
        inputs = [scores, labels] if self.weights is None else [scores, labels, self.weights]
        attributes: dict[str, int | str] = {} if self.ignored is None else {"ignore_index": self.ignored}
        if not self.smoothing:
            attributes["reduction"] = self.reduction
            return emit.many("SoftmaxCrossEntropyLoss", inputs, 1, attributes)[0]
        attributes["reduction"] = "none"
        each, logs = emit.many("SoftmaxCrossEntropyLoss", inputs, 2, attributes)
        for value in (each, logs):
            value.type = ir.TensorType(self.work)
        logs.shape = scores.shape
        return self._smoothed(emit, each, logs, labels, rank)

    def _smoothed(
        self, emit: Emitter, each: ir.Value, logs: ir.Value, labels: ir.Value, rank: int
    ) -> ir.Value:
        """Return the loss of all examples, from the unsmoothed one of each and log p: float[N, C, ..]."""
        if self.weights is not None:
            beside = (
                emit.op("Unsqueeze", self.weights, emit.ints(*range(1, rank - 1)))
                if rank > 2
                else self.weights
            )
            logs = emit.op("Mul", logs, beside)
        classes = emit.cast(emit.entry(emit.op("Shape", logs), 1), self.work, ir.DataType.INT64)
        spread = emit.op("Neg", emit.op("ReduceSum", logs, emit.ints(1), keepdims=0))
        spread = emit.op("Div", spread, classes)
        kept = None
        if self.ignored is not None:
            mark = emit.constant(np.array(self.ignored, np.int64))
            kept = emit.op("Not", emit.op("Equal", labels, mark))
            spread = emit.op("Where", kept, spread, emit.scalar(0.0, self.work))
        both = emit.op(
            "Add",
            emit.op("Mul", each, emit.scalar(1 - self.smoothing, self.work)),
            emit.op("Mul", spread, emit.scalar(self.smoothing, self.work)),
        )
        total = emit.op("ReduceSum", both, keepdims=0)
        return total if self.reduction == "sum" else emit.op("Div", total, self._divisor(emit, labels, kept))

    def _divisor(self, emit: Emitter, labels: ir.Value, kept: ir.Value | None) -> ir.Value:
        """Return what a mean divides by, rank 0: how many labels count, or the sum of their weights."""
        if self.weights is None and kept is None:
            return emit.cast(emit.op("Size", labels), self.work, ir.DataType.INT64)
        if self.weights is None and kept is not None:
            return emit.op("ReduceSum", emit.cast(kept, self.work, ir.DataType.BOOL), keepdims=0)
        places = labels
        if kept is not None:  # an ignored label need not be a class
            places = emit.op("Where", kept, labels, emit.constant(np.array(0, np.int64)))
        counts = emit.op("Gather", self.weights, places, axis=0)
        if kept is not None:
            counts = emit.op("Where", kept, counts, emit.scalar(0.0, self.work))
        return emit.op("ReduceSum", counts, keepdims=0)


def _float_of(value: ir.Value) -> ir.DataType:
    return dtype_of(value) or ir.DataType.FLOAT
