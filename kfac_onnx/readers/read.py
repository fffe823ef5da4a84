"""From an exported training graph to the canonical one that every pass relies on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.autodiff.gradient_nodes import hold_losses
from kfac_onnx.canonical.lowering.optimizers import GROUPS
from kfac_onnx.canonical.pipelines import FINISH, PLAIN, PREPARE, STANDARD
from kfac_onnx.canonical.row_gradients import ScatterRowGradients
from kfac_onnx.errors import NoGradientsError, UserError
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.graph.validity import require_consistent, require_inferable, require_tensors
from kfac_onnx.graph.values import dtype_of, is_float, rank_of, static_shape
from kfac_onnx.pipeline.registry import pass_class
from kfac_onnx.readers.carried import (
    carried_states,
    close_states,
    hidden_states,
    open_states,
    require_carried,
)
from kfac_onnx.readers.interface import READERS, Interface
from kfac_onnx.readers.load import Exported, load
from kfac_onnx.readers.loss import choose_loss, find_reduction, loss_candidates
from kfac_onnx.readers.optimizer_inside import calibrate, optimizer_inside, scaled
from kfac_onnx.readers.pairing import Pairing, find_value, pair, parameter_of
from kfac_onnx.readers.reading import Reading
from kfac_onnx.readers.row_gradients import chosen_row_gradients
from kfac_onnx.readers.training_info import with_algorithm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx

    from kfac_onnx.pipeline.log import Log
    from kfac_onnx.pipeline.pipeline import Trace
    from kfac_onnx.readers.training_info import Training

__all__ = ["read_forward_graph", "read_training_graph"]


@blames_the_graph
def read_training_graph(
    source: str | Path | ir.Model | onnx.ModelProto,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    keep_optimizer: bool = False,
    trace: Trace | None = None,
    log: Log | None = None,
) -> ir.Model:
    """Return the canonical training graph of an exported one; `source` is left unchanged.

    Args:
        source: a file, or a model in memory.
        loss: the name of the loss, where several outputs could be it.
        gradients: parameter name -> name of its gradient, where the graph's own names do not say.
        keep_optimizer: leave an optimizer that is part of the graph where it is (for the dense shape).
        trace: what is checked and shown between the passes that the graph goes through.
        log: receives what the passes say.

    The result has opset 18 or newer, standard operators, no functions, sorted nodes, and the exporter's
    names of values. Its inputs are trained parameters (or they are initializers), constants and the batch;
    its outputs the loss, the user's other outputs, and one gradient per trained parameter. It carries
    `kfac.frontend`, `kfac.parameters`, `kfac.loss`, `kfac.notes`, `kfac.refused` and `kfac.reading`, the
    passes that it went through.

    Raises:
        UserError: if the file cannot be read, holds no gradients, or uses operators that cannot be lowered.

    """
    exported, training = with_algorithm(load(source))
    model, place = exported.model, exported.place
    reading = Reading(model, place, trace, log)
    _forget_step(model)
    opened = open_states(model)
    reading.run(PLAIN)
    require_tensors(model, place)
    reading.run(PREPARE if training is None else _without_states(training, model))
    require_consistent(model, place)
    carried = carried_states(model, place)
    require_inferable(model, place, None if carried or reading.log.stale else reading.log.inferred)
    reading.log.inferred = None  # as large as the graph
    reading.log.stale = True  # new outputs
    if training is not None:
        exported = _with_derivatives(exported, training, reading)
    outputs = [str(value.name) for value in model.graph.outputs]
    chosen = _scattered(reading, chosen_row_gradients(model, gradients or {}))
    if gradients is not None:
        gradients = {**gradients, **{item.parameter: item.gradient for item in chosen}}
    exported = replace(
        exported, loss=loss or exported.loss, chosen=gradients or {}, keep_optimizer=keep_optimizer
    )
    nodes = list(model.graph)
    with hidden_states(model, carried):
        interface = _read_interface(exported, gradients)
    reading.log.stale |= nodes != list(model.graph)  # a reader may edit, too
    rows = _scattered(reading, interface.rows)
    interface.gradients.update((item.parameter, item.gradient) for item in rows)
    reading.notes.extend(interface.notes)
    row_gradients = [*chosen, *rows]
    if row_gradients:
        reading.notes.append(f"gradients given as rows and ids made tensors: {len(row_gradients)}")
    reading.run(STANDARD)

    with hidden_states(model, carried):
        loss_value, pairing = _loss_and_pairs(exported, interface, loss or _own_loss(model), gradients)
    reading.notes.extend(pairing.notes)
    updates = list(interface.updates)
    reading.notes.extend(_calibrated(model, loss_value, pairing, interface, updates, place))
    reading.notes.extend(_close_boundary(model, loss_value, interface))
    _set_outputs(model, loss_value, pairing)
    reduction = find_reduction(loss_value)
    name = None if loss_value is None else loss_value.name
    metadata.write(model, "frontend", interface.frontend)
    metadata.write(model, "parameters", pairing.described())
    predictions = {} if loss_value is not None else interface.boundary
    metadata.write(model, "loss", metadata.Loss(name, reduction.kind, predictions))
    metadata.write(model, "row_gradients", row_gradients)
    metadata.write(model, "orphans", list(pairing.orphans))
    if carried := require_carried(model, carried):
        metadata.write(model, "carried", carried)
        reading.notes.append(f"running statistics and other state of the graph itself: {len(carried)}")
    if updates:
        metadata.write(model, "updates", updates)
        metadata.write(model, "exported_outputs", outputs)
        metadata.write(model, "optimizer_states", list(interface.states))
    metadata.write(model, "refused", list(pairing.refused))
    reading.run(FINISH)
    metadata.write(model, "notes", reading.notes)
    close_states(model, opened)
    reading.finish()
    return model


def _forget_step(model: ir.Model) -> None:
    """Take out what a model that is a whole step already says of itself: it is read as a graph like others.

    Its optimizer goes, as anybody's does, and with it the states that these entries name. That it was a step
    is kept in `kfac.transformed`.
    """
    entries = [
        f"kfac.{key}" for key in ("step", "state", "sites", "id_checks", "roles", "draft", "draft_states")
    ]
    present = [entry for entry in entries if model.metadata_props.pop(entry, None) is not None]
    if present:
        model.metadata_props["kfac.transformed"] = "true"


@blames_the_graph
def read_forward_graph(
    source: str | Path | ir.Model | onnx.ModelProto, *, trace: Trace | None = None, log: Log | None = None
) -> ir.Model:
    """Return the canonical form of a graph without gradients: what `scan` can still tell about it.

    As `read_training_graph`, but every float initializer of one or more dimensions is listed as a
    parameter, with gradient null; the loss is null too unless one output is a scalar.

    Raises:
        UserError: if the file cannot be read, or uses operators that cannot be lowered.

    """
    exported = load(source)
    model = exported.model
    reading = Reading(model, exported.place, trace, log)
    reading.run(PLAIN)
    require_tensors(model, exported.place)
    reading.run(f"{PREPARE},{STANDARD}")
    found = loss_candidates(model, ())
    loss = found[0] if len(found) == 1 else None
    parameters = [
        parameter_of(value, None)
        for value in model.graph.initializers.values()
        if is_float(value) and rank_of(value)
    ]
    metadata.write(model, "frontend", "forward")
    metadata.write(model, "parameters", parameters)
    metadata.write(
        model, "loss", metadata.Loss(None if loss is None else loss.name, find_reduction(loss).kind)
    )
    metadata.write(model, "notes", reading.notes)
    metadata.write(model, "refused", [])
    reading.finish()
    return model


def _without_states(training: Training, model: ir.Model) -> str:
    """Return `PREPARE` for a file that says which initializers are its states: they are no constants."""
    held = model.graph.initializers
    states = [name for name in training.updates if name in held and not is_float(held[name])]
    fold = str(pass_class("fold-constants")(keep=tuple(states)))  # pyright: ignore[reportCallIssue]
    return PREPARE.replace("fold-constants", fold)


def _scattered(reading: Reading, pairs: Sequence[metadata.RowGradient]) -> list[metadata.RowGradient]:
    """Scatter gradients that are rows and ids; return the pairs with the names of their scatters."""
    if not pairs:
        return []
    model = reading.model
    model.metadata_props.pop("kfac.row_gradients", None)
    texts = tuple(f"{item.parameter}={item.values}:{item.indices}" for item in pairs)
    reading.run(str(ScatterRowGradients(pairs=texts)))
    return metadata.read_list(model, "row_gradients", metadata.RowGradient)


def _with_derivatives(exported: Exported, training: Training, reading: Reading) -> Exported:
    """Replace the Gradient nodes of `training_info` by what they stand for; say what the file trains with."""
    exported = replace(exported, updates=training.updates)
    reading.notes.extend(f"the file's own optimizer: {text}" for text in dict.fromkeys(training.optimizers))
    if training.initialized:
        reading.notes.append(
            f"the file's initialization of {len(training.initialized)} tensors is not run: "
            "training starts from the values that are stored (--initialize runs it)"
        )
    if training.steps == 0:
        return exported
    if training.steps > 1:
        reading.notes.append(
            f"{training.steps} consecutive training steps are one: every gradient is taken at the same values"
        )
    hold_losses(exported.model)
    kept = "[Gradient," + ",".join(GROUPS) + "]"  # the reader reads optimizers as what they are
    reading.run(STANDARD.replace("lower-training-operators", f"lower-training-operators{{keep={kept}}}"))
    reading.run("expand-gradients,infer-shapes")
    told = metadata.read(exported.model, "loss", metadata.Loss)
    return exported if told is None else replace(exported, loss=told.value)


def _own_loss(model: ir.Model) -> str | None:
    """Return the output that the pass `differentiate` made the loss, if it wrote this file."""
    told = metadata.read(model, "loss", metadata.Loss)
    if told is None or model.metadata_props.get("kfac.frontend") != "differentiated":
        return None
    return told.value if any(value.name == told.value for value in model.graph.outputs) else None


def _read_interface(exported: Exported, gradients: Mapping[str, str] | None) -> Interface:
    misses: list[str] = []
    for reader in (optimizer_inside, *READERS):
        found = reader(exported)
        if isinstance(found, Interface):
            return found
        misses.append(f"{reader.__name__.replace('_', '-')}: {found.reason}")
    if gradients:
        return Interface("named-by-user", {})
    raise NoGradientsError(
        "the graph has no gradients of its parameters",
        place=exported.place,
        tried=misses,
        help="append loss and gradients with `kfac-onnx differentiate`, export them as outputs, "
        "or name the pairs with --gradients PARAMETER=OUTPUT",
    )


def _loss_and_pairs(
    exported: Exported, interface: Interface, loss: str | None, gradients: Mapping[str, str] | None
) -> tuple[ir.Value | None, Pairing]:
    model, place = exported.model, exported.place
    loss = loss or interface.loss
    named = None if loss is None else find_value(model, loss, "the loss", place)
    names = {*interface.gradients.values(), *interface.orphans.values(), *(gradients or {}).values()}
    taken = {value for value in model.graph.outputs if value.name in names}
    found = [named] if named is not None else loss_candidates(model, taken)
    if interface.by_position and not gradients and len(found) > 1 and found[0] is model.graph.outputs[0]:
        found = found[:1]  # scalars after the first are gradients of scalar parameters
    if interface.boundary:
        found = [value for value in found if static_shape(value) == ()]
    chosen = choose_loss(found, boundary=bool(interface.boundary), place=place)
    return chosen, pair(model, interface, [] if chosen is None else [chosen], gradients, place)


def _calibrated(
    model: ir.Model,
    loss: ir.Value | None,
    pairing: Pairing,
    interface: Interface,
    updates: list[metadata.HostUpdate],
    place: str | None,
) -> list[str]:
    """Bring gradients that may be off by a constant to the scale of the loss's derivative; tell `updates`.

    Raises:
        UserError: if that cannot be found out, and the constants of the parameters differ.

    """
    unsure = {name: rate for name, rate in interface.unsure.items() if name in pairing.gradients}
    if loss is None or not unsure:
        return []
    scales = calibrate(model, loss, {name: pairing.gradients[name] for name in unsure})
    open_ones = [name for name, rate in unsure.items() if rate and name not in scales.factors]
    if open_ones and len({rate for rate in unsure.values() if rate}) > 1:
        raise UserError(
            f"the update of '{open_ones[0]}' is multiplied by a constant, which may be its learning rate "
            "or a part of its gradient",
            place=place,
            help=f"name the gradient: --gradients {open_ones[0]}=VALUE (a value inside the graph will do)",
        )
    for name in scales.apart:
        if name in interface.decayed:
            raise UserError(
                f"a multiple of '{name}' is part of its update, and the loss depends on it too: whether that "
                "is weight decay or the derivative of a penalty cannot be told",
                place=place,
                help=f"name the gradient: --gradients {name}=VALUE (a value inside the graph will do)",
            )
    notes: list[str] = []
    for name, factor in scales.factors.items():
        if factor != 1.0:
            pairing.gradients[name] = scaled(model, pairing.gradients[name], factor)
            updates[:] = [replace(item, scale=factor) if item.parameter == name else item for item in updates]
            notes.append(f"the gradient of '{name}' is scaled by {factor:g}: a part of it was in the update")
    if scales.apart:
        names = ", ".join(scales.apart)
        notes.append(f"not parallel to the derivative of the loss (`verify` compares them): {names}")
    return notes


def _close_boundary(model: ir.Model, loss: ir.Value | None, interface: Interface) -> list[str]:
    """Where a scalar prediction is the loss, set the gradients that a host would feed: 1, and 0 elsewhere."""
    if loss is None or loss.name not in interface.boundary:
        return []
    inputs = {value.name: value for value in model.graph.inputs}
    made = {value.name: value for value in model.graph.outputs}
    for prediction, gradient in interface.boundary.items():
        source, value = made[prediction], inputs.get(gradient)
        node = source.producer()
        if value is None or node is None:
            continue
        dtype = dtype_of(value) or dtype_of(source) or ir.DataType.FLOAT
        fill = np.full(1, prediction == loss.name).astype(dtype.numpy())
        shape = ir.node("Shape", [source], name=f"kfac/boundary/{gradient}/shape")
        whole = ir.node("ConstantOfShape", shape.outputs, {"value": ir.tensor(fill)})
        shape.outputs[0].name = whole.name = f"kfac/boundary/{gradient}"
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        model.graph.insert_after(node, [shape, whole])
        value.replace_all_uses_with(whole.outputs[0], replace_graph_outputs=True)
        model.graph.inputs.remove(value)
        whole.outputs[0].name, whole.outputs[0].type, whole.outputs[0].shape = (
            gradient,
            value.type,
            value.shape,
        )
    others = [name for name, gradient in interface.boundary.items() if gradient and name != loss.name]
    rest = f"; nothing else is fed back: {', '.join(others)}" if others else ""
    return [f"the prediction '{loss.name}' is a scalar and is the loss{rest}"]


def _set_outputs(model: ir.Model, loss: ir.Value | None, pairing: Pairing) -> None:
    """Keep the exporter's outputs in their order; other losses and gradients come after."""
    outputs = list(model.graph.outputs)
    if loss is not None and loss not in outputs:
        outputs.append(loss)
    taken = set[ir.Value]() if loss is None else {loss}
    for name, value in pairing.gradients.items():
        output = value
        if value.shape is None or value.type is None:  # a gradient is like its parameter
            value.shape = ir.Shape(static_shape(pairing.parameters[name]) or ())
            value.type = ir.TensorType(
                dtype_of(value) or dtype_of(pairing.parameters[name]) or ir.DataType.FLOAT
            )
        if value in taken:  # one value is the gradient of two parameters: each output has its own name
            node = ir.Node("", "Identity", [value], num_outputs=1, name=f"kfac/gradient/{name}")
            output = node.outputs[0]
            output.name, output.type, output.shape = f"kfac/gradient/{name}", value.type, value.shape
            model.graph.append(node)
            pairing.gradients[name] = output
        taken.add(value)
        if output not in outputs:
            outputs.append(output)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
