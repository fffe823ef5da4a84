"""What a table's gradient is a sum of: rows with their ids, or something dense, behind views.

`ViewStep` is a view between a scatter and the gradient, `RowStep` what it becomes when it is pulled back
over the rows (`pull_back`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.tables.masks import DropMask

__all__ = ["DenseTerm", "RowStep", "RowTerm", "ViewStep"]


@dataclass(frozen=True)
class RowStep:
    """One operation on (ids, rows), in the order in which they apply.

    `negate`; `scale` by a scalar or per-column operand (`divide` for Div); `scale-rows` by a per-row operand
    read at the ids; `window` keeps ids in [start, stop) and subtracts start; `columns` keeps columns
    [start, stop); `shift` adds start to the ids; `wrap` adds stop to negative ids.
    """

    kind: Literal["negate", "scale", "scale-rows", "window", "columns", "shift", "wrap"]
    operand: ir.Value | None = None
    divide: bool = False
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class ViewStep:
    """One operator between the scatter and the gradient; `operand` is the other input of a scaling."""

    node: ir.Node
    kind: str
    operand: ir.Value | None = None
    window: tuple[int, int, int] | None = None
    """(axis, start, stop) of a Slice or Split, or (axis, before, 0) of a Pad."""


@dataclass(frozen=True)
class RowTerm:
    """Rows of a gradient with their ids, as the scattering operator has them.

    `indices` and `updates` are the operator's inputs; `axis` is the table axis that it scatters along,
    `columns` says that the indices are repeated over the columns (ScatterElements), `shape` is the
    shape of what it scatters into. For constant ids without a scatter `indices` is None and `fixed`
    holds them. `order` transposes the updates to one axis for each of the ids' and then the columns;
    `before` are operations on ids and rows that the scattering operator implies.
    """

    steps: tuple[ViewStep, ...]
    op: str
    indices: ir.Value | None
    updates: ir.Value
    axis: int
    columns: bool
    shape: tuple[int, ...]
    mask: DropMask | None = None
    fixed: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    before: tuple[RowStep, ...] = ()


@dataclass(frozen=True)
class DenseTerm:
    """A part of the gradient that is dense in the table, e.g. that of a tied projection."""

    steps: tuple[ViewStep, ...]
    value: ir.Value
