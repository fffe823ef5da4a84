"""Gradients of LSTM, GRU and RNN: backpropagation through time, as one Scan per direction.

The operators do not write their gates: the recurrence is run once more, by a Scan that does. Shapes are those
of `lowering.recurrent`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.autodiff.working import by_lowering
from kfac_onnx.canonical.lowering.recurrent_parts import Cell, by_direction, refusal
from kfac_onnx.canonical.lowering.recurrent_steps import (
    Layer,
    gru_backward,
    gru_forward,
    lstm_backward,
    lstm_forward,
    rnn_backward,
    rnn_forward,
)
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule
    from kfac_onnx.graph.emit import Emitter

__all__ = ["RULES"]


def _lstm(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """X, W, R, bias, lengths, h0, c0, peepholes, dY, dY_h, dY_c -> dX, dW, dR, dbias, dh0, dc0."""
    layer = _layer(emit, node, inputs, reverse, {7: "peephole weights"})
    if isinstance(layer, Miss):
        return layer
    h0, c0, upstream = inputs[5], inputs[6], inputs[8:]
    _, _, hidden, cells, gates = lstm_forward(layer, h0, c0)
    return lstm_backward(layer, h0, c0, hidden, cells, gates, upstream)


def _gru(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """X, W, R, bias, lengths, h0, dY, dY_h -> dX, dW, dR, dbias, dh0."""
    layer = _layer(emit, node, inputs, reverse, {})
    if isinstance(layer, Miss):
        return layer
    reset_last = int_attribute(node, "linear_before_reset", 0) == 1
    _, hidden, gates = gru_forward(layer, inputs[5], reset_last=reset_last)
    return gru_backward(layer, inputs[5], hidden, gates, inputs[6:], reset_last=reset_last)


def _rnn(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """X, W, R, bias, lengths, h0, dY, dY_h -> dX, dW, dR, dbias, dh0."""
    layer = _layer(emit, node, inputs, reverse, {})
    if isinstance(layer, Miss):
        return layer
    _, hidden = rnn_forward(layer, inputs[5])
    return rnn_backward(layer, inputs[5], hidden, inputs[6:])


def _layer(
    emit: Emitter, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool, unfit: dict[int, str]
) -> Layer | Miss:
    refused = refusal(node, unfit)
    if refused is not None:
        return refused
    x, weight, recurrent, bias, lengths = inputs[:5]
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    return Layer.of(Cell(emit, node, reverse), x, weight, recurrent, bias, lengths)


def _rule(kind: str, inputs: int, outputs: int) -> Rule:
    """Return the rule of an operator with so many inputs and outputs."""
    body = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[kind]
    states = "0" * (outputs - 1)  # axes of the direction: none in X and lengths, the second in Y
    axes = f"x000x{states}{'0' * (inputs - 4 - outputs)}1{states}"
    lowering = by_direction(body, inputs=axes, outputs=f"x000{states}")

    def rule(back: Backward) -> Gradients:
        given = [back.input(index) for index in range(inputs)]
        above = [back.grad(index) for index in range(outputs)]
        found = by_lowering(back, lowering, f"{kind}Backward", [*given, *above], [True] * (3 + outputs))
        if isinstance(found, Miss):
            return found
        dx, dw, dr, dbias, *dstates = found
        return [dx, dw, dr, dbias, None, *dstates]

    rule.__doc__ = body.__doc__
    return rule


RULES: Final[dict[str | tuple[str, str], Rule]] = {
    "GRU": _rule("GRU", 6, 2),
    "LSTM": _rule("LSTM", 8, 3),
    "RNN": _rule("RNN", 6, 2),
}
