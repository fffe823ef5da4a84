"""LSTM and GRU with saved gates, and their gradients through time, each as one Scan per direction.

Shapes, with d directions (forward, reverse, or both in this order): X float[T, B, I], W float[d, gH, I],
R float[d, gH, H], bias float[d, 2gH] (input biases, then recurrent ones), h0 and c0 float[d, B, H],
Y float[T, d, B, H]; g = 4 gates i, o, f, c (LSTM) or 3 gates z, r, h (GRU). Each rule below is of one
direction (d = 1). Only the recurrence runs inside the Scan; every product with X or W, and every weight
gradient, is one MatMul over all T steps.
The formulas are those of `recurrent_steps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.canonical.lowering.recurrent_parts import Cell, by_direction, refusal
from kfac_onnx.canonical.lowering.recurrent_steps import (
    Layer,
    gru_backward,
    gru_forward,
    lstm_backward,
    lstm_forward,
)
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.graph.emit import Emitter

__all__ = ["RULES"]


def lstm_training(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """LSTMTraining(X, W, R, bias, -, h0, c0) -> Y, Y_h, Y_c, c of every step, gates i|o|f|c of every step."""
    unfit = refusal(node, {4: "sequence lengths", 7: "peephole weights"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0, c0 = inputs
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    layer = Layer.of(cell, x, weight, recurrent, bias)
    last_h, last_c, every_h, every_c, gates = lstm_forward(layer, h0, c0)
    return [
        cell.unsqueeze(every_h, 1),
        cell.unsqueeze(last_h),
        cell.unsqueeze(last_c),
        cell.unsqueeze(every_c, 1),
        cell.unsqueeze(gates, 1),
    ]


def lstm_grad(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """LSTMGrad(X, W, R, -, h0, c0, Y, cells, gates, dY, dY_h, dY_c) -> dX, dW, dR, dbias, dh0, dc0."""
    unfit = refusal(node, {3: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, _, h0, c0, every_h, every_c, gates, *upstream = inputs
    saved = [value for value in (every_h, every_c, gates) if value is not None]
    if x is None or weight is None or recurrent is None or len(saved) < 3:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    layer = Layer.of(cell, x, weight, recurrent, None)
    hidden, cells, values = (cell.squeeze(value, 1) for value in saved)
    return lstm_backward(layer, h0, c0, hidden, cells, values, upstream)


def gru_training(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """GRUTraining(X, W, R, bias, -, h0) -> Y, Y_h, gates z|r|h of every step."""
    unfit = refusal(node, {4: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0 = inputs
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    layer = Layer.of(cell, x, weight, recurrent, bias)
    last, every, gates = gru_forward(layer, h0, reset_last=_reset_last(node))
    return [cell.unsqueeze(every, 1), cell.unsqueeze(last), cell.unsqueeze(gates, 1)]


def gru_grad(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """GRUGrad(X, W, R, bias, -, h0, Y, gates, dY, dY_h) -> dX, dW, dR, dbias, dh0."""
    unfit = refusal(node, {4: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0, every_h, gates, *upstream = inputs
    if x is None or weight is None or recurrent is None or every_h is None or gates is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    layer = Layer.of(cell, x, weight, recurrent, bias)
    hidden, saved = cell.squeeze(every_h, 1), cell.squeeze(gates, 1)
    return gru_backward(layer, h0, hidden, saved, upstream, reset_last=_reset_last(node))


def _reset_last(node: ir.Node) -> bool:
    return int_attribute(node, "linear_before_reset", 0) == 1


RULES = {
    ("com.microsoft", "LSTMTraining"): by_direction(lstm_training, inputs="x000x00", outputs="10011"),
    ("com.microsoft", "LSTMGrad"): by_direction(lstm_grad, inputs="x00x00111100", outputs="x00000"),
    ("com.microsoft", "GRUTraining"): by_direction(gru_training, inputs="x000x0", outputs="101"),
    ("com.microsoft", "GRUGrad"): by_direction(gru_grad, inputs="x000x01110", outputs="x0000"),
}
