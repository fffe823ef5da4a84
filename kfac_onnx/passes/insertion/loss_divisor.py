"""What a mean loss divides by, for blocks that want gradients of a loss that is a sum over examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.metadata import Loss, Phase
from kfac_onnx.step.draft import FLOAT

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter
    from kfac_onnx.step.draft import Draft

__all__ = ["squared_divisor"]


def squared_divisor(
    model: ir.Model, emitter: Emitter, draft: Draft, *, divisor: float | None, subject: str, context: str
) -> ir.Value:
    """Emit c², c being `divisor` or else what the loss divides by in the graph; float32 scalar.

    Raises UserError where the graph does not show it; `subject` is what needs it.
    """
    emit = emitter.derive(phase=Phase.GRADIENTS)
    if divisor is not None:
        return emit.constant(np.float32(divisor**2), "grad_scale_squared")
    from kfac_onnx.readers import emit_divisor

    value = emit_divisor(model)
    if value is None:
        loss = metadata.read(model, "loss", Loss)
        named = "the loss" if loss is None or loss.value is None else f"the loss '{loss.value}'"
        raise UserError(
            f"{subject} needs the number of examples that {named} divides by, and the graph does not show it",
            context=context,
            help="give it: grad-scale=N, or 1 for a loss that is a sum",
        )
    draft.remember(value)
    return emit.node("Mul", [value, value], name="grad_scale_squared", dtype=FLOAT, shape=[])
