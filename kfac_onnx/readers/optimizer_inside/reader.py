"""Reads a graph that contains its optimizer, and takes the optimizer out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kfac_onnx.autodiff.gradient_nodes import is_derivative
from kfac_onnx.errors import NoGradientsError, UserError
from kfac_onnx.graph.context import Context
from kfac_onnx.graph.emit import Emitter, Miss
from kfac_onnx.graph.values import dtype_of, rank_of, static_shape
from kfac_onnx.readers.interface import Interface
from kfac_onnx.readers.optimizer_inside.find_pairs import Pairs, find_pairs, scalar_losses
from kfac_onnx.readers.optimizer_inside.find_updates import Part, Update, find_updates
from kfac_onnx.readers.optimizer_inside.flow import Flow, operands
from kfac_onnx.readers.optimizer_inside.host_update import OURS, kept

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kfac_onnx.readers.load import Exported

__all__ = ["optimizer_inside"]

GRADIENT: Final = "_grad"
REMEDY: Final = "name the gradient: --gradients {}=VALUE (a value inside the graph will do)"
NAMED: Final = 5
"""Outputs that a note names."""


def optimizer_inside(exported: Exported) -> Interface | Miss:
    """Read a graph of which outputs are new values of parameters; its optimizer is removed.

    Raises:
        UserError: if several outputs could be a parameter's new value, or its gradient cannot be told.

    """
    model, declared, chosen = exported.model, exported.updates, exported.chosen
    values = _by_name(model)
    changing = [values[name] for name in declared if name in values]
    if exported.loss is not None and exported.loss not in values:
        return Miss(f"it has no value '{exported.loss}'")
    losses = _losses(exported, values, changing)
    if not losses:
        return _without_loss(exported, changing)
    flow = Flow(model, losses, changing)
    named = {str(item.name): item for item in model.graph.outputs if str(item.name).endswith(GRADIENT)}
    named = {name.removesuffix(GRADIENT): item for name, item in named.items()}
    if declared:
        pairs = Pairs({
            values[key]: values[new]
            for key, new in declared.items()
            if values[key] in flow.forward and flow.is_float(values[key])
        })  # fmt: skip
    else:
        pairs = find_pairs(model, flow, {str(item.name) for item in named.values()})
    if not pairs.news and not pairs.ambiguous:
        return Miss("none of its outputs is a parameter with an update added to it")
    _require_clear(pairs, chosen, exported.place)
    flow.mark({*pairs.news, *pairs.ambiguous})
    known = {value for value in flow.batch if is_derivative(value)}
    known |= {item for name, item in named.items() if values.get(name) in pairs.news}
    updates, misses = find_updates(pairs.news, flow, known)
    still = _without_gradient(misses, pairs, flow, known) if declared else []
    for parameter, miss in misses.items():
        if str(parameter.name) not in chosen and str(parameter.name) not in named and parameter not in still:
            raise UserError(
                f"'{pairs.news[parameter].name}' is the new value of '{parameter.name}', "
                f"but its gradient cannot be told: {miss.reason}",
                place=exported.place,
                help=REMEDY.format(parameter.name),
            )
    gradients = {
        str(item.parameter.name): _gradient(model, item)
        for item in updates
        if str(item.parameter.name) not in chosen
    }
    for name, item in named.items():
        if name in values and values[name] in flow.forward and name not in chosen:
            gradients.setdefault(name, item)
    notes = [f"'{item.name}' is changed by no gradient: it stays as it is" for item in still]
    news = [*pairs.news.values(), *_all(pairs)]
    if exported.keep_optimizer:
        notes = [*_notes(updates, "kept"), *notes]
        held, states = kept(pairs.news, updates, exported, flow)
        for item in states:  # so that nobody takes their first values for constants
            if not values[item.input].is_graph_input():
                model.graph.inputs.append(values[item.input])
    else:
        held, states = (), ()
        notes = [*_notes(updates, "taken out"), *notes]
        dropped = _take_out(exported, flow, news, gradients, losses)
        if dropped:
            more = "" if len(dropped) <= NAMED else f" and {len(dropped) - NAMED} more"
            notes.append(f"outputs of the graph's optimizer are gone: {', '.join(dropped[:NAMED])}{more}")
    return Interface(
        "training-info" if declared else "optimizer-inside",
        {name: str(value.name) for name, value in gradients.items()},
        notes=tuple(notes),
        loss=str(losses[0].name) if len(losses) == 1 else None,
        updates=held,
        states=states,
        decayed=frozenset(str(item.parameter.name) for item in updates if item.decayed),
        unsure={
            str(item.parameter.name): None if item.sure else item.rate or 1.0
            for item in updates
            if not declared and str(item.parameter.name) not in {*chosen, *named}
        },
    )


def _by_name(model: ir.Model) -> dict[str, ir.Value]:
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values.update((str(value.name), value) for value in model.graph.inputs)
    values.update(model.graph.initializers)
    return values


def _losses(
    exported: Exported, values: Mapping[str, ir.Value], changing: Collection[ir.Value]
) -> list[ir.Value]:
    if exported.loss is not None:
        return [values[exported.loss]]
    return scalar_losses(exported.model, Flow(exported.model, (), changing))


def _without_loss(exported: Exported, changing: Collection[ir.Value]) -> Miss:
    """Refuse updates without a loss: taken by position they would pass for gradients."""
    model = exported.model
    every = Flow(model, model.graph.outputs, changing)
    inner = {value for value in every.forward if value.producer() is not None}
    every.forward -= inner
    if find_pairs(model, every, ()).news and not exported.chosen:
        raise NoGradientsError(
            "outputs of the graph are new values of its parameters, but none is the loss",
            place=exported.place,
            help="export the loss as an output of the training graph, or name it with --loss NAME",
        )
    return Miss("none of its outputs is a scalar that could be the loss")


def _require_clear(pairs: Pairs, chosen: Mapping[str, str], place: str | None) -> None:
    for parameter, found in pairs.ambiguous.items():
        if str(parameter.name) not in chosen:
            names = ", ".join(str(value.name) for value in found)
            raise UserError(
                f"{len(found)} outputs of the graph could be the new value of '{parameter.name}': {names}",
                place=place,
                help=REMEDY.format(parameter.name),
            )


def _all(pairs: Pairs) -> list[ir.Value]:
    return [value for found in pairs.ambiguous.values() for value in found]


def _without_gradient(
    misses: Mapping[ir.Value, Miss], pairs: Pairs, flow: Flow, known: Collection[ir.Value]
) -> list[ir.Value]:
    """Return what training_info changes by no gradient, such as running averages."""
    reached = _descendants(known, flow)
    return [parameter for parameter in misses if pairs.news[parameter] not in reached]


def _descendants(values: Collection[ir.Value], flow: Flow) -> set[ir.Value]:
    found = set(values)
    for node in flow.model.graph:
        if any(value in found for value in operands(node)):
            found.update(node.outputs)
    return found


def _gradient(model: ir.Model, update: Update) -> ir.Value:
    """Return the value that is a parameter's gradient, emitting what the graph has in parts."""
    parts = update.parts
    if len(parts) == 1 and parts[0].scatter is None and not parts[0].negative and not parts[0].views:
        return parts[0].value
    anchor = update.new.producer()
    if anchor is None:
        raise AssertionError("a new value is computed")
    emit = Emitter.in_place_of(Context.of(model), anchor, "gradient")
    terms = [_part(emit, item, update.parameter) for item in parts]
    total = terms[0]
    for term in terms[1:]:
        total = emit.op("Add", total, term)
    shape = static_shape(update.parameter)
    total.name = emit.context.fresh(f"{update.parameter.name}{GRADIENT}")
    total.type = ir.TensorType(dtype_of(parts[0].value) or ir.DataType.FLOAT)
    total.shape = None if shape is None else ir.Shape(shape)
    for node in emit.nodes:
        node.metadata_props.pop("kfac.lowered", None)
        node.metadata_props[OURS] = str(update.parameter.name)
    model.graph.extend(emit.nodes)
    return total


def _part(emit: Emitter, part: Part, parameter: ir.Value) -> ir.Value:
    dtype = dtype_of(part.value) or dtype_of(parameter) or ir.DataType.FLOAT
    value = part.value
    for view in part.views:
        value = emit.many(view.op_type, [value, *view.inputs[1:]], 1, _settings(view))[0]
    if part.scatter is None:
        return emit.op("Neg", value) if part.negative else value
    shape = static_shape(parameter)
    rows, indices = value, part.scatter.inputs[1]
    like = part.scatter.inputs[2]
    if like is not None and rank_of(like) != rank_of(rows):
        rows = emit.op("Reshape", rows, emit.op("Shape", like))
    if part.negative:
        rows = emit.op("Neg", rows)
    wanted = emit.op("Shape", parameter) if shape is None else emit.ints(*shape)
    zeros = emit.zeros(wanted, dtype)
    attributes = {"reduction": "add"}
    if part.scatter.op_type == "ScatterElements":
        axis = part.scatter.attributes.get("axis")
        attributes = {"reduction": "add", "axis": 0 if axis is None else axis.as_int()}
    return emit.many(part.scatter.op_type, [zeros, indices, rows], 1, attributes)[0]


def _settings(view: ir.Node) -> dict[str, int | list[int]]:
    """Return the attributes of a view: an axis, a type, or a permutation."""
    found: dict[str, int | list[int]] = {}
    for name, attribute in view.attributes.items():
        many = attribute.type == ir.AttributeType.INTS
        found[name] = list(attribute.as_ints()) if many else attribute.as_int()
    return found


def _take_out(
    exported: Exported,
    flow: Flow,
    news: Collection[ir.Value],
    gradients: Mapping[str, ir.Value],
    losses: Collection[ir.Value],
) -> list[str]:
    """Make gradients outputs in place of what the optimizer made of them; return the outputs that went.

    Its own inputs (states, counters, learning rates) go with them.
    """
    model = exported.model
    outputs = model.graph.outputs
    kept = {*gradients.values(), *losses}
    kept |= {value for value in outputs if value.name in exported.chosen.values()}
    made = _descendants({*gradients.values(), *news}, flow) - kept
    gone = [
        value
        for value in dict.fromkeys(outputs)
        if value not in kept
        and (value in made or value in news or (value in flow.tuned and value not in flow.batch))
    ]
    values = _by_name(model)
    wanted = [value for value in outputs if value not in gone]
    named = [values[name] for name in exported.chosen.values() if name in values]
    for value in (*losses, *gradients.values(), *named):
        if value not in wanted:
            wanted.append(value)
    outputs.clear()
    outputs.extend(wanted)
    RemoveUnusedNodesPass()(model)
    for value in [item for item in model.graph.inputs if item in flow.states]:
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)
            if value.name in model.graph.initializers:
                del model.graph.initializers[str(value.name)]
    return [str(value.name) for value in gone]


def _notes(updates: Collection[Update], what: str) -> list[str]:
    """Say which optimizers were found and what becomes of them, one sentence per kind."""
    kinds: dict[str, int] = {}
    for item in updates:
        text = item.kind if item.rate is None else f"{item.kind}, learning rate {item.rate:.6g}"
        text += ", with weight decay" if item.decayed else ""
        text += ", with gradients clipped" if item.clipped else ""
        kinds[text] = kinds.get(text, 0) + 1
    return [
        f"the graph's own optimizer is {what} ({text}): {count} parameter{'' if count == 1 else 's'}"
        for text, count in kinds.items()
    ]
