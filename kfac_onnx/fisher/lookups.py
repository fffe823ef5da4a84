"""The lookups of a batch: which rows of a table were read, how much each counts, and what divides the counts.

    counts[v] = Σ over lookups n with ids[n] = v of weights[n]  +  Σ over projections of soft[v]

In a training step every id lies inside the table (a session checks that before anything is written), and a
lookup that the graph drops on the way to the table (`keep` is 0 there) counts nothing. A block alone takes
ids as they come: what lies outside counts in the divisor only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.fisher.errors import FisherTypeError, FisherValueError
from kfac_onnx.metadata import Phase
from kfac_onnx.step.draft import BOOL, DOUBLE, FLOAT, INT64

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    import onnx_ir as ir

    from kfac_onnx.fisher.place import Place
    from kfac_onnx.fisher.projections import Positions

__all__ = ["Lookups", "as_towers", "row_count", "step_lookups", "tower_lookups"]


_ALONG_ROWS: Final = {"axis": 0}


@dataclass(frozen=True)
class Lookups:
    """All lookups of a batch, of all uses and towers.

    `ids` int64[N], inside the table; `weights` float32[N], what each counts (None: 1); `number` float32
    scalar, what divides the counts; `share` float64 scalar, Σ weights / number where that is not 1 by
    construction; `soft` further counts, float32[V] each.
    """

    ids: ir.Value
    number: ir.Value
    weights: ir.Value | None = None
    share: ir.Value | None = None
    soft: tuple[ir.Value, ...] = ()

    def weighted(self, scalar: ir.Value, place: Place) -> ir.Value:
        """Return a scalar times each lookup's weight, float32[N]."""
        emit = place.emitter(Phase.GRADIENTS)
        if self.weights is not None:
            return emit.node("Mul", [self.weights, scalar], name="increments", dtype=FLOAT, shape=[None])
        shape = emit.node("Shape", [self.ids], name="ids_shape", dtype=INT64, shape=[1])
        return emit.node("Expand", [scalar, shape], name="increments", dtype=FLOAT, shape=[None])

    def with_soft_counts(self, vocab_size: int, place: Place) -> tuple[ir.Value, ir.Value]:
        """Return ids and weights in which each soft count is a lookup of every row."""
        ids, weights = self.ids, self.weighted(place.number(1.0), place)
        if not self.soft:
            return ids, weights
        emit = place.emitter(Phase.GRADIENTS)
        bounds = [emit.constant(np.asarray(value, np.int64), "bound") for value in (0, vocab_size, 1)]
        every = emit.node("Range", bounds, name="every_row", dtype=INT64, shape=[vocab_size])
        ids = emit.node(
            "Concat",
            [ids, *[every] * len(self.soft)],
            attributes=_ALONG_ROWS,
            name="ids",
            dtype=INT64,
            shape=[None],
        )
        weights = emit.node(
            "Concat",
            [weights, *self.soft],
            attributes=_ALONG_ROWS,
            name="increments",
            dtype=FLOAT,
            shape=[None],
        )
        return ids, weights


def step_lookups(
    ids: ir.Value, keep: ir.Value | None, positions: Sequence[Positions], place: Place
) -> Lookups:
    """Return the lookups of a training step: ids int64[N]; keep float32[N], 0 where the graph drops a row."""
    emit = place.emitter(Phase.GRADIENTS)
    if keep is not None:
        number = emit.node(
            "ReduceSum", [keep], attributes={"keepdims": 0}, name="lookups", dtype=FLOAT, shape=[]
        )
    else:
        size = emit.node("Size", [ids], name="lookups", dtype=INT64, shape=[])
        number = emit.node("Cast", [size], attributes={"to": FLOAT}, name="lookups", dtype=FLOAT, shape=[])
    if positions:
        numbers = [number, *(projection.number for projection in positions)]
        number = emit.node("Sum", numbers, name="lookups", dtype=FLOAT, shape=[])
    return Lookups(ids, number, keep, soft=tuple(projection.counts for projection in positions))


def as_towers(
    tensors: ir.Value | Sequence[ir.Value | Sequence[ir.Value]],
) -> tuple[tuple[ir.Value, ...], ...]:
    """Return tensors as towers of uses: a single tensor, or one per tower, or several uses per tower."""
    import onnx_ir as ir

    if isinstance(tensors, ir.Value):
        return ((tensors,),)
    return tuple((tower,) if isinstance(tower, ir.Value) else tuple(tower) for tower in tensors)


def row_count(values: Sequence[ir.Value], place: Place) -> ir.Value:
    """Return the sum of the sizes of first dimensions, float32 scalar."""
    emit = place.emitter(Phase.GRADIENTS)
    total: ir.Value | None = None
    for value in values:
        size = emit.node("Shape", [value], attributes={"start": 0, "end": 1}, dtype=INT64, shape=[1])
        size = emit.node("Squeeze", [size], name="rows", dtype=INT64, shape=[])
        size = emit.node("Cast", [size], attributes={"to": FLOAT}, name="rows", dtype=FLOAT, shape=[])
        total = size if total is None else emit.node("Add", [total, size], dtype=FLOAT, shape=[])
    if total is None:
        raise FisherValueError("a tower was registered without any tensor")
    return total


def tower_lookups(
    towers: Sequence[Sequence[ir.Value]],
    vocab_size: int,
    strategy: Literal["concat", "separate"],
    place: Place,
) -> Lookups:
    """Return the lookups of towers of uses, ids integer [B] or [B, K] each; counts are divided by Σ B.

    With the strategy "separate" each tower's counts are divided by its own B and by the number of towers.

    Raises FisherTypeError or FisherValueError for ids that are no integers of rank 1 or 2.
    """
    emit = place.emitter(Phase.GRADIENTS)
    ids: list[ir.Value] = []
    weights: list[ir.Value] = []
    for uses in towers:
        inside = [_inside(use, vocab_size, place) for use in uses]
        ids += [flat for flat, _ in inside]
        if strategy == "concat":
            weights += [weight for _, weight in inside]
            continue
        rows = row_count(uses, place)
        rows = emit.node("Mul", [rows, place.number(len(towers))], dtype=FLOAT, shape=[])
        weights += [emit.node("Div", [weight, rows], dtype=FLOAT, shape=[None]) for _, weight in inside]
    if not ids:
        raise FisherValueError("the input factor has no ids")
    one = place.number(1.0)
    number = row_count([use for uses in towers for use in uses], place) if strategy == "concat" else one
    flat = emit.node("Concat", ids, attributes=_ALONG_ROWS, name="ids", dtype=INT64, shape=[None])
    weight = emit.node("Concat", weights, attributes=_ALONG_ROWS, name="weights", dtype=FLOAT, shape=[None])
    total = emit.node("ReduceSum", [weight], attributes={"keepdims": 0}, dtype=FLOAT, shape=[])
    some = emit.node("Greater", [number, place.number(0.0)], dtype=BOOL, shape=[])
    share = emit.node("Div", [total, number], dtype=FLOAT, shape=[])
    share = emit.node("Where", [some, share, one], name="share", dtype=FLOAT, shape=[])
    share = emit.node("Cast", [share], attributes={"to": DOUBLE}, name="share", dtype=DOUBLE, shape=[])
    return Lookups(flat, number, weight, share)


def _inside(ids: ir.Value, vocab_size: int, place: Place) -> tuple[ir.Value, ir.Value]:
    """Return ids int64[N] clipped into the table, and float32[N], 1 where that changed nothing."""
    if ids.dtype is not None and not ids.dtype.is_integer():
        raise FisherTypeError(f"ids '{ids.name}' must be integers, not {ids.dtype.name}")
    if ids.shape is None:
        raise FisherValueError(f"ids '{ids.name}' must have a known rank, 1 or 2")
    if ids.shape.rank() not in (1, 2):
        raise FisherValueError(f"ids '{ids.name}' must have rank 1 or 2, not {ids.shape.rank()}")
    emit = place.emitter(Phase.GRADIENTS)
    flat = emit.node("Cast", [ids], attributes={"to": INT64}, dtype=INT64)
    flat = emit.node("Reshape", [flat, emit.constant(np.asarray([-1], np.int64))], dtype=INT64, shape=[None])
    least, last = (emit.constant(np.asarray(bound, np.int64)) for bound in (0, vocab_size - 1))
    clipped = emit.node("Clip", [flat, least, last], dtype=INT64, shape=[None])
    same = emit.node("Equal", [clipped, flat], dtype=BOOL, shape=[None])
    return clipped, emit.node("Cast", [same], attributes={"to": FLOAT}, dtype=FLOAT, shape=[None])
