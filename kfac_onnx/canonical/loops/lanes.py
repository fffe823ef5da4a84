"""What a value of a loop's body is over all iterations at once, as values outside of the loop.

A `Fixed` value is the same in every iteration. A `Stacked` one has its instances along a first axis,
possibly in another order than that of the iterations. A `Ragged` one has instances of different lengths,
joined along their first axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from kfac_onnx.graph.emit import Miss

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = [
    "FORWARD",
    "REVERSE",
    "Fixed",
    "Lane",
    "Order",
    "Ragged",
    "Segments",
    "Stacked",
    "composed",
    "inverse",
    "named_order",
]

Order: TypeAlias = Literal["forward", "reverse"] | tuple[int, ...]
"""Which entry of the stack each iteration has: entry t, entry T−1−t, or entry order[t]."""
FORWARD: Final = "forward"
REVERSE: Final = "reverse"


@dataclass(frozen=True)
class Fixed:
    """The same in every iteration: an outer value."""

    value: ir.Value
    rank: int | None


@dataclass(frozen=True)
class Stacked:
    """Instances of rank `rank` along axis 0 of `value`; `index` says that the instance is its own number."""

    value: ir.Value
    rank: int
    order: Order = FORWARD
    index: bool = False


@dataclass(frozen=True, eq=False)
class Segments:
    """Consecutive parts of a vector, one per iteration.

    `number` int64[N] is the iteration of each entry, `place` int64[N] its place in the vector, `lengths` and
    `first` int64[T] the length of each part and where it begins among the N.
    """

    number: ir.Value
    place: ir.Value
    lengths: ir.Value
    first: ir.Value


@dataclass(frozen=True)
class Ragged:
    """Instances joined along axis 0 of `value`; `rank` is that of an instance, and of `value`."""

    value: ir.Value
    rank: int
    segments: Segments


Lane: TypeAlias = Fixed | Stacked | Ragged | Miss


def composed(outer: Order, inner: Order) -> Order | None:
    """Return the order of entries outer[inner[t]], or None where it cannot be said without their number."""
    if inner == FORWARD:
        return outer
    if outer == FORWARD:
        return inner
    if outer == REVERSE and inner == REVERSE:
        return FORWARD
    sequence = outer if isinstance(outer, tuple) else inner
    count = len(sequence)
    first, second = _numbers(outer, count), _numbers(inner, count)
    return named_order([int(item) for item in first[second]])


def named_order(places: Sequence[int]) -> Order | None:
    """Return the order that reads these places, or None if some place is read twice or not at all."""
    plain = list(range(len(places)))
    if sorted(places) != plain:
        return None
    if list(places) == plain:
        return FORWARD
    return REVERSE if list(places) == plain[::-1] else tuple(places)


def inverse(order: Order) -> Order:
    """Return the order that undoes another one."""
    return tuple(int(item) for item in np.argsort(order)) if isinstance(order, tuple) else order


def _numbers(order: Order, count: int) -> np.ndarray:
    if isinstance(order, tuple):
        return np.array(order)
    numbers = np.arange(count)
    return numbers if order == FORWARD else numbers[::-1]
