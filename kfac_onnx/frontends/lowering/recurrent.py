"""LSTM and GRU with saved gates, and their gradients through time, each as one Scan.

Shapes: X float[T, B, I], W float[1, gH, I], R float[1, gH, H], bias float[1, 2gH] (input biases, then
recurrent ones), h0 and c0 float[1, B, H], Y float[T, 1, B, H]; g = 4 gates i, o, f, c (LSTM) or 3 gates
z, r, h (GRU). Only the recurrence runs inside the Scan; every product with X or W, and every weight
gradient, is one MatMul over all T steps.

    LSTM  c_t = f c_{t−1} + i c̃,  h_t = o tanh(c_t)
    GRU   h_t = (1 − z) h̃ + z h_{t−1},  h̃ = tanh(W x + b_W + r (R h_{t−1} + b_R))

The GRU is the one with linear_before_reset = 1, which PyTorch uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from kfac_onnx.frontends.lowering.emit import HALF_TYPES, Emit, Miss
from kfac_onnx.frontends.values import dtype_of, int_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kfac_onnx.frontends.lowering.emit import Lowered

__all__ = ["RULES"]

DEFAULT_ACTIVATIONS = {
    "LSTM": ["sigmoid", "tanh", "tanh"],
    "GRU": ["sigmoid", "tanh"],
}


def _refusal(node: ir.Node, optional: dict[int, str]) -> Miss | None:
    """Return why a node is outside what the formulas cover; `optional` names inputs that must be absent."""
    kind = "LSTM" if node.op_type.startswith("LSTM") else "GRU"
    direction = node.attributes.get("direction")
    if direction is not None and direction.as_string() != "forward":
        return Miss(f"direction '{direction.as_string()}' is not supported")
    chosen = node.attributes.get("activations")
    if chosen is not None and [name.lower() for name in chosen.as_strings()] != DEFAULT_ACTIVATIONS[kind]:
        return Miss("activations other than sigmoid and tanh are not supported")
    if "clip" in node.attributes:
        return Miss("clip is not supported")
    if int_attribute(node, "layout", 0) != 0:
        return Miss("layout=1 is not supported")
    if int_attribute(node, "input_forget", 0) != 0:
        return Miss("input_forget=1 is not supported")
    if kind == "GRU" and int_attribute(node, "linear_before_reset", 0) != 1:
        return Miss("linear_before_reset=0 is not supported")
    for index, name in optional.items():
        if index < len(node.inputs) and node.inputs[index] is not None:
            return Miss(f"{name} are not supported")
    if dtype_of(node.inputs[0]) in (None, *HALF_TYPES):
        return Miss("only float32 and float64 are supported")
    return None


@dataclass(frozen=True)
class _Step:
    """The values of one time step: states carried along, and slices of the scanned tensors."""

    emit: Emit
    states: tuple[ir.Value, ...]
    slices: tuple[ir.Value, ...]


def _scan(
    emit: Emit,
    node: ir.Node,
    states: Sequence[ir.Value],
    scanned: Sequence[ir.Value],
    step: Callable[[_Step], tuple[Sequence[ir.Value], Sequence[ir.Value]]],
    *,
    outputs: int,
    backward: bool,
) -> tuple[ir.Value, ...]:
    """Run `step` over the first axis (backwards if asked); return final states and stacked outputs."""
    dtype = dtype_of(node.inputs[0]) or ir.DataType.FLOAT
    inner = Emit(emit.names, node)

    def parameter(what: str, rank: int) -> ir.Value:
        name = emit.names.fresh(f"kfac/lower/{node.outputs[0].name}/{what}")
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([None] * rank))

    carried = tuple(parameter("state", 2) for _ in states)
    slices = tuple(parameter("slice", 2) for _ in scanned)
    new_states, stacked = step(_Step(inner, carried, slices))
    results = [inner.op("Identity", value) for value in (*new_states, *stacked)]
    for value in results:
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape([None, None])
    body = ir.Graph(
        [*carried, *slices],
        results,
        nodes=inner.nodes,
        name=emit.names.fresh(f"kfac/lower/{node.outputs[0].name}/step"),
    )
    direction = [int(backward)]
    return emit.many(
        "Scan",
        [*states, *scanned],
        len(states) + outputs,
        {
            "body": body,
            "num_scan_inputs": len(scanned),
            "scan_input_directions": direction * len(scanned),
            "scan_output_directions": direction * outputs,
        },
    )


@dataclass(frozen=True)
class _Cell:
    """The parts that forward and backward share: weights without their direction axis, and sizes."""

    emit: Emit
    node: ir.Node
    gates: int

    def squeeze(self, value: ir.Value, axis: int = 0) -> ir.Value:
        """Drop the direction axis."""
        return self.emit.op("Squeeze", value, self.emit.ints(axis))

    def unsqueeze(self, value: ir.Value, axis: int = 0) -> ir.Value:
        """Put the direction axis back."""
        return self.emit.op("Unsqueeze", value, self.emit.ints(axis))

    def initial(self, value: ir.Value | None, x: ir.Value, recurrent: ir.Value) -> ir.Value:
        """Return an initial state float[B, H], zeros if the node has none."""
        if value is not None:
            return self.squeeze(value)
        batch = self.emit.part(self.emit.op("Shape", x), 1, 2)
        hidden = self.emit.part(self.emit.op("Shape", recurrent), 1, 2)
        return self.emit.zeros(self.emit.concat(batch, hidden), dtype_of(x) or ir.DataType.FLOAT)

    def previous(self, first: ir.Value, states: ir.Value) -> ir.Value:
        """Return float[T, B, H]: the state before each step, from the states after each (float[T, B, H])."""
        before_last = self.emit.op("Slice", states, self.emit.ints(0), self.emit.ints(-1), self.emit.ints(0))
        return self.emit.op("Concat", self.unsqueeze(first), before_last, axis=0)

    def biases(self, bias: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
        """Return the input and recurrent biases, float[gH] each."""
        if bias is None:
            return None
        halves = self.emit.many("Split", [self.squeeze(bias)], 2, {"axis": 0, "num_outputs": 2})
        return halves[0], halves[1]

    def linear(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Return x weightᵀ + bias for all steps, float[T, B, gH]."""
        product = self.emit.op("MatMul", x, self.emit.op("Transpose", weight, perm=(1, 0)))
        return product if bias is None else self.emit.op("Add", product, bias)

    def outer(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Return Σ over T and B of left rightᵀ, with the direction axis: float[1, gH, n]."""
        a = self.flat(left)
        return self.unsqueeze(
            self.emit.op("MatMul", self.emit.op("Transpose", a, perm=(1, 0)), self.flat(right))
        )

    def flat(self, value: ir.Value) -> ir.Value:
        """Return float[T B, n] of float[T, B, n]."""
        return self.emit.op("Flatten", value, axis=2)

    def total(self, *values: ir.Value) -> ir.Value:
        """Return the sums over T and B, joined, with the direction axis: float[1, Σ n]."""
        sums = [self.emit.op("ReduceSum", value, self.emit.ints(0, 1), keepdims=0) for value in values]
        return self.unsqueeze(self.emit.concat(*sums))

    def upstream(self, every: ir.Value | None, like: ir.Value) -> ir.Value:
        """Return dL/dY of every step, float[T, B, H], zeros if the loss does not read Y."""
        if every is not None:
            return self.squeeze(every, 1)
        return self.emit.op("Sub", like, like)


def _part(emit: Emit, value: ir.Value, gates: int) -> tuple[ir.Value, ...]:
    return emit.many("Split", [value], gates, {"axis": -1, "num_outputs": gates})


def lstm_training(emit: Emit, node: ir.Node) -> Lowered:
    """LSTMTraining(X, W, R, bias, -, h0, c0) -> Y, Y_h, Y_c, c of every step, gates i|o|f|c of every step."""
    refusal = _refusal(node, {4: "sequence lengths", 7: "peephole weights"})
    if refusal is not None:
        return refusal
    x, weight, recurrent, bias, _, h0, c0 = _inputs(node, 7)
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = _Cell(emit, node, 4)
    halves = cell.biases(bias)
    both = None if halves is None else emit.op("Add", *halves)
    entering = cell.linear(x, cell.squeeze(weight), both)
    back = emit.op("Transpose", cell.squeeze(recurrent), perm=(1, 0))
    start = [cell.initial(value, x, cell.squeeze(recurrent)) for value in (h0, c0)]

    def step(now: _Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
        e, (h, c), (drive,) = now.emit, now.states, now.slices
        i, o, f, g = _part(e, e.op("Add", drive, e.op("MatMul", h, back)), 4)
        i, o, f, g = e.op("Sigmoid", i), e.op("Sigmoid", o), e.op("Sigmoid", f), e.op("Tanh", g)
        new_c = e.op("Add", e.op("Mul", f, c), e.op("Mul", i, g))
        new_h = e.op("Mul", o, e.op("Tanh", new_c))
        return (new_h, new_c), (new_h, new_c, e.op("Concat", i, o, f, g, axis=-1))

    last_h, last_c, every_h, every_c, gates = _scan(
        emit, node, start, [entering], step, outputs=3, backward=False
    )
    results = [
        cell.unsqueeze(every_h, 1),
        cell.unsqueeze(last_h),
        cell.unsqueeze(last_c),
        cell.unsqueeze(every_c, 1),
        cell.unsqueeze(gates, 1),
    ]
    return _wanted(node, results)


def lstm_grad(emit: Emit, node: ir.Node) -> Lowered:
    """LSTMGrad(X, W, R, -, h0, c0, Y, cells, gates, dY, dY_h, dY_c) -> dX, dW, dR, dbias, dh0, dc0."""
    refusal = _refusal(node, {3: "sequence lengths"})
    if refusal is not None:
        return refusal
    x, weight, recurrent, _, h0, c0, every_h, every_c, gates, dy, dy_h, dy_c = _inputs(node, 12)
    if (
        x is None
        or weight is None
        or recurrent is None
        or every_h is None
        or every_c is None
        or gates is None
    ):
        return Miss("a required input is missing")
    cell = _Cell(emit, node, 4)
    w, r = cell.squeeze(weight), cell.squeeze(recurrent)
    hidden, cells = cell.squeeze(every_h, 1), cell.squeeze(every_c, 1)
    before_h = cell.previous(cell.initial(h0, x, r), hidden)
    before_c = cell.previous(cell.initial(c0, x, r), cells)
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: _Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
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
    dh0, dc0, dz = _scan(emit, node, start, scanned, step, outputs=1, backward=True)
    results = [
        emit.op("MatMul", dz, w),
        cell.outer(dz, x),
        cell.outer(dz, before_h),
        cell.total(dz, dz),
        cell.unsqueeze(dh0),
        cell.unsqueeze(dc0),
    ]
    return _wanted(node, results)


def gru_training(emit: Emit, node: ir.Node) -> Lowered:
    """GRUTraining(X, W, R, bias, -, h0) -> Y, Y_h, gates z|r|h of every step."""
    refusal = _refusal(node, {4: "sequence lengths"})
    if refusal is not None:
        return refusal
    x, weight, recurrent, bias, _, h0 = _inputs(node, 6)
    if x is None or weight is None or recurrent is None:
        return Miss("a required input is missing")
    cell = _Cell(emit, node, 3)
    halves = cell.biases(bias)
    entering = cell.linear(x, cell.squeeze(weight), None if halves is None else halves[0])
    back = emit.op("Transpose", cell.squeeze(recurrent), perm=(1, 0))
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: _Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
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
    last, every, gates = _scan(emit, node, start, [entering], step, outputs=2, backward=False)
    results = [cell.unsqueeze(every, 1), cell.unsqueeze(last), cell.unsqueeze(gates, 1)]
    return _wanted(node, results)


def gru_grad(emit: Emit, node: ir.Node) -> Lowered:
    """GRUGrad(X, W, R, bias, -, h0, Y, gates, dY, dY_h) -> dX, dW, dR, dbias, dh0."""
    refusal = _refusal(node, {4: "sequence lengths"})
    if refusal is not None:
        return refusal
    x, weight, recurrent, bias, _, h0, every_h, gates, dy, dy_h = _inputs(node, 10)
    if x is None or weight is None or recurrent is None or every_h is None or gates is None:
        return Miss("a required input is missing")
    cell = _Cell(emit, node, 3)
    w, r = cell.squeeze(weight), cell.squeeze(recurrent)
    hidden = cell.squeeze(every_h, 1)
    before = cell.previous(cell.initial(h0, x, r), hidden)
    halves = cell.biases(bias)
    # R h + b_R of the candidate gate, which the reset gate multiplies, is not saved: all steps in one MatMul.
    candidate = _part(emit, cell.linear(before, r, None if halves is None else halves[1]), 3)[2]
    one = emit.scalar(1.0, dtype_of(x) or ir.DataType.FLOAT)

    def step(now: _Step) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
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
    dh0, entering, returning = _scan(emit, node, start, scanned, step, outputs=2, backward=True)
    results = [
        emit.op("MatMul", entering, w),
        cell.outer(entering, x),
        cell.outer(returning, before),
        cell.total(entering, returning),
        cell.unsqueeze(dh0),
    ]
    return _wanted(node, results)


def _inputs(node: ir.Node, count: int) -> list[ir.Value | None]:
    """Return exactly `count` inputs, None for those that the node leaves out."""
    return [*node.inputs, *([None] * count)][:count]


def _wanted(node: ir.Node, results: Sequence[ir.Value]) -> list[ir.Value | None]:
    """Return the results for the outputs that have a name."""
    return [result if output.name else None for output, result in zip(node.outputs, results, strict=False)]


RULES = {
    ("com.microsoft", "LSTMTraining"): lstm_training,
    ("com.microsoft", "LSTMGrad"): lstm_grad,
    ("com.microsoft", "GRUTraining"): gru_training,
    ("com.microsoft", "GRUGrad"): gru_grad,
}
