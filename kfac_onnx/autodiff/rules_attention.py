"""Gradients of attention operators.

    S = scale Q Kᵀ,  P = softmax(cap tanh(S / cap) + bias),  Y = P V       (without a cap: softmax(S + bias))
    dV = Pᵀ dY,  dP = dY Vᵀ,  dbias = P (dP − Σ dP P),  dS = dbias (1 − tanh²)
    dQ = scale dS K,  dK = scale dSᵀ Q

Q [B, H, T, D], K [B, G, S, D], V [B, G, S, E]; where several heads share keys (H > G), their queries are
folded into one head, [B, G, H/G T, D]. A row of P that may attend to nothing is 0. P is computed once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.autodiff.decompose import through_body
from kfac_onnx.autodiff.working import Working, float_attribute
from kfac_onnx.canonical.lowering.scatter import END
from kfac_onnx.graph.emit import Miss
from kfac_onnx.graph.values import int_attribute, rank_of

if TYPE_CHECKING:
    from kfac_onnx.autodiff.backward import Backward, Gradients, Rule

__all__ = ["RULES"]

PADDED_MASKS: Final = 24
"""From this opset on, the last axis of a mask may be shorter than there are keys."""


@dataclass(frozen=True)
class _Heads:
    """How Q, K or V is split into heads: their number where the input has rank 3, None at rank 4."""

    work: Working
    number: int | None

    def split(self, value: ir.Value) -> ir.Value:
        """Return [B, heads, T, D]."""
        if self.number is None:
            return value
        emit = self.work.emit
        return emit.op(
            "Transpose", emit.op("Reshape", value, emit.ints(0, 0, self.number, -1)), perm=(0, 2, 1, 3)
        )

    def joined(self, value: ir.Value) -> ir.Value:
        """Undo `split`."""
        if self.number is None:
            return value
        emit = self.work.emit
        return emit.op("Reshape", emit.op("Transpose", value, perm=(0, 2, 1, 3)), emit.ints(0, 0, -1))


def attention(back: Backward) -> Gradients:
    """Attention(Q, K, V, mask; is_causal, scale, softcap, q_num_heads, kv_num_heads) -> Y.

    With a cache of past keys, windows, or other outputs that matter, through the operator's definition.
    """
    node, work = back.node, Working.of(back, back.x(0))
    windows = any(int_attribute(node, f"{side}_window_size", -1) >= 0 for side in ("left", "right"))
    inputs = any(back.input(index) is not None for index in (4, 5, 6))
    mask = back.input(3)
    longer = mask is not None and back.names.model.opset_imports.get("", 0) >= PADDED_MASKS
    if (
        windows
        or inputs
        or any(back.grad(index) is not None for index in (1, 2, 3))
        or (longer and back.needs(3))
    ):
        return through_body(back)
    if rank_of(back.x(0)) is None:
        return Miss("the rank of its first input is unknown")
    emit = back.emit
    heads = [_heads(back, work, index) for index in range(4)]
    q, k, v = (heads[index].split(work.up(back.x(index))) for index in range(3))
    dy = heads[3].split(work.up(back.dy))
    full = emit.op("Shape", q)
    keys = emit.op("Shape", k)
    shared = emit.concat(emit.part(keys, 0, 2), emit.ints(-1))  # [B, G, -1]

    def folded(value: ir.Value, width: ir.Value) -> ir.Value:
        return emit.op("Reshape", value, emit.concat(shared, width))

    length, size = emit.part(keys, 2, 3), emit.part(full, 3, 4)
    scores_shape = emit.concat(emit.part(full, 0, 3), length)
    rows = folded(q, size)
    scale = _scale(back, work, size)
    scores = emit.op("Mul", emit.op("MatMul", rows, _transposed(work, k)), scale)
    scores = emit.op("Reshape", scores, scores_shape)
    cap = float_attribute(node, "softcap", 0.0)
    bent = None
    if cap:
        bent = emit.op("Tanh", emit.op("Div", scores, work.number(cap)))
        scores = emit.op("Mul", bent, work.number(cap))
    bias = _bias(back, work, emit.part(full, 2, 3), length, padded=longer)
    if bias is None:
        p = emit.op("Softmax", scores, axis=-1)
    else:
        p = emit.op("Softmax", emit.op("Add", scores, bias), axis=-1)
        most = emit.op("ReduceMax", bias, emit.ints(-1), keepdims=1)
        p = emit.op("Where", emit.op("Equal", most, work.number(-np.inf)), work.number(0), p)
    above = folded(dy, emit.part(emit.op("Shape", dy), 3, END))
    dv = emit.op("MatMul", _transposed(work, folded(p, length)), above)
    dp = emit.op("Reshape", emit.op("MatMul", above, _transposed(work, v)), scores_shape)
    total = emit.op("ReduceSum", emit.op("Mul", dp, p), emit.ints(-1), keepdims=1)
    dbias = emit.op("Mul", p, emit.op("Sub", dp, total))
    ds = dbias
    if bent is not None:
        ds = emit.op("Mul", ds, emit.op("Sub", work.number(1), emit.op("Mul", bent, bent)))
    ds = folded(emit.op("Mul", ds, scale), length)
    dq = emit.op("Reshape", emit.op("MatMul", ds, k), full)
    dk = emit.op("MatMul", _transposed(work, ds), rows)
    results = [work.down(heads[index].joined(value)) for index, value in enumerate((dq, dk, dv))]
    dmask = None
    if mask is not None and back.needs(3):
        dmask = work.down(back.reduce_at_run_time(dbias, mask), back.dtype(mask))
    return [*results, dmask]


def _heads(back: Backward, work: Working, index: int) -> _Heads:
    """Return how an input is split; index 3 stands for the output, which is as the first input."""
    if rank_of(back.x(index % 3)) != 3:
        return _Heads(work, None)
    which = "q_num_heads" if index in (0, 3) else "kv_num_heads"
    return _Heads(work, back.node.attributes[which].as_int())


def _transposed(work: Working, value: ir.Value) -> ir.Value:
    return work.emit.op("Transpose", value, perm=(0, 1, 3, 2))


def _scale(back: Backward, work: Working, size: ir.Value) -> ir.Value:
    given = back.node.attributes.get("scale")
    if given is not None:
        return work.number(given.as_float())
    return work.emit.op("Reciprocal", work.emit.op("Sqrt", work.emit.cast(size, work.work)))


def _bias(
    back: Backward, work: Working, queries: ir.Value, keys: ir.Value, *, padded: bool
) -> ir.Value | None:
    """Return what is added to the scores, of a shape that broadcasts to theirs; None if nothing is."""
    emit, mask = work.emit, back.input(3)
    zero, never = work.number(0), work.number(-np.inf)
    bias = None
    if mask is not None:
        if back.dtype(mask) == ir.DataType.BOOL:
            bias = emit.op("Where", mask, zero, never)
        else:
            bias = work.up(mask, back.dtype(mask))
        if padded:
            more = emit.op("Sub", keys, emit.part(emit.op("Shape", mask), -1, END))
            bias = emit.op("Pad", bias, emit.concat(emit.ints(0), more), never, emit.ints(-1))
    if not int_attribute(back.node, "is_causal", 0):
        return bias
    first, one = (emit.constant(np.array(number, np.int64)) for number in (0, 1))
    row, column = (
        emit.op("Range", first, emit.op("Squeeze", count, emit.ints(0)), one) for count in (queries, keys)
    )
    later = emit.op(
        "Less", emit.op("Unsqueeze", row, emit.ints(1)), emit.op("Unsqueeze", column, emit.ints(0))
    )
    causal = emit.op("Where", later, never, zero)
    return causal if bias is None else emit.op("Add", bias, causal)


RULES: Final[dict[str | tuple[str, str], Rule]] = {"Attention": attention}
