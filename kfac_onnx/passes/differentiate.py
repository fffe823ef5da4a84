"""The pass that makes a training graph of a forward-only model, and its Python form `differentiate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.disk.mapped import all_same, equal
from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.census import Census
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.registry import register

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx

    from kfac_onnx.pipeline.log import Log

    Source = str | Path | ir.Model | onnx.ModelProto

__all__ = ["Differentiate", "differentiate"]

INFERENCE = {
    "BatchNormalization": "normalizes with its running mean and variance, which stay as they are",
    "Dropout": "drops nothing",
}
"""What operators do in a model that was exported for inference, where training would do otherwise."""


@register
@dataclass(frozen=True, kw_only=True)
class Differentiate(Pass):
    """Append labels, loss and the gradients of all weights to a forward-only model.

    Reads   a model in any form that the frontends read.
    Adds    input labels, output loss (scalar), output <weight>_grad for every trained weight, whose value
            stays an initializer; the other outputs stay.
    Writes  `kfac.parameters`, `kfac.loss`, `kfac.notes`.
    Source  Griewank & Walther, Evaluating Derivatives, 2nd ed., ch. 3 (reverse mode).
    """

    name: ClassVar[str] = "differentiate"
    loss: Literal["cross-entropy", "mse", "bce"] = opt(
        "cross-entropy", "loss of the logits: mean or sum over examples, or over elements for mse and bce"
    )
    logits: str | None = opt(None, "value that the loss is of; the only floating-point output if none")
    loss_output: str | None = opt(None, "differentiate this value, which is the loss already")
    reduction: Literal["mean", "sum"] = opt("mean", "how the loss reduces")
    labels: str = opt("labels", "name of the input for the labels")
    class_axis: int | None = opt(None, "axis of the classes in the logits; the last one if none")
    ignore_index: int | None = opt(None, "label of examples that do not count")
    label_smoothing: float = opt(0.0, "share of each label that is spread over all classes", lo=0.0, hi=1.0)
    class_weights: tuple[str, ...] = opt((), "how much each class counts: one number per class")
    straight_through: bool = opt(
        False, "take QuantizeLinear with its DequantizeLinear for the identity in derivatives"
    )
    train: tuple[str, ...] = opt((), "names or patterns of the weights to train; all if empty")
    freeze: tuple[str, ...] = opt((), "names or patterns of weights that are not trained")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place; every node, input, output and metadata entry is one change."""
        from kfac_onnx.canonical.pipelines import KERNELS, PLAIN, PREPARE, STANDARD
        from kfac_onnx.graph.validity import require_tensors
        from kfac_onnx.pipeline.pipeline import parse_pipeline
        from kfac_onnx.readers.reading import READING_KEY

        if not self.labels:
            raise UserError(
                "the input for the labels needs a name", help="labels=NAME; `labels` if not given"
            )
        before = Census(model)
        place = None
        log.stale = True
        parse_pipeline(PLAIN).run(model, verify=False, log=log, key=READING_KEY)
        stored = set(model.graph.initializers)  # what is folded from here on was computed, and is no weight
        require_tensors(model, place)
        parse_pipeline(f"{PREPARE},{STANDARD}").run(model, verify=False, log=log, key=READING_KEY)
        notes = log.notes
        _refuse_gradients(model)
        inputs = list(model.graph.inputs)  # without the labels, which are no weights
        loss = self._loss(model, notes, place)
        weights, frozen, copied = _weights(model, stored, inputs, self.train, self.freeze, place)
        notes += copied
        suspicions = _suspicions(model, weights)
        if self.straight_through:
            notes += _joined(model)
        gradients = _append(model, loss, weights, place)
        for value in weights:
            if value not in gradients:
                frozen[str(value.name)] = _why_untrained(model, value, loss)
        self._require_trained(gradients, frozen, place)
        _parted(model)
        parse_pipeline(KERNELS).run(model, verify=False, log=log, key=READING_KEY)
        notes += _inference_notes(model)
        _describe(model, loss, gradients, frozen, [*notes, *suspicions])
        for name, reason in frozen.items():
            log.info(f"not trained: {name} ({reason})")
        log.info(f"trained: {', '.join(str(value.name) for value in gradients)}")
        for note in notes:
            log.info(note)
        for suspicion in suspicions:
            log.warning(suspicion)
        log.count("trained weights", len(gradients))
        return before.changes()

    def _require_trained(
        self, gradients: dict[ir.Value, ir.Value], frozen: dict[str, str], place: str | None
    ) -> None:
        """Raise UserError where something that the user wants trained by its name is not."""
        names = {str(value.name) for value in gradients}
        for name in self.train:
            if name in frozen and name not in names:
                raise UserError(
                    f"'{name}' cannot be trained: {frozen[name]}", place=place, help=_remedy(frozen[name])
                )

    def _loss(self, model: ir.Model, notes: list[str], place: str | None) -> ir.Value:
        from kfac_onnx.autodiff.losses import append_loss
        from kfac_onnx.autodiff.scores import scores_before

        if self.loss_output is not None:
            if self.logits is not None:
                raise UserError(
                    "the loss is given twice: as logits and as an output that is the loss", place=place
                )
            loss = _find(model, self.loss_output, "the loss", place)
            _require_scalar(loss, place)
            if not loss.is_graph_output():
                model.graph.outputs.append(loss)
            return loss
        logits = _logits(model, self.logits, place)
        logits, note = scores_before(model, logits, self.loss, self.class_axis, place)
        notes += [] if note is None else [note]
        return append_loss(
            model,
            logits,
            self.loss,
            reduction=self.reduction,
            labels=self.labels,
            class_axis=self.class_axis,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weights=_numbers(self.class_weights, place),
            place=place,
        )


@checked
@blames_the_graph
def differentiate(
    source: Source,
    *,
    loss: str = "cross-entropy",
    logits: str | None = None,
    loss_output: str | None = None,
    reduction: str = "mean",
    labels: str = "labels",
    class_axis: int | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] = (),
    straight_through: bool = False,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    log: Log | None = None,
) -> ir.Model:
    """Return a forward-only model with labels, loss and the gradients of its weights: a training graph.

    Args:
        source: a file, or a model already read (which is not changed).
        loss: `cross-entropy`, `mse` or `bce` (of logits).
        logits: the value that the loss is of; the only floating-point output if None.
        loss_output: a value that is the loss already; then nothing is said of logits and labels.
        reduction: `mean` or `sum`, over examples (labels) or, for mse and bce, elements.
        labels: name of the new input. int64 without the class axis for cross-entropy, else as the logits.
        class_axis: axis of the classes in the logits; the last one if None.
        ignore_index: label of examples that do not count.
        label_smoothing: share of each label that is spread evenly over all classes, for cross-entropy.
        class_weights: how much each class counts, one number per class, for cross-entropy. A mean divides by
            the sum of the weights of the labels, as `torch.nn.functional.cross_entropy` does.
        straight_through: take each QuantizeLinear with its DequantizeLinear for the identity in derivatives,
            where nothing is cut off; otherwise what is quantized has none.
        train: names or patterns of what is trained; all that look like weights if empty.
        freeze: names or patterns of weights that are not trained.
        log: receives what is said: which weights are trained, which constants are not, and why.

    Raises:
        UserError: the file is not a model, a name is unknown, the logits do not fit the loss, or nodes
            have no gradient rule (all of them are listed).

    """
    from kfac_onnx.pipeline.pipeline import Pipeline
    from kfac_onnx.readers.load import load

    exported = load(source)
    step = Differentiate(
        loss=loss,  # pyright: ignore[reportArgumentType]  checked by the option
        logits=logits,
        loss_output=loss_output,
        reduction=reduction,  # pyright: ignore[reportArgumentType]  checked by the option
        labels=labels,
        class_axis=class_axis,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weights=tuple(repr(float(number)) for number in class_weights),
        straight_through=straight_through,
        train=tuple(train),
        freeze=tuple(freeze),
    )
    try:
        Pipeline((step,)).run(exported.model, verify=False, log=log)
    except UserError as e:
        e.place, e.context = e.place or exported.place, None
        raise
    Pipeline(()).run(exported.model)  # checks what the pass made
    return exported.model


def _refuse_gradients(model: ir.Model) -> None:
    """Raise UserError for a graph that is a training graph already."""
    known = {*model.graph.initializers, *(value.name for value in model.graph.inputs)}
    for value in model.graph.outputs:
        if str(value.name).endswith("_grad") and str(value.name).removesuffix("_grad") in known:
            raise UserError(
                f"the graph already has gradients: its output '{value.name}'",
                help="it is a training graph: give it to `kfac-onnx transform` or `train`",
            )


def _find(model: ir.Model, name: str, what: str, place: str | None) -> ir.Value:
    """Return the floating-point value with this name: an output, or any value inside.

    Raises UserError when there is none.
    """
    for value in model.graph.outputs:
        if value.name == name:
            return value
    inner = [value for node in model.graph for value in node.outputs if value.name]
    for value in inner:
        if value.name == name:
            return value
    outputs = [str(value.name) for value in model.graph.outputs]
    near = did_you_mean(name, outputs) or did_you_mean(name, [str(value.name) for value in inner])
    raise UserError(
        f"the graph has no value '{name}', given as {what}{near}",
        place=place,
        help=f"its outputs are {', '.join(outputs)}",
    )


def _logits(model: ir.Model, name: str | None, place: str | None) -> ir.Value:
    from kfac_onnx.graph.values import is_float

    if name is not None:
        return _find(model, name, "the logits", place)
    found = [value for value in model.graph.outputs if is_float(value)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(value.name) for value in found)
    raise UserError(
        f"{len(found)} outputs could be the logits: {names}" if found else "no output could be the logits",
        place=place,
        help="name them with --logits NAME",
    )


def _require_scalar(loss: ir.Value, place: str | None) -> None:
    from kfac_onnx.graph.values import is_float, static_shape

    shape = static_shape(loss)
    if not is_float(loss) or shape is None or any(dim != 1 for dim in shape):
        dims = "of unknown shape" if loss.shape is None else f"of shape [{', '.join(map(str, loss.shape))}]"
        raise UserError(
            f"'{loss.name}' cannot be the loss: it is {dims}, not one floating-point number",
            place=place,
            help="let --logits name what the loss is of, and --loss say which",
        )


def _weights(
    model: ir.Model,
    stored: set[str],
    inputs: list[ir.Value],
    train: tuple[str, ...],
    freeze: tuple[str, ...],
    place: str | None,
) -> tuple[list[ir.Value], dict[str, str], list[str]]:
    """Return what may be trained, what is not and why, and notes on transposed copies that were undone."""
    from kfac_onnx.autodiff.trainable import BY_THE_USER, find_candidates
    from kfac_onnx.canonical.folded_copies import undo_repeated_vectors, undo_stale_copies

    found = find_candidates(model, stored, inputs, train, freeze, place)
    repeated = undo_repeated_vectors(model, found.trained)
    known = {*model.graph.initializers.values(), *model.graph.inputs}
    weights = _without_transposed_copies(tuple(value for value in found.trained if value in known))
    frozen = [name for name, reason in found.constants.items() if reason == BY_THE_USER]
    notes, ambiguous = undo_stale_copies(model, {str(value.name): value for value in weights}, frozen)
    if ambiguous:
        raise UserError(
            f"the weight '{ambiguous[0].parameter}' cannot be trained: {ambiguous[0].reason}",
            place=place,
            help=ambiguous[0].remedy,
        )
    return weights, found.constants, [*repeated, *notes]


def _without_transposed_copies(values: tuple[ir.Value, ...]) -> list[ir.Value]:
    """Leave out matrices that an exporter folded from the transpose of another one (tied weights).

    Of such a pair the matrix that rows are looked up in stays, else the first.
    """
    import numpy as np

    kept: list[ir.Value] = []
    by_shape: dict[tuple[int, ...], list[ir.Value]] = {}
    looked_up = sorted(values, key=lambda value: all(node.op_type != "Gather" for node, _ in value.uses()))
    for value in looked_up:
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2:
            kept.append(value)
            continue
        array = np.asarray(tensor.numpy())
        others = by_shape.get(array.shape[::-1], [])
        copied = array.size > 1 and not all_same(array)
        if copied and any(
            other.const_value is not None and equal(other.const_value.numpy(), array.T) for other in others
        ):
            continue
        by_shape.setdefault(array.shape, []).append(value)
        kept.append(value)
    return [value for value in values if any(value is other for other in kept)]


def _append(
    model: ir.Model, loss: ir.Value, weights: list[ir.Value], place: str | None
) -> dict[ir.Value, ir.Value]:
    """Append the gradients and make each an output `<weight>_grad`."""
    from kfac_onnx.autodiff import append_gradients
    from kfac_onnx.graph.context import Context

    taken = {f"{value.name}_grad" for value in weights}
    names = Context.of(model)
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken and not value.is_graph_output():
                value.name = names.fresh(f"{value.name}_inner")
    found = append_gradients(model, loss, weights, place=place)
    if not found:
        reasons = {str(value.name): _why_untrained(model, value, loss) for value in weights}
        raise UserError(
            f"no weight is trained: the loss '{loss.name}' has no derivative with respect to any of them"
            if weights
            else f"no weight is trained: the loss '{loss.name}' depends on none of the initializers",
            place=place,
            tried=[f"{name}: {reason}" for name, reason in reasons.items()],
            help=next(map(_remedy, reasons.values()), _BY_NAME),
        )
    used: set[ir.Value] = set()
    for value in weights:
        gradient = found.get(value)
        if gradient is None:
            continue
        wanted = f"{value.name}_grad"
        if gradient.producer() is None or gradient in used or gradient.is_graph_output():
            node = ir.node("Identity", [gradient])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            model.graph.append(node)
            found[value] = gradient = node.outputs[0]
        used.add(gradient)
        gradient.name = wanted
        gradient.type, gradient.shape = ir.TensorType(value.dtype or ir.DataType.FLOAT), value.shape
        model.graph.outputs.append(gradient)
    return {value: found[value] for value in weights if value in found}


def _inference_notes(model: ir.Model) -> list[str]:
    present = {node.op_type for graph in model.graphs() for node in graph if not _trains(node)}
    return [
        f"{op_type} was exported for inference: it {what}"
        for op_type, what in INFERENCE.items()
        if op_type in present
    ]


def _trains(node: ir.Node) -> bool:
    """Say whether a BatchNormalization or Dropout was exported for training."""
    from kfac_onnx.graph.values import constant, int_attribute

    if node.op_type != "Dropout":
        return bool(int_attribute(node, "training_mode", 0))
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    known = constant(mode)
    return mode is not None and (known is None or bool(known))


def _numbers(texts: tuple[str, ...], place: str | None) -> tuple[float, ...]:
    """Return the class weights; raise UserError for what is no finite number, or below 0."""
    import math

    numbers: list[float] = []
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise UserError(
                f"'{text}' is no weight of a class: a weight is a finite number, at least 0", place=place
            )
        numbers.append(number)
    return tuple(numbers)


_BY_NAME: Final = "name what to train with --train NAME; weights may be inputs"


def _why_untrained(model: ir.Model, weight: ir.Value, loss: ir.Value) -> str:
    from kfac_onnx.autodiff.blocked import why_untrained

    return why_untrained(weight, loss, list(model.graph))


def _remedy(reason: str) -> str:
    if "QuantizeLinear" in reason:
        return "--straight-through takes quantization for the identity in derivatives"
    return _BY_NAME if "no derivative" not in reason else "replace that operator by one with a derivative"


def _joined(model: ir.Model) -> list[str]:
    from kfac_onnx.autodiff.straight_through import join_pairs

    pairs = join_pairs(model)
    return [f"quantizations that derivatives pass straight through: {pairs}"] if pairs else []


def _parted(model: ir.Model) -> None:
    from kfac_onnx.autodiff.straight_through import part_pairs

    part_pairs(model)


def _suspicions(model: ir.Model, weights: list[ir.Value]) -> list[str]:
    """Return sentences on weights that an exporter seems to have merged or folded."""
    import numpy as np

    from kfac_onnx.autodiff.detached import KEPT_DETACH, cancelled
    from kfac_onnx.autodiff.merged import REMEDY, folded_positions, merged_parameters
    from kfac_onnx.graph.values import label

    def array_of(value: ir.Value) -> np.ndarray | None:
        return None if value.const_value is None else np.asarray(value.const_value.numpy())

    suspicions = [
        f"{item}: some exporters merge parameters that start equal; if the model has several, {REMEDY}"
        for item in merged_parameters(weights, array_of, lambda _: True)
        if not item.layers_shared
    ]
    suspicions += [
        f"{label(node)} adds '{h.name}' to what it was subtracted from, as a straight-through estimator does "
        f"whose `detach` was not exported: no gradient reaches '{h.name}' there; {KEPT_DETACH}"
        for node, h in cancelled(model.graph)
    ]
    arrays = {value: array_of(value) for value in weights}
    for value, table in folded_positions(arrays, lambda _: True):
        suspicions.append(
            f"'{value.name}' is added whole to rows of '{table.name}', as a lookup of all positions is that "
            f"an exporter folded; if the model looks positions up in a table, {REMEDY}"
        )
    return suspicions


def _describe(
    model: ir.Model,
    loss: ir.Value,
    gradients: dict[ir.Value, ir.Value],
    frozen: dict[str, str],
    notes: list[str],
) -> None:
    from kfac_onnx.readers.loss import find_reduction
    from kfac_onnx.readers.pairing import parameter_of

    parameters = [parameter_of(value, gradient.name) for value, gradient in gradients.items()]
    metadata.write(model, "frontend", "differentiated")
    metadata.write(model, "parameters", parameters)
    metadata.write(model, "loss", metadata.Loss(loss.name, find_reduction(loss).kind))
    metadata.write(model, "frozen", [metadata.Frozen(name, reason) for name, reason in frozen.items()])
    metadata.write(model, "notes", notes)
    metadata.write(model, "refused", [])
