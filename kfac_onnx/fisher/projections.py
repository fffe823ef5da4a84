"""Statistics of a tied table's other side: what the output projection adds to A and to G (`tied=both`).

A projection z = h·Wᵀ over P positions has the gradient Σ_p δ_p h_pᵀ with δ = dL/dz. K-FAC's block for it,
over the parameter [V, D], is the Kronecker product of its two second moments, that of δ kept diagonal:

    mean_p δ_p²  ⊗  mean_p h_p h_pᵀ

A scalar may move between the two. For a lookup the left vector is a one-hot, whose squared norm is 1, and the
scale of the loss is in the right one (g). The same is done here: with m = mean_p ‖δ_p‖², a position counts
as a lookup spread over the vocabulary, with gradient row √m·h_p:

    counts of position p = δ_p² / m        (their mean sum over the vocabulary is 1)
    row of position p    = √m · h_p

All lookups and positions are then stacked, M + P in number, as several uses of a table are: A takes Σ
counts, G = (gᵀg + m·hᵀh) / (M + P). A constant factor of the loss changes A and G as it does without a
projection. A batch where δ is all zero has no positions. Cost: O(V·P).
Source: Grosse & Martens 2016 (https://arxiv.org/abs/1602.01407), section 3, for uses that are taken together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import BOOL, FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.fisher.place import Place
    from kfac_onnx.metadata import Projection, Site

__all__ = ["Positions", "emit_positions"]


@dataclass(frozen=True)
class Positions:
    """One projection's counts float32[V], gradient rows float32[P, D], and P as a float32 scalar."""

    counts: ir.Value
    rows: ir.Value
    number: ir.Value


def emit_positions(projection: Projection, site: Site, place: Place) -> Positions:
    """Emit the statistics of one projection, in the phase of the gradients."""
    emit = place.emitter(Phase.GRADIENTS)
    V, D = site.vocab_size, site.embedding_dim
    left = place.float32(place.draft.value(projection.left))
    right = place.float32(place.draft.value(projection.right))
    rank = len(left.shape or ())
    others = [axis for axis in range(rank) if axis != projection.left_axis]
    squares = emit.node(
        "ReduceSumSquare",
        [left, emit.constant(np.asarray(others, np.int64), "positions")],
        attributes={"keepdims": 0},
        name="squares",
        dtype=FLOAT,
        shape=[V],
    )
    order = [axis for axis in range(rank) if axis != projection.right_axis] + [projection.right_axis]
    if order != list(range(rank)):
        right = emit.node("Transpose", [right], attributes={"perm": order}, name="right", dtype=FLOAT)
    flat = emit.constant(np.asarray([-1, D], np.int64), "one_row_a_position")
    right = emit.node("Reshape", [right, flat], name="right", dtype=FLOAT, shape=[None, D])
    nothing, one = emit.constant(np.float32(0.0), "nothing"), emit.constant(np.float32(1.0), "one")
    size = emit.node("Shape", [right], attributes={"end": 1}, name="positions", dtype=INT64, shape=[1])
    scalar = emit.constant(np.asarray([], np.int64), "scalar")
    size = emit.node("Reshape", [size, scalar], name="positions", dtype=INT64, shape=[])
    size = emit.node("Cast", [size], attributes={"to": FLOAT}, name="positions", dtype=FLOAT, shape=[])
    total = emit.node(
        "ReduceSum", [squares], attributes={"keepdims": 0}, name="square_sum", dtype=FLOAT, shape=[]
    )
    some = emit.node("Equal", [total, nothing], name="no_gradient", dtype=BOOL, shape=[])
    some = emit.node(
        "Not", [some], name="any_gradient", dtype=BOOL, shape=[]
    )  # true for NaN, which is flagged
    mean = emit.node("Div", [total, size], name="m", dtype=FLOAT, shape=[])
    divisor = emit.node("Where", [some, mean, one], name="m", dtype=FLOAT, shape=[])
    counts = emit.node("Div", [squares, divisor], name="soft_counts", dtype=FLOAT, shape=[V])
    scale = emit.node("Where", [some, mean, nothing], name="m", dtype=FLOAT, shape=[])
    scale = emit.node("Sqrt", [scale], name="root_m", dtype=FLOAT, shape=[])
    rows = emit.node("Mul", [right, scale], name="position_rows", dtype=FLOAT, shape=[None, D])
    number = emit.node("Where", [some, size, nothing], name="positions", dtype=FLOAT, shape=[])
    place.flag(counts)
    return Positions(counts, rows, number)
