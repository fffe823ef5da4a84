"""The recurrences of LSTM, GRU and RNN over all steps of one direction, and their gradients.

    LSTM  c_t = f c_{t−1} + i c̃,  h_t = o tanh(c_t)
    GRU   h_t = (1 − z) h̃ + z h_{t−1},  h̃ = tanh(W x + b_W + r (R h_{t−1} + b_R))
          or, with linear_before_reset = 0, h̃ = tanh(W x + b_W + R (r h_{t−1}) + b_R)
    RNN   h_t = f(W x + b_W + R h_{t−1} + b_R),  f = tanh or relu

A sequence that has ended keeps its states, and takes no part in any gradient but that of its last state.
Shapes are those of `recurrent`, without the axis of the direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kfac_onnx.canonical.lowering.recurrent_parts import Cell, scan
from kfac_onnx.graph.values import dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.canonical.lowering.recurrent_parts import Step
    from kfac_onnx.graph.emit import Emitter

__all__ = [
    "Layer",
    "gru_backward",
    "gru_forward",
    "lstm_backward",
    "lstm_forward",
    "rnn_backward",
    "rnn_forward",
]


@dataclass(frozen=True)
class Layer:
    """One direction of a layer: X, W, R, both biases, and which sequences are still running."""

    cell: Cell
    x: ir.Value
    weight: ir.Value
    recurrent: ir.Value
    halves: tuple[ir.Value, ir.Value] | None
    mask: ir.Value | None = None
    """float[T, B, 1]: 1 where the sequence has not ended; None where all have the same length."""

    @classmethod
    def of(
        cls,
        cell: Cell,
        x: ir.Value,
        weight: ir.Value,
        recurrent: ir.Value,
        bias: ir.Value | None,
        lengths: ir.Value | None = None,
    ) -> Layer:
        """Make a layer of the operator's inputs; `lengths` int[B]."""
        emit = cell.emit
        mask = None
        if lengths is not None:
            steps = emit.entry(emit.op("Shape", x), 0)
            zero, one = (emit.constant(np.array(number, np.int64)) for number in (0, 1))
            place = emit.op("Unsqueeze", emit.op("Range", zero, steps, one), emit.ints(1))
            running = emit.op("Less", place, emit.cast(lengths, ir.DataType.INT64, dtype_of(lengths)))
            dtype = dtype_of(x) or ir.DataType.FLOAT
            mask = emit.op("Unsqueeze", emit.cast(running, dtype), emit.ints(-1))
        return cls(cell, x, cell.squeeze(weight), cell.squeeze(recurrent), cell.biases(bias), mask)

    @property
    def emit(self) -> Emitter:
        """What the nodes outside the Scan are emitted through."""
        return self.cell.emit

    @property
    def one(self) -> ir.Value:
        """1 in the layer's type."""
        return self.emit.scalar(1.0, dtype_of(self.x) or ir.DataType.FLOAT)

    @property
    def zero(self) -> ir.Value:
        """0 in the layer's type."""
        return self.emit.scalar(0.0, dtype_of(self.x) or ir.DataType.FLOAT)

    def entering(self, *, summed: bool) -> ir.Value:
        """Return W x + b_W of all steps (+ b_R too if `summed`), float[T, B, gH]."""
        bias = None
        if self.halves is not None:
            bias = self.emit.op("Add", *self.halves) if summed else self.halves[0]
        return self.cell.linear(self.x, self.weight, bias)

    def initial(self, value: ir.Value | None) -> ir.Value:
        """Return an initial state, or the gradient of a final one: zeros where there is none."""
        return self.cell.initial(value, self.x, self.recurrent)

    def masks(self) -> list[ir.Value]:
        """Return the mask as the last thing that a Scan is over, if there is one."""
        return [] if self.mask is None else [self.mask]

    def running(self, now: Step) -> ir.Value | None:
        """Return bool[B, 1]: the sequence has not ended, from the last slice."""
        return None if self.mask is None else now.emit.op("Greater", now.slices[-1], self.zero)

    def rnn_function(self) -> str:
        """Return the operator that an RNN applies: Tanh or Relu."""
        given = self.cell.node.attributes.get("activations")
        names = ["Tanh"] if given is None else list(given.as_strings())
        return names[-1 if self.cell.reverse else 0].capitalize()


def part(emit: Emitter, value: ir.Value, gates: int) -> tuple[ir.Value, ...]:
    """Return equal parts along the last axis."""
    return emit.many("Split", [value], gates, {"axis": -1, "num_outputs": gates})


def choose(emit: Emitter, condition: ir.Value | None, value: ir.Value, other: ir.Value) -> ir.Value:
    """Return `value`, or `other` where a condition that there is does not hold."""
    return value if condition is None else emit.op("Where", condition, value, other)


def through_sigmoid(emit: Emitter, grad: ir.Value, gate: ir.Value, one: ir.Value) -> ir.Value:
    """Return the gradient of what the gate is the sigmoid of."""
    return emit.op("Mul", grad, emit.op("Mul", gate, emit.op("Sub", one, gate)))


def through_tanh(emit: Emitter, grad: ir.Value, output: ir.Value, one: ir.Value) -> ir.Value:
    """Return the gradient of what `output` is the tanh of."""
    return emit.op("Mul", grad, emit.op("Sub", one, emit.op("Mul", output, output)))


def lstm_forward(layer: Layer, h0: ir.Value | None, c0: ir.Value | None) -> tuple[ir.Value, ...]:
    """Return last h, last c float[B, H]; of every step h, c float[T, B, H], gates i|o|f|c̃ float[T, B, 4H]."""
    emit = layer.emit
    back = emit.op("Transpose", layer.recurrent, perm=(1, 0))

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h, c), drive = now.emit, now.states, now.slices[0]
        i, o, f, g = part(e, e.op("Add", drive, e.op("MatMul", h, back)), 4)
        i, o, f, g = e.op("Sigmoid", i), e.op("Sigmoid", o), e.op("Sigmoid", f), e.op("Tanh", g)
        on = layer.running(now)
        new_c = choose(e, on, e.op("Add", e.op("Mul", f, c), e.op("Mul", i, g)), c)
        new_h = choose(e, on, e.op("Mul", o, e.op("Tanh", new_c)), h)
        return (new_h, new_c), (new_h, new_c, e.op("Concat", i, o, f, g, axis=-1))

    return scan(
        emit,
        layer.cell.node,
        [layer.initial(h0), layer.initial(c0)],
        [layer.entering(summed=True), *layer.masks()],
        step,
        outputs=3,
        backward=layer.cell.reverse,
    )


def lstm_backward(
    layer: Layer,
    h0: ir.Value | None,
    c0: ir.Value | None,
    hidden: ir.Value,
    cells: ir.Value,
    gates: ir.Value,
    upstream: Sequence[ir.Value | None],
) -> list[ir.Value]:
    """Return dX, dW, dR, dbias, dh0, dc0 from what `lstm_forward` returns and dY, dY_h, dY_c."""
    emit, cell, one, r = layer.emit, layer.cell, layer.one, layer.recurrent
    dy, dy_h, dy_c = upstream
    before_h = cell.previous(layer.initial(h0), hidden)
    before_c = cell.previous(layer.initial(c0), cells)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (dh, dc), (above, c, old_c, saved) = now.emit, now.states, now.slices[:4]
        i, o, f, g = part(e, saved, 4)
        on = layer.running(now)
        dh_now = e.op("Add", dh, above)
        t = e.op("Tanh", c)
        dc_now = e.op("Add", dc, through_tanh(e, e.op("Mul", dh_now, o), t, one))
        di = through_sigmoid(e, e.op("Mul", dc_now, g), i, one)
        do = through_sigmoid(e, e.op("Mul", dh_now, t), o, one)
        df = through_sigmoid(e, e.op("Mul", dc_now, old_c), f, one)
        dg = through_tanh(e, e.op("Mul", dc_now, i), g, one)
        dz = choose(e, on, e.op("Concat", di, do, df, dg, axis=-1), layer.zero)
        earlier_h = choose(e, on, e.op("MatMul", dz, r), dh)
        return (earlier_h, choose(e, on, e.op("Mul", dc_now, f), dc)), (dz,)

    start = [layer.initial(value) for value in (dy_h, dy_c)]
    scanned = [cell.upstream(dy, hidden), cells, before_c, gates, *layer.masks()]
    dh0, dc0, dz = scan(emit, cell.node, start, scanned, step, outputs=1, backward=not cell.reverse)
    return [
        emit.op("MatMul", dz, layer.weight),
        cell.outer(dz, layer.x),
        cell.outer(dz, before_h),
        cell.total(dz, dz),
        cell.unsqueeze(dh0),
        cell.unsqueeze(dc0),
    ]


def gru_forward(
    layer: Layer, h0: ir.Value | None, *, reset_last: bool = True
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return last h float[B, H], h of every step float[T, B, H], gates z|r|h̃ of every step float[T, B, 3H].

    `reset_last`: linear_before_reset = 1.
    """
    emit, one = layer.emit, layer.one
    back = emit.op("Transpose", layer.recurrent, perm=(1, 0))
    if not reset_last:
        return _gru_forward_reset_first(layer, h0, back)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h,), drive = now.emit, now.states, now.slices[0]
        own = e.op("MatMul", h, back)
        own = own if layer.halves is None else e.op("Add", own, layer.halves[1])
        xz, xr, xh = part(e, drive, 3)
        hz, hr, hh = part(e, own, 3)
        z, r = e.op("Sigmoid", e.op("Add", xz, hz)), e.op("Sigmoid", e.op("Add", xr, hr))
        n = e.op("Tanh", e.op("Add", xh, e.op("Mul", r, hh)))
        new = e.op("Add", e.op("Mul", e.op("Sub", one, z), n), e.op("Mul", z, h))
        new = choose(e, layer.running(now), new, h)
        return (new,), (new, e.op("Concat", z, r, n, axis=-1))

    scanned = [layer.entering(summed=False), *layer.masks()]
    last, every, gates = scan(
        emit, layer.cell.node, [layer.initial(h0)], scanned, step, outputs=2, backward=layer.cell.reverse
    )
    return last, every, gates


def _gru_forward_reset_first(
    layer: Layer, h0: ir.Value | None, back: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    emit, one = layer.emit, layer.one
    back_z, back_r, back_h = part(emit, back, 3)

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h,), drive = now.emit, now.states, now.slices[0]
        xz, xr, xh = part(e, drive, 3)
        z = e.op("Sigmoid", e.op("Add", xz, e.op("MatMul", h, back_z)))
        r = e.op("Sigmoid", e.op("Add", xr, e.op("MatMul", h, back_r)))
        n = e.op("Tanh", e.op("Add", xh, e.op("MatMul", e.op("Mul", r, h), back_h)))
        new = e.op("Add", e.op("Mul", e.op("Sub", one, z), n), e.op("Mul", z, h))
        new = choose(e, layer.running(now), new, h)
        return (new,), (new, e.op("Concat", z, r, n, axis=-1))

    scanned = [layer.entering(summed=True), *layer.masks()]
    last, every, gates = scan(
        emit, layer.cell.node, [layer.initial(h0)], scanned, step, outputs=2, backward=layer.cell.reverse
    )
    return last, every, gates


def gru_backward(
    layer: Layer,
    h0: ir.Value | None,
    hidden: ir.Value,
    gates: ir.Value,
    upstream: Sequence[ir.Value | None],
    *,
    reset_last: bool = True,
) -> list[ir.Value]:
    """Return dX, dW, dR, dbias, dh0 from what `gru_forward` returns and dY, dY_h."""
    emit, cell, one, r = layer.emit, layer.cell, layer.one, layer.recurrent
    dy, dy_h = upstream
    before = cell.previous(layer.initial(h0), hidden)
    if reset_last:
        # R h + b_R of the candidate, which the reset gate multiplies, is not saved: all steps in one MatMul.
        bias = None if layer.halves is None else layer.halves[1]
        candidate = part(emit, cell.linear(before, r, bias), 3)[2]
    else:
        candidate = before  # what the reset gate multiplies
    r_z, r_r, r_h = emit.many("Split", [r], 3, {"axis": 0, "num_outputs": 3})

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (dh,), (above, old, saved, own) = now.emit, now.states, now.slices[:4]
        z, reset, n = part(e, saved, 3)
        on = layer.running(now)
        dh_now = e.op("Add", dh, above)
        dn = through_tanh(e, e.op("Mul", dh_now, e.op("Sub", one, z)), n, one)
        dz = through_sigmoid(e, e.op("Mul", dh_now, e.op("Sub", old, n)), z, one)
        kept = e.op("Mul", dh_now, z)
        if reset_last:
            dr = through_sigmoid(e, e.op("Mul", dn, own), reset, one)
            back = e.op("Concat", dz, dr, e.op("Mul", dn, reset), axis=-1)
            back = choose(e, on, back, layer.zero)
            earlier = e.op("Add", kept, e.op("MatMul", back, r))
        else:
            inner = e.op("MatMul", dn, r_h)  # the gradient of r h
            dr = through_sigmoid(e, e.op("Mul", inner, own), reset, one)
            gated = e.op("Add", e.op("MatMul", dz, r_z), e.op("MatMul", dr, r_r))
            back = choose(e, on, e.op("Concat", dz, dr, dn, axis=-1), layer.zero)
            earlier = e.op("Add", e.op("Add", kept, gated), e.op("Mul", inner, reset))
        entering = choose(e, on, e.op("Concat", dz, dr, dn, axis=-1), layer.zero)
        return (choose(e, on, earlier, dh),), (entering, back)

    scanned = [cell.upstream(dy, hidden), before, gates, candidate, *layer.masks()]
    dh0, entering, returning = scan(
        emit, cell.node, [layer.initial(dy_h)], scanned, step, outputs=2, backward=not cell.reverse
    )
    if reset_last:
        dr = cell.outer(returning, before)
    else:
        reset = part(emit, gates, 3)[1]
        sides = part(emit, returning, 3)
        gated = emit.op("Mul", reset, before)
        outers = [cell.outer(side, gated if index == 2 else before) for index, side in enumerate(sides)]
        dr = emit.op("Concat", *outers, axis=1)
    return [
        emit.op("MatMul", entering, layer.weight),
        cell.outer(entering, layer.x),
        dr,
        cell.total(entering, returning),
        cell.unsqueeze(dh0),
    ]


def rnn_forward(layer: Layer, h0: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Return last h float[B, H] and h of every step float[T, B, H]."""
    emit = layer.emit
    back = emit.op("Transpose", layer.recurrent, perm=(1, 0))
    function = layer.rnn_function()

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h,), drive = now.emit, now.states, now.slices[0]
        new = e.op(function, e.op("Add", drive, e.op("MatMul", h, back)))
        new = choose(e, layer.running(now), new, h)
        return (new,), (new,)

    scanned = [layer.entering(summed=True), *layer.masks()]
    last, every = scan(
        emit, layer.cell.node, [layer.initial(h0)], scanned, step, outputs=1, backward=layer.cell.reverse
    )
    return last, every


def rnn_backward(
    layer: Layer, h0: ir.Value | None, hidden: ir.Value, upstream: Sequence[ir.Value | None]
) -> list[ir.Value]:
    """Return dX, dW, dR, dbias, dh0 from the states of every step and dY, dY_h."""
    emit, cell, one = layer.emit, layer.cell, layer.one
    dy, dy_h = upstream
    before = cell.previous(layer.initial(h0), hidden)
    function = layer.rnn_function()

    def step(now: Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (dh,), (above, h) = now.emit, now.states, now.slices[:2]
        on = layer.running(now)
        dh_now = e.op("Add", dh, above)
        if function == "Tanh":
            dz = through_tanh(e, dh_now, h, one)
        else:
            dz = e.op("Where", e.op("Greater", h, layer.zero), dh_now, layer.zero)
        dz = choose(e, on, dz, layer.zero)
        return (choose(e, on, e.op("MatMul", dz, layer.recurrent), dh),), (dz,)

    scanned = [cell.upstream(dy, hidden), hidden, *layer.masks()]
    dh0, dz = scan(
        emit, cell.node, [layer.initial(dy_h)], scanned, step, outputs=1, backward=not cell.reverse
    )
    return [
        emit.op("MatMul", dz, layer.weight),
        cell.outer(dz, layer.x),
        cell.outer(dz, before),
        cell.total(dz, dz),
        cell.unsqueeze(dh0),
    ]
