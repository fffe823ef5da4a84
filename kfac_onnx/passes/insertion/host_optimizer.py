"""Leaves the graph's own optimizer in a drop-in graph, and gives it the preconditioned gradients.

The graph keeps all its inputs and outputs. Parameters and the optimizer's states become states of the step,
so that a session trains with that optimizer; a step that is not finite changes none of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.operators import Keeps, keeping
from kfac_onnx.metadata import HostUpdate, OptimizerState, Parameter, Phase, Site
from kfac_onnx.readers.optimizer_inside.host_update import OURS
from kfac_onnx.step.draft import FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.row_scales import RowUpdate
    from kfac_onnx.step.draft import Draft

__all__ = ["close_updates", "host_update_of", "replace_source"]

SAME_ENTRIES: Final = keeping(Keeps.ORDER) | {"Identity"}
MADE_BY: Final = "kfac.pass"
PHASE: Final = "kfac.phase"


def host_update_of(model: ir.Model, parameter: str) -> HostUpdate | None:
    """Return how the graph's own optimizer updates a parameter, if it is kept."""
    found = metadata.read_list(model, "updates", HostUpdate)
    return next((item for item in found if item.parameter == parameter), None)


def replace_source(
    update: HostUpdate,
    source: ir.Value,
    site: Site,
    result: RowUpdate,
    gradient: ir.Value | None,
    draft: Draft,
) -> None:
    """Let an update take `gradient` (preconditioned, in the parameter's layout) or `result`'s rows.

    `source` is the value that it took as the gradient so far.

    Raises:
        UserError: if the update cannot be given another gradient.

    """
    if update.problem is not None or (update.rows and (result.ids is None or site.layout != "rows")):
        why = update.problem or "it scatters rows, and the preconditioned gradient is a whole tensor"
        raise UserError(
            f"the update of '{update.parameter}' inside the graph cannot be given another gradient: {why}",
            path=f"{update.source} -> {update.output}",
            context="insert-embedding-kfac",
            help="take --shape rows, which replaces the graph's optimizer by ours",
        )
    if update.rows:
        _scatter(update, source, result, draft)
        return
    if gradient is None:
        raise AssertionError("an update of the whole tensor takes a gradient")
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    value = _unscaled(update, gradient, draft)
    if update.views == ("Transpose",):
        value = emit.node("Transpose", [value], attributes={"perm": [1, 0]}, name="taken", dtype=value.dtype)
    elif update.views:
        shape = emit.node("Shape", [source], name="taken_shape", dtype=INT64)
        value = emit.node("Reshape", [value, shape], name="taken", dtype=value.dtype, shape=source.shape)
    for usage in list(source.uses()):
        node = usage.node
        if MADE_BY not in node.metadata_props and OURS not in node.metadata_props:
            emit.replace_input(node, usage.idx, value)


def _unscaled(update: HostUpdate, value: ir.Value, draft: Draft) -> ir.Value:
    """Return what the update takes where the gradient is `value`."""
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    dtype = value.dtype or FLOAT
    if update.scale != 1.0:
        scale = emit.constant(np.asarray(update.scale).astype(dtype.numpy()), "scale")
        value = emit.node("Div", [value, scale], name="taken", dtype=dtype, shape=value.shape)
    if update.negative:
        value = emit.node("Neg", [value], name="taken", dtype=dtype, shape=value.shape)
    return value


def _scatter(update: HostUpdate, source: ir.Value, result: RowUpdate, draft: Draft) -> None:
    """Write the new value again: the update's own scalings of preconditioned rows, added at their ids."""
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    old = draft.value(update.output)
    dtype = source.dtype or FLOAT
    rows = result.update
    if rows.dtype != dtype:
        rows = emit.node("Cast", [rows], attributes={"to": dtype}, name="rows", dtype=dtype, shape=rows.shape)
    rows = _unscaled(update, rows, draft)
    taken = source
    for name in update.steps:
        node = draft.value(name).producer()
        if node is None:
            raise AssertionError("a step of an update is computed")
        inputs = [rows if _same_entries(value, taken) else value for value in node.inputs]
        attributes = dict(node.attributes)
        taken = draft.value(name)
        rows = emit.node(
            node.op_type, inputs, attributes=attributes, name="step", dtype=taken.dtype, shape=rows.shape
        )
    if result.ids is None:
        raise AssertionError("rows have ids")
    last = emit.constant(np.asarray([-1], np.int64), "last")
    column = emit.node("Unsqueeze", [result.ids, last], name="ids", dtype=INT64, shape=[None, 1])
    size = emit.node("Shape", [rows], name="rows_shape", dtype=INT64, shape=[2])
    places = emit.node("Expand", [column, size], name="ids", dtype=INT64, shape=rows.shape)
    weight = draft.value(update.parameter)
    attributes = {"axis": 0, "reduction": "add"}
    new = emit.node(
        "ScatterElements",
        [weight, places, rows],
        attributes=attributes,
        name="new",
        dtype=weight.dtype,
        shape=weight.shape,
    )
    name, old.name = str(old.name), emit.unique_name(f"{old.name}.replaced")
    emit.replace_uses(old, new, outputs=True)
    new.name = name
    draft.remember(new, old)


def _same_entries(value: ir.Value | None, taken: ir.Value) -> bool:
    """Say whether a value is `taken`, or a view of it."""
    while value is not None and value is not taken:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in SAME_ENTRIES else None
    return value is taken


def close_updates(draft: Draft) -> None:
    """Declare the states of a kept optimizer, drop gradients that were no outputs, and order the nodes."""
    model = draft.model
    updates = metadata.read_list(model, "updates", HostUpdate)
    if not updates:
        return
    own = set(metadata.read_strings(model, "exported_outputs"))
    gradients = {item.gradient for item in metadata.read_list(model, "parameters", Parameter)}
    for value in list(model.graph.outputs):
        if value.name in gradients and value.name not in own:
            model.graph.outputs.remove(value)
            draft.emitter.count(removed=1)
    model.graph.sort()
    behind = {value for node in model.graph if MADE_BY in node.metadata_props for value in node.outputs}
    for node in model.graph:
        if MADE_BY in node.metadata_props:
            continue
        if any(value in behind for value in node.inputs):
            behind.update(node.outputs)
            if node.metadata_props.get(PHASE) != Phase.PRECONDITION:
                node.metadata_props[PHASE] = str(Phase.PRECONDITION)
                draft.emitter.count(edited=1)
    pairs = [OptimizerState(item.parameter, item.output) for item in updates]
    for pair in (*pairs, *metadata.read_list(model, "optimizer_states", OptimizerState)):
        old, new = draft.values.get(pair.input), draft.values.get(pair.output)
        if old is None or new is None or new.producer() is None:
            continue
        draft.parameter(pair.input)
        if new.dtype is None or new.dtype.is_floating_point():
            draft.flag(new)
        node = new.producer()
        phase = Phase.PRECONDITION if node is not None and node.metadata_props.get(PHASE) else Phase.GRADIENTS
        draft.keep(old, new, phase)
        trained = any(item.parameter == pair.input for item in updates)
        draft.states[-1] = replace(
            draft.states[-1],
            output=pair.output,
            role="parameter" if trained else "optimizer",
            parameter=pair.input if trained else None,
        )
