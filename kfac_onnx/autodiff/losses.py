"""Losses over the logits of a forward-only model, made of standard operators.

| kind          | labels                                   | loss of one example or element             |
|---------------|------------------------------------------|--------------------------------------------|
| cross-entropy | int64, the logits' shape without classes | −log softmax(logits)[label]                |
| mse           | of the logits' shape and type            | (logits − labels)²                         |
| bce           | of the logits' shape and type, in [0, 1] | log(1 + exp(logits)) − labels · logits     |

`bce` is the binary cross-entropy of sigmoid(logits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from kfac_onnx.autodiff.backward import dimensions
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import HALF_TYPES, Emit, Names
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
    place: str | None = None,
) -> ir.Value:
    """Append the input `labels` and a float scalar loss to a graph; return the loss, which becomes an output.

    `class_axis` and `ignore_index` belong to cross-entropy: the axis of the classes (the last one if None),
    and a label whose examples do not count. Half-precision logits are taken to float32 first.

    Raises:
        UserError: if the name of the labels is taken, or the logits do not fit the loss.

    """
    names = Names(model)
    if names.fresh(labels) != labels:
        raise UserError(
            f"the graph already has a value '{labels}', so the labels cannot be called that",
            place=place,
            help="give them another name: --labels NAME",
        )
    for option, given in (("--class-axis", class_axis), ("--ignore-index", ignore_index)):
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
    emit = Emit(names, ir.Node("", "Loss", [], outputs=[ir.Value(name="loss")]), "loss")
    scores = emit.cast(logits, ir.DataType.FLOAT, dtype) if dtype in HALF_TYPES else logits
    work = ir.DataType.FLOAT if dtype in HALF_TYPES else dtype
    if kind == "cross-entropy":
        axis = _class_axis(logits, len(dims), class_axis, place)
        target = _input(model, labels, ir.DataType.INT64, [*dims[:axis], *dims[axis + 1 :]])
        loss = _cross_entropy(emit, scores, target, axis, dims, reduction, ignore_index)
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


def _cross_entropy(
    emit: Emit,
    scores: ir.Value,
    labels: ir.Value,
    axis: int,
    dims: Sequence[int | str | None],
    reduction: Reduction,
    ignore_index: int | None,
) -> ir.Value:
    """Return the loss; the operator wants classes at axis 1, so that others are made a matrix of examples."""
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
    attributes: dict[str, int | str] = {"reduction": reduction}
    if ignore_index is not None:
        attributes["ignore_index"] = ignore_index
    return emit.many("SoftmaxCrossEntropyLoss", [scores, labels], 1, attributes)[0]


def _float_of(value: ir.Value) -> ir.DataType:
    return dtype_of(value) or ir.DataType.FLOAT
