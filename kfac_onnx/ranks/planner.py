"""What a step on several ranks would hold and send, without starting one: `inspect --ranks`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.metadata import State
from kfac_onnx.ranks.cut import cut_step

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RankPlan", "plan_ranks"]


@dataclass(frozen=True)
class RankPlan:
    """What each of `ranks` holds and sends, in bytes; `refused` says why the model cannot be cut, else null.

    `sharded` is by table: its rows and all states with a row per row of it, on the rank that holds the most.
    `sent` is for the lookups of one rank in each table, all of them distinct: at most.
    """

    ranks: int
    refused: str | None
    sharded: dict[str, int]
    replicated: int
    sent: int | None

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON data."""
        return asdict(self)


def plan_ranks(model: ir.Model, ranks: int, lookups: int | None) -> RankPlan:
    """Return the plan for a transformed model; `lookups` are those of one rank in each table."""
    try:
        cut = cut_step(model)
    except UserError as e:
        return RankPlan(ranks, first_line(e), {}, 0, None)
    sharded = dict.fromkeys((table.parameter for table in cut.tables), 0)
    replicated = 0
    for state in metadata.read_list(model, "state", State):
        width = np.dtype(state.dtype).itemsize if state.dtype != "bfloat16" else 2
        if state.input in cut.sharded:
            rows = -(-state.shape[0] // ranks)
            sharded[cut.sharded[state.input]] += rows * math.prod(state.shape[1:]) * width
        else:
            replicated += math.prod(state.shape) * width
    if lookups is None:
        return RankPlan(ranks, None, sharded, replicated, None)
    shapes = {p.name: p.shape for p in metadata.read_list(model, "parameters", metadata.Parameter)}
    reduced = 1 + sum(math.prod(shapes[name]) for name in cut.dense.values())
    reduced += sum(table.columns**2 for table in cut.tables)
    away = sum(min(lookups, table.rows) * (8 * table.columns + 16) for table in cut.tables)
    return RankPlan(ranks, None, sharded, replicated, ((ranks - 1) * (away + 8 * reduced)) // ranks)
