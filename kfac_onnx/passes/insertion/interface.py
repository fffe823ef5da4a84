"""Gives a drop-in graph the gradients of the exporter's own that are rows and their ids.

The canonical graph has one tensor per gradient. Where the exporter gave rows and ids, the drop-in graph does
too: the pair holds the preconditioned rows with the ids that they belong to. Repeated ids add up, as
before; presets that square rows give each id once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.metadata import Phase, RowGradient

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.row_scales import RowUpdate
    from kfac_onnx.step.draft import Draft

__all__ = ["drop_tensors", "replace_rows", "row_gradient_of"]


def row_gradient_of(model: ir.Model, parameter: str) -> RowGradient | None:
    """Return the pair that the exporter's graph gives as a parameter's gradient, if it does."""
    pairs = metadata.read_list(model, "row_gradients", RowGradient)
    return next((item for item in pairs if item.parameter == parameter), None)


def replace_rows(pair: RowGradient, update: RowUpdate, draft: Draft) -> None:
    """Give the names of a pair to preconditioned rows and their ids, in the pair's own dtypes."""
    if update.ids is None:
        raise AssertionError("a gradient of rows alone has no dense part")
    emit = draft.emitter.derive(phase=Phase.PRECONDITION)
    for name, value in ((pair.values, update.update), (pair.indices, update.ids)):
        old = draft.value(name)
        rank = 2 if old.shape is None else len(old.shape)
        if rank == 1 and name == pair.values:
            flat = emit.constant(np.asarray([-1], np.int64), "flat")
            value = emit.node("Reshape", [value, flat], name="row_values", dtype=value.dtype, shape=[None])
        dtype = value.dtype if old.dtype is None else old.dtype
        old.name = emit.unique_name(f"{name}.unconditioned")
        shape = value.shape if update.unique else old.shape
        new = emit.node("Cast", [value], attributes={"to": dtype}, name=name, dtype=dtype, shape=shape)
        new.name = name
        outputs = draft.model.graph.outputs
        for index, output in enumerate(outputs):
            if output is old:
                outputs[index] = new
        draft.remember(new, old)


def drop_tensors(draft: Draft) -> None:
    """Take the tensors that row gradients were scattered into out of the outputs: the exporter had none."""
    outputs = draft.model.graph.outputs
    for pair in metadata.read_list(draft.model, "row_gradients", RowGradient):
        for value in [value for value in outputs if value.name == pair.gradient]:
            outputs.remove(value)
            draft.emitter.count(removed=1)
