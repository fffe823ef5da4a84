"""From an exported training graph to the canonical one that every pass relies on (DESIGN section 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kfac_onnx import metadata
from kfac_onnx.canonical.dropped_rows import mask_dropped_rows
from kfac_onnx.canonical.fixed_bounds import fix_bounds
from kfac_onnx.canonical.folded_copies import undo_stale_copies
from kfac_onnx.canonical.loops import open_loops
from kfac_onnx.canonical.lowering import lower_training_operators
from kfac_onnx.canonical.mending import mend
from kfac_onnx.canonical.optional_inputs import require_optional_inputs
from kfac_onnx.canonical.race_free_scatters import make_scatters_race_free
from kfac_onnx.canonical.segment_sums import raise_segment_sums
from kfac_onnx.canonical.sequences import split_without_sequences
from kfac_onnx.canonical.summed_axes import settle_summed_axes
from kfac_onnx.canonical.upgrade import clean_imports, flatten, upgrade
from kfac_onnx.canonical.widen import widen
from kfac_onnx.canonical.window_scatters import raise_window_scatters
from kfac_onnx.errors import NoGradientsError, UserError
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.graph.lifting import lift_constants
from kfac_onnx.graph.shapes import infer_missing_shapes, infer_shapes
from kfac_onnx.graph.validity import require_consistent, require_tensors
from kfac_onnx.graph.values import dtype_of, is_float, rank_of, static_shape
from kfac_onnx.readers.gradient_nodes import expand_gradients
from kfac_onnx.readers.interface import READERS, Interface
from kfac_onnx.readers.load import Exported, load
from kfac_onnx.readers.loss import choose_loss, find_reduction, loss_candidates
from kfac_onnx.readers.optimizer_inside import calibrate, optimizer_inside, scaled
from kfac_onnx.readers.pairing import Pairing, find_value, pair, parameter_of
from kfac_onnx.readers.row_gradients import chosen_row_gradients, scatter_row_gradients
from kfac_onnx.readers.training_info import with_algorithm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

    from kfac_onnx.readers.training_info import Training

__all__ = ["make_canonical", "read_forward_graph", "read_training_graph"]


@blames_the_graph
def read_training_graph(
    source: str | Path | ir.Model | onnx.ModelProto,
    *,
    loss: str | None = None,
    gradients: Mapping[str, str] | None = None,
    keep_optimizer: bool = False,
) -> ir.Model:
    """Return the canonical training graph of an exported one; `source` is left unchanged.

    Args:
        source: a file, or a model in memory.
        loss: the name of the loss, where several outputs could be it.
        gradients: parameter name -> name of its gradient, where the graph's own names do not say.
        keep_optimizer: leave an optimizer that is part of the graph where it is (for the dense shape).

    The result has opset 18 or newer, standard operators, no functions, sorted nodes, and the exporter's
    names of values. Its inputs are trained parameters (or they are initializers), constants and the batch;
    its outputs the loss, the user's other outputs, and one gradient per trained parameter. It carries
    `kfac.frontend`, `kfac.parameters`, `kfac.loss`, `kfac.notes` and `kfac.refused`.

    Raises:
        UserError: if the file cannot be read, holds no gradients, or uses operators that cannot be lowered.

    """
    exported, training = with_algorithm(load(source))
    model, place = exported.model, exported.place
    flatten(model, place)
    notes = _with_plain_parts(model)
    require_tensors(model, place)
    notes += [note for note in (upgrade(model, place),) if note is not None]
    notes += mend(model)
    _infer_shapes_and_bounds(model)
    require_consistent(model, place)
    if training is not None:
        exported, made = _with_derivatives(exported, training)
        notes += made
    outputs = [str(value.name) for value in model.graph.outputs]
    chosen = scatter_row_gradients(model, chosen_row_gradients(model, gradients or {}))
    if gradients is not None:
        gradients = {**gradients, **{item.parameter: item.gradient for item in chosen}}
    exported = replace(
        exported, loss=loss or exported.loss, chosen=gradients or {}, keep_optimizer=keep_optimizer
    )
    interface = _read_interface(exported, gradients)
    notes += interface.notes
    row_gradients = [*chosen, *interface.rows]
    if row_gradients:
        notes.append(f"gradients given as rows and ids made tensors: {len(row_gradients)}")
    notes += _to_standard_operators(model, place)

    loss_value, pairing = _loss_and_pairs(exported, interface, loss or _own_loss(model), gradients)
    notes += pairing.notes
    updates = list(interface.updates)
    notes += _calibrated(model, loss_value, pairing, interface, updates, place)
    notes += _close_boundary(model, loss_value, interface)
    copied, ambiguous = undo_stale_copies(model, pairing.parameters)
    notes += copied
    _set_outputs(model, loss_value, pairing)
    _drop_unused(model, pairing)
    reduction = find_reduction(loss_value)
    name = None if loss_value is None else loss_value.name
    metadata.write(model, "frontend", interface.frontend)
    metadata.write(model, "parameters", pairing.described())
    predictions = {} if loss_value is not None else interface.boundary
    metadata.write(model, "loss", metadata.Loss(name, reduction.kind, predictions))
    metadata.write(model, "row_gradients", row_gradients)
    metadata.write(model, "orphans", list(pairing.orphans))
    if updates:
        metadata.write(model, "updates", updates)
        metadata.write(model, "exported_outputs", outputs)
        metadata.write(model, "optimizer_states", list(interface.states))
    metadata.write(model, "notes", notes)
    metadata.write(model, "refused", [*pairing.refused, *ambiguous])
    return model


@blames_the_graph
def read_forward_graph(source: str | Path | ir.Model | onnx.ModelProto) -> ir.Model:
    """Return the canonical form of a graph without gradients: what `scan` can still tell about it.

    As `read_training_graph`, but every float initializer of one or more dimensions is listed as a
    parameter, with gradient null; the loss is null too unless one output is a scalar.

    Raises:
        UserError: if the file cannot be read, or uses operators that cannot be lowered.

    """
    exported = load(source)
    model, place = exported.model, exported.place
    notes = make_canonical(model, place)
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
    metadata.write(model, "notes", notes)
    metadata.write(model, "refused", [])
    return model


def make_canonical(model: ir.Model, place: str | None) -> list[str]:
    """Bring a graph, in place, to opset 18 or newer and standard operators, sorted and without functions.

    Returns what was done, in sentences.

    Raises:
        UserError: if the graph is malformed, or uses operators that cannot be lowered.

    """
    flatten(model, place)
    notes = _with_plain_parts(model)
    require_tensors(model, place)
    notes += [note for note in (upgrade(model, place),) if note is not None]
    notes += mend(model)
    _infer_shapes_and_bounds(model)
    return notes + _to_standard_operators(model, place)


def _with_plain_parts(model: ir.Model) -> list[str]:
    """Make weights in nodes initializers, and optional inputs inputs; return notes."""
    lifted = lift_constants(model)
    notes = [f"constants in nodes made initializers: {lifted}"] if lifted else []
    return notes + require_optional_inputs(model)


def _infer_shapes_and_bounds(model: ir.Model) -> None:
    infer_shapes(model)
    if fix_bounds(model):
        infer_shapes(model)


def _with_derivatives(exported: Exported, training: Training) -> tuple[Exported, list[str]]:
    """Replace the Gradient nodes of `training_info` by what they stand for; say what the file trains with."""
    model, place = exported.model, exported.place
    exported = replace(exported, updates=training.updates)
    notes = [f"the file's own optimizer: {text}" for text in dict.fromkeys(training.optimizers)]
    if training.initialized:
        notes.append(
            f"the file's initialization of {len(training.initialized)} tensors is not run: "
            "training starts from the values that are stored (--initialize runs it)"
        )
    if training.steps == 0:
        return exported, notes
    if training.steps > 1:
        notes.append(
            f"{training.steps} consecutive training steps are one: every gradient is taken at the same values"
        )
    loss, made = expand_gradients(model, lambda: _to_standard_operators(model, place), place)
    return replace(exported, loss=loss), [*notes, *made]


def _to_standard_operators(model: ir.Model, place: str | None) -> list[str]:
    """Lower, widen and make scatters safe; shapes are inferred between, since the rules look at them."""
    split = split_without_sequences(model)
    notes = [f"sequences of parts made tensors: {split}"] if split else []
    notes += lower_training_operators(model, place)
    infer_missing_shapes(model)
    if windows := raise_window_scatters(model):
        notes.append(f"scatters of every entry made scatters of rows: {windows}")
    if dropped := mask_dropped_rows(model):
        notes.append(f"rows dropped before a scatter are masked: {dropped}")
    notes += open_loops(model)
    notes += widen(model)
    if settled := settle_summed_axes(model):
        notes.append(f"sums over the batch that found their axes at run time: {settled}")
    if sums := raise_segment_sums(model):
        notes.append(f"lowered segment sums made scatters: {sums}")
    if scatters := make_scatters_race_free(model):
        notes.append(f"scatters made safe for several threads: {scatters}")
    clean_imports(model)
    infer_missing_shapes(model)
    return notes


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


def _drop_unused(model: ir.Model, pairing: Pairing) -> None:
    """Remove nodes and initializers that nothing reads, except trained parameters."""
    RemoveUnusedNodesPass()(model)
    kept = set(pairing.parameters.values())
    for name, value in list(model.graph.initializers.items()):
        if (
            value not in kept
            and not value.uses()
            and not value.is_graph_output()
            and not value.is_graph_input()
        ):
            del model.graph.initializers[name]
