"""LSTM and GRU with saved gates, and their gradients through time, each as one Scan per direction.

Shapes, with d directions (forward, reverse, or both in this order): X float[T, B, I], W float[d, gH, I],
R float[d, gH, H], bias float[d, 2gH] (input biases, then recurrent ones), h0 and c0 float[d, B, H],
Y float[T, d, B, H]; g = 4 gates i, o, f, c (LSTM) or 3 gates z, r, h (GRU). Each rule below is of one
direction (d = 1). Only the recurrence runs inside the Scan; every product with X or W, and every weight
gradient, is one MatMul over all T steps.

    LSTM  c_t = f c_{t−1} + i c̃,  h_t = o tanh(c_t)
    GRU   h_t = (1 − z) h̃ + z h_{t−1},  h̃ = tanh(W x + b_W + r (R h_{t−1} + b_R))

The GRU is the one with linear_before_reset = 1, which PyTorch uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.frontends.lowering.emit import Miss
from kfac_onnx.frontends.lowering.recurrent_parts import Cell, Step, by_direction, refusal, scan
from kfac_onnx.frontends.values import dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.frontends.lowering.emit import Emit

__all__ = ["RULES"]


def _part(emit: Emit, value: ir.Value, gates: int) -> tuple[ir.Value, ...]:
    return emit.many("Split", [value], gates, {"axis": -1, "num_outputs": gates})


def lstm_training(
    emit: Emit, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """LSTMTraining(X, W, R, bias, -, h0, c0) -> Y, Y_h, Y_c, c of every step, gates i|o|f|c of every step."""
    unfit = refusal(node, {4: "sequence lengths", 7: "peephole weights"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0, c0 = inputs
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    halves = cell.biases(bias)
    both = None if halves is None else emit.op("Add", *halves)
    entering = cell.linear(x, cell.squeeze(weight), both)
    back = emit.op("Transpose", cell.squeeze(recurrent), perm=(1, 0))
    start = [cell.initial(value, x, cell.squeeze(recurrent)) for value in (h0, c0)]

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h, c), (drive,) = now.emit, now.states, now.slices
        i, o, f, g = _part(e, e.op("Add", drive, e.op("MatMul", h, back)), 4)
        i, o, f, g = e.op("Sigmoid", i), e.op("Sigmoid", o), e.op("Sigmoid", f), e.op("Tanh", g)
        new_c = e.op("Add", e.op("Mul", f, c), e.op("Mul", i, g))
        new_h = e.op("Mul", o, e.op("Tanh", new_c))
        return (new_h, new_c), (new_h, new_c, e.op("Concat", i, o, f, g, axis=-1))

    last_h, last_c, every_h, every_c, gates = scan(
        emit, node, start, [entering], step, outputs=3, backward=reverse
    )
    return [
        cell.unsqueeze(every_h, 1),
        cell.unsqueeze(last_h),
        cell.unsqueeze(last_c),
        cell.unsqueeze(every_c, 1),
        cell.unsqueeze(gates, 1),
    ]


def lstm_grad(
    emit: Emit, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """LSTMGrad(X, W, R, -, h0, c0, Y, cells, gates, dY, dY_h, dY_c) -> dX, dW, dR, dbias, dh0, dc0."""
    unfit = refusal(node, {3: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, _, h0, c0, every_h, every_c, gates, dy, dy_h, dy_c = inputs
    if (
        x is None
        or weight is None
        or recurrent is None
        or every_h is None
        or every_c is None
        or gates is None
    ):
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    w, r = cell.squeeze(weight), cell.squeeze(recurrent)
    hidden, cells = cell.squeeze(every_h, 1), cell.squeeze(every_c, 1)
    before_h = cell.previous(cell.initial(h0, x, r), hidden)
    before_c = cell.previous(cell.initial(c0, x, r), cells)
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (dh, dc), (above, c, old_c, saved) = now.emit, now.states, now.slices
        i, o, f, g = _part(e, saved, 4)
        dh_now = e.op("Add", dh, above)
        t = e.op("Tanh", c)
        dc_now = e.op("Add", dc, e.op("Mul", e.op("Mul", dh_now, o), e.op("Sub", one, e.op("Mul", t, t))))

        def through_sigmoid(grad: ir.Value, gate: ir.Value) -> ir.Value:
            return e.op("Mul", grad, e.op("Mul", gate, e.op("Sub", one, gate)))

        di = through_sigmoid(e.op("Mul", dc_now, g), i)
        do = through_sigmoid(e.op("Mul", dh_now, t), o)
        df = through_sigmoid(e.op("Mul", dc_now, old_c), f)
        dg = e.op("Mul", e.op("Mul", dc_now, i), e.op("Sub", one, e.op("Mul", g, g)))
        dz = e.op("Concat", di, do, df, dg, axis=-1)
        return (e.op("MatMul", dz, r), e.op("Mul", dc_now, f)), (dz,)

    start = [cell.initial(value, x, r) for value in (dy_h, dy_c)]
    scanned = [cell.upstream(dy, hidden), cells, before_c, cell.squeeze(gates, 1)]
    dh0, dc0, dz = scan(emit, node, start, scanned, step, outputs=1, backward=not reverse)
    return [
        emit.op("MatMul", dz, w),
        cell.outer(dz, x),
        cell.outer(dz, before_h),
        cell.total(dz, dz),
        cell.unsqueeze(dh0),
        cell.unsqueeze(dc0),
    ]


def gru_training(
    emit: Emit, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """GRUTraining(X, W, R, bias, -, h0) -> Y, Y_h, gates z|r|h of every step."""
    unfit = refusal(node, {4: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0 = inputs
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    halves = cell.biases(bias)
    entering = cell.linear(x, cell.squeeze(weight), None if halves is None else halves[0])
    back = emit.op("Transpose", cell.squeeze(recurrent), perm=(1, 0))
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h,), (drive,) = now.emit, now.states, now.slices
        own = e.op("MatMul", h, back)
        own = own if halves is None else e.op("Add", own, halves[1])
        xz, xr, xh = _part(e, drive, 3)
        hz, hr, hh = _part(e, own, 3)
        z, r = e.op("Sigmoid", e.op("Add", xz, hz)), e.op("Sigmoid", e.op("Add", xr, hr))
        n = e.op("Tanh", e.op("Add", xh, e.op("Mul", r, hh)))
        new = e.op("Add", e.op("Mul", e.op("Sub", one, z), n), e.op("Mul", z, h))
        return (new,), (new, e.op("Concat", z, r, n, axis=-1))

    start = [cell.initial(h0, x, cell.squeeze(recurrent))]
    last, every, gates = scan(emit, node, start, [entering], step, outputs=2, backward=reverse)
    return [cell.unsqueeze(every, 1), cell.unsqueeze(last), cell.unsqueeze(gates, 1)]


def gru_grad(
    emit: Emit, node: ir.Node, inputs: Sequence[ir.Value | None], reverse: bool
) -> Sequence[ir.Value] | Miss:
    """GRUGrad(X, W, R, bias, -, h0, Y, gates, dY, dY_h) -> dX, dW, dR, dbias, dh0."""
    unfit = refusal(node, {4: "sequence lengths"})
    if unfit is not None:
        return unfit
    x, weight, recurrent, bias, _, h0, every_h, gates, dy, dy_h = inputs
    if x is None or weight is None or recurrent is None or every_h is None or gates is None:
        return Miss("a required input is missing")
    cell = Cell(emit, node, reverse)
    w, r = cell.squeeze(weight), cell.squeeze(recurrent)
    hidden = cell.squeeze(every_h, 1)
    before = cell.previous(cell.initial(h0, x, r), hidden)
    halves = cell.biases(bias)
    # R h + b_R of the candidate gate, which the reset gate multiplies, is not saved: all steps in one MatMul.
    candidate = _part(emit, cell.linear(before, r, None if halves is None else halves[1]), 3)[2]
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (dh,), (above, old, saved, own) = now.emit, now.states, now.slices
        z, reset, n = _part(e, saved, 3)
        dh_now = e.op("Add", dh, above)
        dn = e.op("Mul", e.op("Mul", dh_now, e.op("Sub", one, z)), e.op("Sub", one, e.op("Mul", n, n)))
        slope_z = e.op("Mul", z, e.op("Sub", one, z))
        slope_r = e.op("Mul", reset, e.op("Sub", one, reset))
        dz = e.op("Mul", e.op("Mul", dh_now, e.op("Sub", old, n)), slope_z)
        dr = e.op("Mul", e.op("Mul", dn, own), slope_r)
        entering = e.op("Concat", dz, dr, dn, axis=-1)
        recurrent_part = e.op("Concat", dz, dr, e.op("Mul", dn, reset), axis=-1)
        earlier = e.op("Add", e.op("Mul", dh_now, z), e.op("MatMul", recurrent_part, r))
        return (earlier,), (entering, recurrent_part)

    start = [cell.initial(dy_h, x, r)]
    scanned = [cell.upstream(dy, hidden), before, cell.squeeze(gates, 1), candidate]
    dh0, entering, returning = scan(emit, node, start, scanned, step, outputs=2, backward=not reverse)
    return [
        emit.op("MatMul", entering, w),
        cell.outer(entering, x),
        cell.outer(returning, before),
        cell.total(entering, returning),
        cell.unsqueeze(dh0),
    ]


RULES = {
    ("com.microsoft", "LSTMTraining"): by_direction(lstm_training, inputs="x000x00", outputs="10011"),
    ("com.microsoft", "LSTMGrad"): by_direction(lstm_grad, inputs="x00x00111100", outputs="x00000"),
    ("com.microsoft", "GRUTraining"): by_direction(gru_training, inputs="x000x0", outputs="101"),
    ("com.microsoft", "GRUGrad"): by_direction(gru_grad, inputs="x000x01110", outputs="x0000"),
}
